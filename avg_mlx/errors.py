"""Errors whose text says what was found, what was expected, and what to do."""

import difflib
import errno
from collections.abc import Iterable

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class AvgMlxError(Exception):
    """Anything that stops the work. The command line prints the text and exits with `exit_status`."""

    exit_status = 1


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


def problem(place: str, error: Exception) -> str:
    """Say in one printable line what is wrong with one thing among many, such as a line of a file."""
    return printable(f"{place}: {failure(error)}", 1000)


def nearest(name: str, names: Iterable[str]) -> str:
    """Return "; did you mean …?" for the one of `names` that is nearest to a misspelled one, or nothing."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def printable(text: object, limit: int = 300) -> str:
    """Return a foreign text as a message may show it: on one line, without control characters, and cut at `limit`."""
    line = " ".join(str(text).split())
    line = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line)
    return line if len(line) <= limit else f"{line[:limit]}…"
