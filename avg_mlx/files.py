"""JSON files, read with errors that name them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import InputError


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; InputError if there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file.parent} is not a model folder: it has no {file.name}; check the path") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as JSON ({error}); get it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds a {type(content).__name__}, expected an object; get it again")
    return content


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
