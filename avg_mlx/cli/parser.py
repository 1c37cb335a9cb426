"""What all verbs share: argument types, and one line and an exit status for whatever goes wrong."""

import argparse
import logging
import math
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from ..blas import BLAS
from ..errors import LONGEST, AvgMlxError, Interrupted, failure, nearest, printable


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Print the line and exit with status 2."""
        unknown, separator, given = message.partition("unrecognized arguments: ")
        if separator and not unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            message += nearest(given.partition(" ")[0], flags)
        self.exit(2, f"{self.prog}: {one_line(message)}; see {self.prog} --help\n")


class Terminated(KeyboardInterrupt):
    """SIGTERM, or SIGHUP when a terminal closes: each ends the work as Ctrl-C does."""

    def __init__(self, number: int = signal.SIGTERM):
        super().__init__()
        self.number = number


@contextmanager
def _ending_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise Terminated in the block.

    They do so once, since a closing terminal may send several, and the next must not tear what is being saved or
    removed. A signal that is ignored stays so, as SIGHUP does under nohup.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    ending = [number for number, handler in handlers.items() if handler != signal.SIG_IGN]

    def end(number: int, _: object) -> NoReturn:
        for other in ending:
            signal.signal(other, signal.SIG_IGN)
        raise Terminated(number)

    for number in ending:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ending:
            signal.signal(number, handlers[number] or signal.SIG_DFL)


@_ending_signals()
def run(parser: Parser, work: Callable[[argparse.Namespace], None], arguments: list[str] | None) -> int:
    """Parse, work, and turn whatever goes wrong into one line on standard error and an exit status."""
    if sys.stderr is None:  # closed by the shell, as in 2>&-
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115
    about = "show the traceback of an error, and the BLAS in use"
    parser.add_argument("--verbose", action="store_true", default=False, help=about)
    args = parser.parse_args(arguments)
    logger = logging.getLogger("avg_mlx")
    logger.handlers, logger.level = [LogLines()], logging.INFO
    try:
        if sys.stdout is None:
            raise AvgMlxError("standard output is closed; send it to a terminal, a file or /dev/null")
        if args.verbose:
            print(f"BLAS on the CPU: {BLAS}", file=sys.stderr)
        work(args)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt as stop:
        told = str(stop) if isinstance(stop, Interrupted) else "interrupted"
        print(f"\n{parser.prog}: {with_flags(parser, told)}", file=sys.stderr)
        cause = stop.__cause__ if isinstance(stop, Interrupted) else stop
        return 128 + (cause.number if isinstance(cause, Terminated) else signal.SIGINT)  # as shells report it
    except BrokenPipeError:  # the reader of standard output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.verbose:
            traceback.print_exc()
        ours = failure(error)
        where = "" if isinstance(error, AvgMlxError | OSError | MemoryError) else " (--verbose tells where)"
        print(f"{parser.prog}: {with_flags(parser, one_line(ours))}{where}", file=sys.stderr)
        return ours.exit_status


class LogLines(logging.Handler):
    """Prints what the library logs, a line each, above any progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record's text on standard error."""
        from tqdm import tqdm

        tqdm.write(record.getMessage(), file=sys.stderr)


def with_flags(parser: Parser, message: str) -> str:
    """Name options as they are typed: the library says `max_tokens` where the command line has `--max-tokens`.

    Only names with an underscore are replaced, since those are not words of the language.
    """
    flags = {action.dest: max(action.option_strings, key=len) for action in parser._actions if action.option_strings}
    names = "|".join(re.escape(dest) for dest in flags if "_" in dest)
    if not names:
        return message
    return re.sub(rf"(?<![\w/.\-])({names})(?![\w/.\-]\w|\w)", lambda match: flags[match[1]], message)


def one_line(message: object) -> str:
    """Return a message as one printable line, cut only where it would fill screens."""
    return printable(message, LONGEST)


def number(
    kind: type[int] | type[float], low: float, high: float = math.inf, *, exclusive: bool = False
) -> Callable[[str], float]:
    """An argparse type: a number of `kind` from `low` (or above it, if `exclusive`) up to `high`."""
    what = "a whole number" if kind is int else "a number"
    bounds = f"above {low}" if exclusive else f"from {low}"
    bounds += f" up to {high}" if high < math.inf else " upwards"

    def parse(text: str) -> float:
        try:
            value: float = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (exclusive and value == low) or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not {what} {bounds}")
        return value

    return parse


def text(given: str) -> str:
    """An argparse type: a text that was typed as UTF-8."""
    try:
        given.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("this is not UTF-8 text") from None
    return given
