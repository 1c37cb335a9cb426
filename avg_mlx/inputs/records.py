"""Data files: the records of a JSON list or of JSON Lines, each with its place in the file."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError, printable


def read_records(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) of a JSON list or a JSON Lines file; a line without JSON yields its InputError instead.

    Raises InputError for a file that cannot be read, and for a list that is not valid JSON.
    """
    yield from parse_records(str(file), read_bytes(file))


def read_bytes(file: Path) -> bytes:
    """Return a data file's content; InputError if it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {file} ({error.strerror}); give a JSON list or a JSON Lines file") from None


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
        records = _parse(content)
        if isinstance(records, InputError):
            raise InputError(f"{name}: {records}")
        yield from ((f"record {n}", record) for n, record in enumerate(records, 1))
        return
    for n, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            yield f"line {n}", _parse(line)


def _parse(content: bytes) -> Any:
    """A JSON value, or the InputError that says why there is none."""
    try:
        value = json.loads(content.decode())
        json.dumps(value, ensure_ascii=False).encode()  # fails at half a character
        return value
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return InputError(f"not valid JSON ({error.msg} at {line}column {error.colno})")
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        return InputError(f"not UTF-8 text ({error.reason}); save it as UTF-8")
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, and very deep nesting
        return InputError(f"not JSON that can be read ({error})")
