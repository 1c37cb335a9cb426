"""Data files: the records of a JSON list or of JSON Lines, each with its place in the file."""

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError, printable
from ..files import MAX_DATA, JsonError, parse_json, read_file


def read_records(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) of a JSON list or a JSON Lines file; a line without JSON yields its InputError instead.

    Raises InputError for a file that cannot be read, and for a list that is not valid JSON.
    """
    yield from parse_records(str(file), read_bytes(file))


def read_bytes(file: Path) -> bytes:
    """Return a data file's content; InputError if it cannot be read."""
    remedy = "give a JSON list or a JSON Lines file"
    try:
        return read_file(file, remedy, MAX_DATA)
    except FileNotFoundError as error:
        raise InputError(f"cannot read {printable(file)} ({error.strerror}); {remedy}") from None


def image_path(name: str, folder: Path, strict: bool) -> Path:
    """Return where an image lies that a data file names: in `folder`, unless the name is an absolute path.

    Raises InputError for a name that is no path and, if `strict`, for an absolute one and for one that leaves the
    folder by `..` or by a link.
    """
    try:
        relative = Path(name).expanduser()
        path = folder / relative
        if not strict or (not relative.is_absolute() and path.resolve().is_relative_to(folder.resolve())):
            return path
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, a ~ without a home, a loop of links
        told = printable(error, 120)
        raise InputError(f"{printable(name)} cannot be an image's path ({told}); give a file's name") from None
    raise InputError(
        f"the image {printable(name)} is outside of {printable(folder)}, which strict_paths forbids; "
        "put it into the folder, and name it from there"
    )


def parse_records(name: str, content: bytes) -> Iterator[tuple[str, Any]]:
    """Yield the records of a file's content, as `read_records` does; errors call the file `name`."""
    content = content.removeprefix(codecs.BOM_UTF8)
    if content.lstrip().startswith(b"["):
        try:
            records = parse_json(content)
        except JsonError as error:
            raise InputError(f"{name}: {error}") from None
        yield from ((f"record {n}", record) for n, record in enumerate(records, 1))
        return
    for n, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            yield f"line {n}", _parse(line)


def _parse(line: bytes) -> Any:
    """A JSON value, or the InputError that says why there is none."""
    try:
        return parse_json(line)
    except JsonError as error:
        return error
