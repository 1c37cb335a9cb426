"""Errors whose text says what was found, what was expected, and what to do."""

import difflib
import errno
import itertools
import reprlib
import traceback
from collections.abc import Collection, Iterable

LONGEST = 10_000  # characters of a message, which may list every tensor that is missing
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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


def failure(error: Exception) -> AvgMlxError:
    """Return any error as one of ours, so that the failure of one thing among many can be told and kept.

    It is a new one: the traceback of `error` would keep alive what was computed before it.
    """
    if isinstance(error, AvgMlxError):
        return type(error)(*error.args)
    if isinstance(error, MemoryError):
        return AvgMlxError("this takes more memory than there is; make images smaller, or texts shorter")
    if isinstance(error, OSError):
        remedy = "; make room, then run the same command again" if error.errno in FULL_DISK else ""
        return AvgMlxError(f"{error.filename or 'the system'}: {error.strerror or error}{remedy}")
    return AvgMlxError(f"unexpected {type(error).__name__}: {error}")


def origin(error: BaseException) -> str:
    """Say what a fault of ours is and where, but not its text, which may hold what was asked."""
    last = traceback.extract_tb(error.__traceback__)[-1:]
    return f"{type(error).__name__}" + "".join(f" at {place.filename}, line {place.lineno or 0}" for place in last)


def problem(place: str, error: Exception) -> str:
    """Say in one printable line what is wrong with one thing among many, such as a line of a file."""
    return printable(f"{place}: {failure(error)}", 1000)


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
