"""The weight files of a model folder: which they are, whether they are all there, and what their headers say."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, listing, printable
from ..files import MAX_OBJECT, read_json

if TYPE_CHECKING:
    from safetensors import safe_open


@dataclass(frozen=True)
class WeightFiles:
    """Weight files of one kind, which may not all be there."""

    folder: Path
    names: list[str]
    pickled: bool
    index: Path | None = None
    tensors: frozenset[str] = frozenset()  # by the index

    @property
    def absent(self) -> list[str]:
        """The names of those that are no files; each may be a link, as in the Hub's cache."""
        return [name for name in self.names if not os.path.isfile(self.folder / name)]

    @property
    def paths(self) -> list[Path]:
        """The files. Raises InputError if some are absent."""
        if (absent := self.absent) and self.index:
            raise InputError(f"{self.index} names absent files: {listing(absent)}; download them into {self.folder}")
        if absent:
            raise InputError(f"{self.folder} has weights that are not files: {listing(absent)}; download them again")
        return [self.folder / name for name in self.names]


def absent_files(folder: Path, weights: bool = True) -> list[str]:
    """Name what is missing of a download that was interrupted, as far as the config and the weights' index tell.

    weights: whether it needs any. Raises InputError if the index is damaged.
    """
    if not os.path.isfile(folder / "config.json"):
        return ["config.json"]
    if not weights:
        return []
    found = weight_files(folder)
    return found.absent if found else ["*.safetensors"]


def weight_files(folder: Path) -> WeightFiles | None:
    """Return a folder's weight files, found by their index or by their usual names, safetensors first.

    Raises InputError if the index is damaged.
    """
    for pickled, index, pattern in (
        (False, "model.safetensors.index.json", "*.safetensors"),
        (True, "pytorch_model.bin.index.json", "pytorch_model*.bin"),
    ):
        if (folder / index).exists():
            return _indexed(folder / index, pickled)
        if names := sorted(file.name for file in folder.glob(pattern)):
            return WeightFiles(folder, names, pickled)
    return None


def _indexed(index: Path, pickled: bool) -> WeightFiles:
    """Return the files that an index names, all of them beside it."""
    try:
        places = read_json(index)["weight_map"]
        names = sorted(set(places.values()))
        outside = [name for name in names if Path(name).name != name]
    except (KeyError, AttributeError, TypeError) as error:
        raise InputError(
            f"{index} is not an index of shards, since it has no weight_map of file names; download it again"
        ) from error
    if outside:
        raise InputError(f"{index} names files that are not beside it: {listing(outside)}; download it again")
    return WeightFiles(index.parent, names, pickled, index, frozenset(places))


@contextmanager
def opened(file: Path) -> Iterator["safe_open"]:
    """Open a safetensors file, whose header is checked against the file's length; InputError if it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with file.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
        if header > MAX_OBJECT:  # the library's own limit lets a million tensors in
            raise SafetensorError(f"a header of {header} bytes")
        with safe_open(file, framework="numpy") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is truncated or damaged ({printable(error)}); download it again") from error
