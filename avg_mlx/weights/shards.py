"""The weight files of a model folder, read one tensor at a time."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, cast

import mlx.core as mx
import numpy as np

from ..errors import InputError
from ..files import parse_json
from .pickles import PickledShards, check_new
from .weight_files import opened, weight_files

Shape = tuple[int, ...]


class Shards(Protocol):
    """The tensors of some weight files, each read on demand."""

    shapes: dict[str, Shape]
    dtypes: dict[str, str]  # by their usual names: bfloat16, int64, float8_e4m3

    def read(self, name: str) -> mx.array:
        """Return a tensor, float64 as float32; from safetensors files it is lazy."""


def load_arrays(file: Path) -> dict[str, mx.array]:
    """Return the arrays of a safetensors file, which stay on disk until they are used."""
    try:
        return cast(dict[str, mx.array], mx.load(str(file)))
    except RuntimeError as error:  # a data type that MLX does not have
        raise InputError(f"{file} cannot be loaded ({error}); get it in float16, bfloat16 or float32") from error


class SafetensorsShards:
    """Safetensors files, whose headers are checked against the files' lengths when they are opened."""

    def __init__(self, files: Iterable[Path], prefix: str = ""):
        self.files = list(files)
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, str] = {}
        self._prefix = prefix
        self._file_of: dict[str, Path] = {}
        for file in self.files:
            with opened(file) as shard:
                slices = {prefix + name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118
                shapes = {name: tuple(tensor.get_shape()) for name, tensor in slices.items()}
                dtypes = {name: _dtype(tensor.get_dtype()) for name, tensor in slices.items()}
            check_new(file, shapes, self._file_of)
            self.shapes |= shapes
            self.dtypes |= dtypes
            self._file_of |= dict.fromkeys(shapes, file)

    def read(self, name: str) -> mx.array:
        """Return a lazy tensor, or one in memory where its file holds a type that MLX does not have."""
        # The file is loaded anew each time, since an array that is kept would hold its data once it is evaluated.
        file, own_name = self._file_of[name], name.removeprefix(self._prefix)
        try:
            return load_arrays(file)[own_name]
        except InputError:
            return _read_floats(file, own_name)


def _dtype(code: str) -> str:
    """Return the usual name of a type that safetensors spells as in BF16, I64 or F8_E4M3."""
    kinds = {"F": "float", "BF": "bfloat", "I": "int", "U": "uint", "C": "complex"}
    return re.sub(r"^[A-Z]+(?=\d)", lambda letters: kinds.get(letters[0], letters[0]), code).lower()


def _read_floats(file: Path, name: str) -> mx.array:
    """Return a tensor of floats from a safetensors file that MLX refuses for the type of any tensor in it."""
    with file.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
        tensor = parse_json(stream.read(start - 8))[name]
    dtype = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}[tensor["dtype"]]
    array = mx.array(np.memmap(file, dtype, "r", start + tensor["data_offsets"][0], tuple(tensor["shape"])))
    return array.view(mx.bfloat16) if tensor["dtype"] == "BF16" else array


def open_shards(folder: Path, prefix: str = "") -> SafetensorsShards | PickledShards:
    """Open a folder's weights, found by their index or by their usual names. Raises InputError if there are none.

    prefix: what is put before the tensors' names.
    """
    found = weight_files(folder)
    if not found:
        raise InputError(f"{folder} has no weights; expected *.safetensors or pytorch_model*.bin")
    return (PickledShards if found.pickled else SafetensorsShards)(found.paths, prefix)
