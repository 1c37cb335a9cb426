"""The weight files of a model folder, read one tensor at a time."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol, cast

import mlx.core as mx

from ..errors import AvgMlxError, InputError, listing, printable
from ..files import MAX_OBJECT, read_json

Shape = tuple[int, ...]


class Shards(Protocol):
    """The tensors of some weight files, each read on demand."""

    shapes: dict[str, Shape]

    def read(self, name: str) -> mx.array:
        """Return a tensor; from safetensors files it is lazy."""


def load_arrays(file: Path) -> dict[str, mx.array]:
    """Return the arrays of a safetensors file, which stay on disk until they are used."""
    try:
        return cast(dict[str, mx.array], mx.load(str(file)))
    except RuntimeError as error:  # a data type that MLX does not have
        raise InputError(f"{file} cannot be loaded ({error}); get it in float16, bfloat16 or float32") from error


class SafetensorsShards:
    """Safetensors files, whose headers are checked against the files' lengths when they are opened."""

    def __init__(self, files: Iterable[Path], prefix: str = ""):
        from safetensors import SafetensorError, safe_open

        self.files = list(files)
        self.shapes: dict[str, Shape] = {}
        self._prefix = prefix
        self._file_of: dict[str, Path] = {}
        for file in self.files:
            try:
                with file.open("rb") as stream:
                    header = int.from_bytes(stream.read(8), "little")
                if header > MAX_OBJECT:  # the library's own limit lets a million tensors in
                    raise SafetensorError(f"a header of {header} bytes")
                with safe_open(file, framework="numpy") as shard:
                    names = shard.keys()
                    shapes = {prefix + name: tuple(shard.get_slice(name).get_shape()) for name in names}
            except (SafetensorError, OSError) as error:
                reason = printable(error)
                raise InputError(f"{file} is truncated or damaged ({reason}); download it again") from error
            _check_new(file, shapes, self._file_of)
            self.shapes |= shapes
            self._file_of |= dict.fromkeys(shapes, file)

    def read(self, name: str) -> mx.array:
        """Return a lazy tensor."""
        # The file is loaded anew each time, since an array that is kept would hold its data once it is evaluated.
        return load_arrays(self._file_of[name])[name.removeprefix(self._prefix)]


class PickledShards:
    """Files named `pytorch_model*.bin`, mapped into memory. Pickled code in them is never run."""

    def __init__(self, files: Iterable[Path], prefix: str = ""):
        try:
            import torch
        except ImportError:
            raise AvgMlxError(
                "pickled .bin shards need PyTorch to read them; pip install 'avg-mlx[torch]', then convert again"
            ) from None
        self.shapes: dict[str, Shape] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        file_of: dict[str, Path] = {}
        for file in files:
            try:
                tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                tensors = {prefix + name: tensor for name, tensor in tensors.items()}
                shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            except Exception as error:  # UnpicklingError, RuntimeError, EOFError and more
                reason = f"{type(error).__name__}: {error}".partition("\n")[0]
                raise InputError(
                    f"{file} cannot be read as plain tensors ({reason}); get it in safetensors form"
                ) from error
            _check_new(file, shapes, file_of)
            self.shapes |= shapes
            self._tensors |= tensors
            file_of |= dict.fromkeys(shapes, file)

    def read(self, name: str) -> mx.array:
        """Return a tensor that is copied out of the mapped file."""
        import torch

        tensor = self._tensors[name].contiguous()
        if tensor.dtype == torch.bfloat16:  # NumPy has no such type
            return mx.array(tensor.view(torch.int16).numpy()).view(mx.bfloat16)
        return mx.array(tensor.numpy())


def _check_new(file: Path, names: Iterable[str], file_of: Mapping[str, Path]) -> None:
    """Raise InputError if a file has tensors of a name that another one has: nothing says which to take."""
    twice = [name for name in names if name in file_of]
    if twice:
        raise InputError(f"{file_of[twice[0]]} and {file} both hold {listing(twice)}; remove one of the files")


def open_shards(folder: Path, prefix: str = "") -> SafetensorsShards | PickledShards:
    """Open a folder's weights, found by their index or by their usual names. Raises InputError if there are none.

    prefix: what is put before the tensors' names.
    """
    for kind, index, pattern in (
        (SafetensorsShards, "model.safetensors.index.json", "*.safetensors"),
        (PickledShards, "pytorch_model.bin.index.json", "pytorch_model*.bin"),
    ):
        if (folder / index).exists():
            return kind(_indexed_files(folder / index), prefix)
        if files := sorted(folder.glob(pattern)):
            if irregular := [file.name for file in files if not os.path.isfile(file)]:
                raise InputError(f"{folder} has weights that are not files: {listing(irregular)}; download them again")
            return kind(files, prefix)
    raise InputError(f"{folder} has no weights; expected *.safetensors or pytorch_model*.bin")


def _indexed_files(index: Path) -> list[Path]:
    """Return the files that an index names, all of them beside it; each may be a link, as in the Hub's cache."""
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (KeyError, AttributeError, TypeError) as error:
        raise InputError(
            f"{index} is not an index of shards, since it has no weight_map of file names; download it again"
        ) from error
    if outside:
        raise InputError(f"{index} names files that are not beside it: {listing(outside)}; download it again")
    absent = [name for name in names if not os.path.isfile(index.parent / name)]
    if absent:
        raise InputError(f"{index} names absent files: {listing(absent)}; download them into {index.parent}")
    return [index.parent / name for name in names]
