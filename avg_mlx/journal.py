"""An append-only JSON Lines file that one process writes, and that a later process resumes."""

import contextlib
import fcntl
import json
import os
import stat
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from .errors import AvgMlxError, InputError
from .files import MAX_DATA, JsonError, parse_json, read_file, read_json, write_json

SETTINGS = "run.json"

Row = dict[str, Any]


class Journal:
    """The rows of a JSON Lines file, and the sole right to append to it.

    Opening creates the file where it is missing, locks it, and reads its lines into `rows`. A last line that was cut
    off is left out, and overwritten by the next row. The system releases the lock when the process ends, however it
    ends.

    `settings` say what the rows belong to. They are kept in `run.json` beside the file, and must be the same whenever
    the file is resumed. Without them, the rows have to tell by themselves.

    Raises InputError if another process has the file open, if a line is not a JSON object, or if the settings differ;
    AvgMlxError if the file cannot be opened or written.
    """

    def __init__(self, file: Path, settings: Mapping[str, Any] | None = None):
        self.file = file
        self.settings_file = file.with_name(SETTINGS)
        self._end = 0  # bytes of whole lines
        self._stream = _open(file)
        try:
            self.rows = self._read()
            self.resumed = bool(self.rows) or (settings is not None and self.settings_file.exists())
            if settings is not None:
                self._settle(settings)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give up the lock."""
        with contextlib.suppress(OSError):  # of a full disk, which `append` has told
            self._stream.close()

    def append(self, *rows: Row) -> None:
        """Write rows at the end of the file, each on its line. On a disk that is full, none of them stays there."""
        left = memoryview("".join(map(_line, rows)).encode())
        try:
            if self._stream.seek(0, os.SEEK_END) > self._end:
                self._stream.truncate(self._end)  # a line that was cut off
            while left:
                left = left[self._stream.write(left) :]
            self._end = self._stream.tell()
        except OSError as error:
            with contextlib.suppress(OSError):
                self._stream.truncate(self._end)
            raise _unwritten(self.file, error) from error
        self.rows += rows

    def keep(self, wanted: Callable[[Row], bool]) -> None:
        """Cut the file before the first row that is not wanted."""
        kept = next((n for n, row in enumerate(self.rows) if not wanted(row)), len(self.rows))
        lines = self.file.read_bytes().split(b"\n")[:kept]
        self._end = sum(len(line) + 1 for line in lines)
        self._stream.truncate(self._end)
        self.rows = self.rows[:kept]

    def _read(self) -> list[Row]:
        *lines, _ = read_file(self.file, "choose another output", MAX_DATA).split(b"\n")
        self._end = sum(len(line) + 1 for line in lines)
        return [parse_row(self.file, number, line) for number, line in enumerate(lines, 1)]

    def _settle(self, settings: Mapping[str, Any]) -> None:
        """Write the settings, or see that they are the ones that the rows were written with."""
        now = json.loads(json.dumps(settings))
        if not self.settings_file.exists():
            if self.rows:
                raise InputError(
                    f"{self.file} has rows, but no {SETTINGS} beside it says what they belong to; choose another output"
                )
            try:
                write_json(self.settings_file, now)
            except OSError as error:
                raise _unwritten(self.settings_file, error) from error
            return
        before = read_json(self.settings_file, "choose another output", own=True)
        changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        if changed:
            told = "; ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in changed)
            raise InputError(f"{self.file.parent} cannot be resumed: {told}. Set it back, or choose another output")


def parse_row(file: Path, number: int, line: bytes) -> Row:
    """Return the row in a line of `file`. InputError if it is not a JSON object."""
    try:
        row = parse_json(line, own=True)
        if isinstance(row, dict):
            return row
        found = f"a {type(row).__name__}"
    except JsonError as error:
        found = str(error)
    raise InputError(
        f"{file}, line {number}: expected a JSON object that avg-mlx wrote ({found}); choose another output"
    )


def _unwritten(file: Path, error: OSError) -> AvgMlxError:
    return AvgMlxError(f"cannot write {file} ({error.strerror}); make room, then run the same command again to resume")


def _open(file: Path) -> FileIO:
    """Open a file for appending, and lock it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Without a buffer, so that nothing waits to be written after a failure.
        stream = open(file, "ab", buffering=0, opener=_opened_at_once)  # noqa: SIM115 - the journal closes it
    except OSError as error:
        raise AvgMlxError(f"cannot write {file} ({error.strerror}); choose another output, or make room") from error
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise InputError(f"{file} is a device or a pipe, from which nothing can be resumed; choose another output")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        raise InputError(
            f"another process is writing {file}; wait until it has ended, or choose another output"
        ) from None
    except OSError as error:  # a file system without locks
        stream.close()
        raise AvgMlxError(f"cannot lock {file} ({error.strerror}); choose an output on another disk") from error
    return stream


def _opened_at_once(path: str, flags: int) -> int:
    """Open a file, but a pipe that nobody reads not at all; `open` would wait for its reader."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


def _line(row: Row) -> str:
    """A row as JSON, its text readable, with escapes only where a text holds half a character."""
    line = json.dumps(row, ensure_ascii=False) + "\n"
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(row) + "\n"
    return line
