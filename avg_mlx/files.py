"""Files that are read with errors that name them, and that appear only when they are complete."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import InputError


def read_json(file: Path, remedy: str = "download it again") -> dict[str, Any]:
    """Return the object in a JSON file. InputError, with what to do, if the file is damaged or holds no object.

    A file that is missing is taken for a sign that its folder is not a model folder.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file.parent} is not a model folder: it has no {file.name}; check the path") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as JSON ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds a {type(content).__name__}, expected an object; {remedy}")
    return content


@contextmanager
def replacing(file: Path, tag: str = "") -> Iterator[Path]:
    """Give a hidden path to write to, which takes the place of `file` at the end, or goes away after an error.

    Processes that write the same file at the same time need different tags.
    """
    partial = file.with_name(f".partial-{tag}{file.name}")
    try:
        yield partial
        partial.replace(file)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # as when a disk is full
            error.filename = str(file)
        raise


def write_text(file: Path, text: str) -> None:
    """Write a whole text file, or leave the one that was there."""
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write an object as an indented JSON file, or leave the file that was there."""
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
