"""The command line: a parser file for each verb, and what they share."""

import argparse
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from ..errors import AvgMlxError


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message)}; see {self.prog} --help\n")


def run(parser: Parser, work: Callable[[argparse.Namespace], None], arguments: list[str] | None) -> int:
    """Parse, work, and turn whatever goes wrong into one line on stderr and an exit status."""
    parser.add_argument("--verbose", action="store_true", default=False, help="show the traceback of an error")
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        work(args)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt as stop:
        print(f"\n{parser.prog}: interrupted", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(stop, _Terminated) else signal.SIGINT)  # as shells say it
    except BrokenPipeError:  # the reader of stdout has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.verbose:
            traceback.print_exc()
        if isinstance(error, OSError):
            error = AvgMlxError(f"{error.filename or 'the system'}: {error.strerror or error}")
        elif not isinstance(error, AvgMlxError):
            error = AvgMlxError(f"unexpected {type(error).__name__}: {error} (--verbose tells where)")
        print(f"{parser.prog}: {one_line(error)}", file=sys.stderr)
        return error.exit_status


class _Terminated(KeyboardInterrupt):
    """SIGTERM ends the work as Ctrl-C does."""


def _terminate(*_: object) -> NoReturn:
    raise _Terminated


def one_line(message: object) -> str:
    """Whatever it says, without line ends."""
    return " ".join(str(message).split())


def number(kind: type, low: float, high: float = math.inf, *, exclusive: bool = False) -> Callable[[str], float]:
    """An argparse type: a number of `kind` between bounds; `exclusive` leaves the lower one out."""
    what = "a whole number" if kind is int else "a number"
    bounds = f"above {low}" if exclusive else f"from {low}"
    bounds += f" up to {high}" if high < math.inf else " upwards"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (exclusive and value == low) or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not {what} {bounds}")
        return value

    return parse


def text(given: str) -> str:
    """An argparse type: a text that came as UTF-8."""
    try:
        given.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("this is not UTF-8 text") from None
    return given
