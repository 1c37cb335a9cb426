"""Files that are read within limits, with errors that name them, and that appear only when they are complete."""

import codecs
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import InputError, printable

MAX_OBJECT = 4 << 20  # bytes of a JSON file that describes something; an index of 20,000 tensors has 2 MB
MAX_TOKENIZER = 64 << 20  # bytes; the tokenizers of a million tokens have about 40 MB
MAX_DATA = 4 << 30  # bytes of samples, questions or results; a million conversations have about 1.5 GB
MAX_DEPTH = 64  # lists and objects inside each other
MAX_DIGITS = 300  # of a whole number; more would not fit into a float

# Where escaped backslashes are replaced: the escape of a surrogate whose other half does not stand beside it.
HALF_CHARACTER = re.compile(rb"\\ud[89ab]..(?!\\ud[c-f])|(?<!\\ud[89ab]..)\\ud[c-f]", re.IGNORECASE)


def read_file(file: Path, remedy: str, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes, without waiting for a pipe or a device.

    Raises FileNotFoundError if there is nothing, and otherwise an InputError that ends with `remedy`.
    """
    try:
        # Without O_NONBLOCK, opening a pipe would wait for somebody to write into it.
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL or half a character in the path
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {printable(file)} ({reason}); {remedy}") from None
    try:
        _check_status(file, os.fstat(descriptor), remedy, limit)
    except InputError:
        os.close(descriptor)
        raise
    with open(descriptor, "rb") as stream:
        try:
            content = stream.read(limit + 1)
        except OSError as error:
            raise InputError(f"cannot read {printable(file)} ({error.strerror}); {remedy}") from None
    if len(content) > limit:  # files of /proc say that they have no size
        raise InputError(too_large(printable(file), len(content), limit, remedy))
    return content


def check_file(file: Path, remedy: str, limit: int) -> None:
    """Raise InputError if a file that somebody else will read is a pipe or a device, or larger than `limit` bytes."""
    try:
        status = file.stat()
    except OSError as error:
        raise InputError(f"cannot read {printable(file)} ({error.strerror}); {remedy}") from None
    _check_status(file, status, remedy, limit)


def _check_status(file: Path, status: os.stat_result, remedy: str, limit: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device or a pipe"
        raise InputError(f"{printable(file)} is {kind}; {remedy}")
    if status.st_size > limit:
        raise InputError(too_large(printable(file), status.st_size, limit, remedy))


def too_large(name: str, size: int, limit: int, remedy: str) -> str:
    """Say that something has too many bytes."""
    return f"{name} has {size >> 20} MB, above the limit of {limit >> 20} MB; {remedy}"


def read_json(
    file: Path, remedy: str = "download it again", *, limit: int = MAX_OBJECT, own: bool = False
) -> dict[str, Any]:
    """Return the object in a JSON file. InputError, with what to do, if the file is damaged or holds no object.

    A file that is missing is taken for a sign that its folder is not a model folder. own: as in `parse_json`.
    """
    name = printable(file)
    try:
        content = parse_json(read_file(file, remedy, limit), own)
    except FileNotFoundError:
        raise InputError(
            f"{printable(file.parent)} is not a model folder: it has no {file.name}; check the path"
        ) from None
    except JsonError as error:
        raise InputError(f"{name} is {error}; {remedy}") from None
    if not isinstance(content, dict):
        raise InputError(f"{name} holds a {type(content).__name__}, expected an object; {remedy}")
    return content


class JsonError(InputError):
    """What is read as JSON is not; the text begins with "not"."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"an object has the key {printable(repr(twice), 80)} twice")
    return found


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _refused_constant(name: str) -> float:
    raise ValueError(f"{name} instead of a number")


# A decoder is made once, since making it takes longer than reading a short line.
STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_int=_whole_number, parse_constant=_refused_constant)
LENIENT = json.JSONDecoder(object_pairs_hook=_object, parse_int=_whole_number)


def parse_json(content: bytes, own: bool = False) -> Any:
    """Return a JSON value.

    Raises JsonError for what is not UTF-8 or not JSON; for more than MAX_DEPTH levels and numbers of more than
    MAX_DIGITS digits, with which other code would fail; and for an object that has a key twice. own: it was written
    here by `json.dumps`, and may hold NaN, Infinity and half a character (a lone surrogate), which are refused in
    anything else.
    """
    too_deep = f"not JSON that can be read (more than {MAX_DEPTH} levels deep)"
    try:
        value = (LENIENT if own else STRICT).decode(content.removeprefix(codecs.BOM_UTF8).decode())
    except UnicodeDecodeError as error:
        raise JsonError(f"not UTF-8 text ({error.reason} at byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise JsonError(f"not valid JSON ({error.msg} at {line}column {error.colno})") from None
    except RecursionError:
        raise JsonError(too_deep) from None
    except ValueError as error:  # from the functions above
        raise JsonError(f"not JSON that can be read ({error})") from None
    if content.count(b"[") + content.count(b"{") > MAX_DEPTH and _is_deep(value):
        raise JsonError(too_deep)
    if not own and b"\\u" in content and HALF_CHARACTER.search(content.replace(rb"\\", b"_")):
        raise JsonError("not UTF-8 text (half a character)")
    return value


def _is_deep(value: Any) -> bool:
    """Whether more than MAX_DEPTH lists and objects lie inside each other. Looks at a level at a time."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) in (dict, list)
        ]
        if not level:
            return False
    return True


@contextmanager
def replacing(file: Path, tag: str = "") -> Iterator[Path]:
    """Give a hidden path to write to, which takes the place of `file` at the end, or goes away after an error.

    Processes that write the same file at the same time need different tags.
    """
    partial = file.with_name(f".partial-{tag}{file.name}")
    try:
        yield partial
        settle(partial)
        partial.replace(file)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:  # as when a disk is full
            error.filename = str(file)
        raise


def settle(file: Path) -> None:
    """Wait until a file's content is on the disk, so that a power loss leaves no name without it."""
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())


def write_text(file: Path, text: str) -> None:
    """Write a whole text file, or leave the one that was there."""
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write an object as an indented JSON file, or leave the file that was there."""
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
