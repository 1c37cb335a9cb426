"""Adapters and a trained router become part of the model's own tensors, in a new converted folder."""

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_unflatten

from ..files import read_json
from ..model.inventory import Part, parts_of, sizes_of, tensors_of
from ..progress import Progress, silent
from .adapters import load_adapters
from .checkpoint import load_model
from .quantization import dequantize as dequantize_all
from .side_files import converted_files
from .source import find_folder
from .writing import free_path, write_folder


def fuse(
    model_path: str | Path,
    adapter_path: str | Path,
    save_path: str | Path = "fused_model",
    *,
    dequantize: bool = False,
    progress: Progress = silent,
) -> list[Part]:
    """Write `model_path` with its adapters fused to `save_path`, which must not exist yet.

    Quantized layers are quantized again after fusing, which costs a little of what was learned; `dequantize` keeps
    them at full precision instead. Returns the model's parts. Raises InputError or AvgMlxError, and then leaves
    nothing behind.
    """
    destination = free_path(save_path)
    folder = find_folder(model_path)
    keys = read_json(folder / "config.json")
    model = load_model(folder, keys, lazy=True)
    dtype = model.dtype
    load_adapters(model, adapter_path)
    fused = [(name, module.fuse(dequantize)) for name, module in model.named_modules() if hasattr(module, "fuse")]
    model.update_modules(tree_unflatten(fused))
    if dequantize:
        keys = dequantize_all(model, keys)
    keys["router_select"] = model.config.has_router
    model.set_dtype(dtype)
    files, parts, sizes = converted_files(folder, model_path, keys), parts_of(model), sizes_of(model)
    tensors = tensors_of(model)
    del model, fused  # so that a shard's arrays are freed once they are written
    write_folder(destination, files, _given_away(tensors), sizes, progress=progress)
    return parts


def _given_away(tensors: dict[str, mx.array]) -> Iterator[tuple[str, mx.array]]:
    """Yield each tensor, and keep none of those that were yielded."""
    for name in list(tensors):
        yield name, tensors.pop(name)
