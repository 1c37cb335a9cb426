"""A checkpoint's weight files, read one tensor at a time."""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, cast

import mlx.core as mx

from ..errors import AvgMlxError, InputError
from ..files import read_json

Shape = tuple[int, ...]


class Shards(Protocol):
    """A checkpoint's tensors, read on demand."""

    shapes: dict[str, Shape]

    def read(self, name: str) -> mx.array: ...


def load_arrays(file: Path) -> dict[str, mx.array]:
    """The arrays of a safetensors file, lazily."""
    try:
        return cast(dict[str, mx.array], mx.load(str(file)))
    except RuntimeError as error:  # of a type that MLX has not
        raise InputError(f"{file} cannot be loaded ({error}); get it in float16, bfloat16 or float32") from error


class SafetensorsShards:
    """Safetensors files; headers are checked against file lengths when opened."""

    def __init__(self, files: Iterable[Path]):
        from safetensors import SafetensorError, safe_open

        self.files = list(files)
        self.shapes: dict[str, Shape] = {}
        self._file_of: dict[str, Path] = {}
        for file in self.files:
            try:
                with safe_open(file, framework="numpy") as shard:
                    for name in shard.keys():  # noqa: SIM118 - not a mapping
                        self.shapes[name] = tuple(shard.get_slice(name).get_shape())
                        self._file_of[name] = file
            except (SafetensorError, OSError) as error:
                raise InputError(f"{file} is truncated or damaged ({error}); download it again") from error

    def read(self, name: str) -> mx.array:
        # Loaded anew each time: arrays are lazy, and a kept one would hold its data once it is evaluated.
        return load_arrays(self._file_of[name])[name]


class PickledShards:
    """`pytorch_model*.bin`, mapped into memory; pickled code is never run."""

    def __init__(self, files: Iterable[Path]):
        try:
            import torch
        except ImportError:
            raise AvgMlxError(
                "pickled .bin shards need PyTorch to read them; pip install 'avg-mlx[torch]', then convert again"
            ) from None
        self.shapes: dict[str, Shape] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        for file in files:
            try:
                tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                self.shapes |= {name: tuple(tensor.shape) for name, tensor in tensors.items()}
                self._tensors |= tensors
            except Exception as error:  # UnpicklingError, RuntimeError, EOFError and more
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise InputError(
                    f"{file} cannot be read as plain tensors ({reason}); get it in safetensors form"
                ) from error

    def read(self, name: str) -> mx.array:
        import torch

        tensor = self._tensors[name].contiguous()
        if tensor.dtype == torch.bfloat16:  # NumPy has no such type
            return mx.array(tensor.view(torch.int16).numpy()).view(mx.bfloat16)
        return mx.array(tensor.numpy())


def open_shards(folder: Path) -> Shards:
    """The weights of a checkpoint folder, by index or by usual names; InputError if there are none."""
    for kind, index, pattern in (
        (SafetensorsShards, "model.safetensors.index.json", "*.safetensors"),
        (PickledShards, "pytorch_model.bin.index.json", "pytorch_model*.bin"),
    ):
        if (folder / index).is_file():
            return kind(_indexed_files(folder / index))
        if files := sorted(folder.glob(pattern)):
            return kind(files)
    raise InputError(f"{folder} has no weights; expected *.safetensors or pytorch_model*.bin")


def _indexed_files(index: Path) -> list[Path]:
    try:
        files = [index.parent / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    except (KeyError, AttributeError, TypeError) as error:
        raise InputError(
            f"{index} is not an index of shards: it has no weight_map of file names; get it again"
        ) from error
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise InputError(f"{index} names absent files: {', '.join(absent)}; download them into {index.parent}")
    return files
