"""Errors whose text says what was found, what was expected, and what to do."""

import difflib
import itertools
import reprlib
from collections.abc import Collection, Iterable

LONGEST = 20_000  # characters of a message, which may list every tensor that is missing


class AvgMlxError(Exception):
    """Anything that stops the work. The command line prints the text and exits with `exit_status`.

    The text is one printable line, whatever names and values of strangers it tells.
    """

    exit_status = 1

    def __init__(self, message: str):
        super().__init__(printable(message, LONGEST))


class InputError(AvgMlxError, ValueError):
    """What the caller gave (an image, prompt, option, folder or tensor) cannot be used."""

    exit_status = 2


class OptionError(InputError, TypeError):
    """A function was given an option that it does not have."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM stopped long work. What was done is kept; the text says how to resume."""


def nearest(name: str, names: Iterable[str]) -> str:
    """Return "; did you mean …?" for the one of `names` that is nearest to a misspelled one, or nothing."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def printable(text: object, limit: int = 300) -> str:
    """Return a foreign text as a message may show it: on one line, without control characters, and cut at `limit`."""
    given = str(text)
    line = " ".join(given[: 4 * limit].split())
    line = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line)
    return line if len(line) <= limit and len(given) <= 4 * limit else f"{line[:limit]}…"


def shown(value: object) -> str:
    """Return a foreign value as Python writes it, and only its beginning where it is large."""
    return reprlib.repr(value)


def listing(names: Collection[object], most: int = 20) -> str:
    """Return foreign names as a message may list them: the first few, and how many more there are."""
    shown = ", ".join(printable(name, 100) for name in itertools.islice(names, most))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
