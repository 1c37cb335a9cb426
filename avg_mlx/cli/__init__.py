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

INTERRUPTED = 130  # the shell's word for Ctrl-C


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def run(parser: Parser, work: Callable[[argparse.Namespace], None], arguments: list[str] | None) -> int:
    """Parse, work, and turn whatever goes wrong into one line on stderr and an exit status."""
    parser.add_argument("--verbose", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        work(args)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        print(f"\n{parser.prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of stdout has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.verbose:
            traceback.print_exc()
        if not isinstance(error, AvgMlxError):
            error = AvgMlxError(f"unexpected {type(error).__name__}: {error} (--verbose tells where)")
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_status


def number(kind: type, low: float, high: float = math.inf, *, exclusive: bool = False) -> Callable[[str], float]:
    """An argparse type: a number of `kind` between bounds; `exclusive` leaves the lower one out."""
    what = "a whole number" if kind is int else "a number"
    bounds = f"above {low:g}" if exclusive else f"from {low:g}"
    bounds += f" up to {high:g}" if high < math.inf else " upwards"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (exclusive and value == low) or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not {what} {bounds}")
        return value

    return parse
