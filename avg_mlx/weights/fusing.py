"""Adapters and router → into the model's own tensors, as a converted folder."""

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_unflatten

from ..files import read_json, write_json
from ..model.inventory import Part, parts_of, tensors_of
from .adapters import load_adapters
from .checkpoint import find_folder, load_model
from .model_card import model_card
from .writing import Progress, appearing, copy_side_files, refuse_existing, write_shards


def fuse(
    model_path: str | Path,
    adapter_path: str | Path,
    save_path: str | Path = "fused_model",
    *,
    dequantize: bool = False,
    progress: Progress = lambda done, total: None,
) -> list[Part]:
    """Write `model_path` with its adapters fused to `save_path`, which must not exist yet.

    Quantized layers are quantized again after fusing, which costs a little of what was learned; dequantize keeps
    them at full precision instead. Returns the model's parts. Raises InputError or AvgMlxError, and then leaves
    nothing behind.
    """
    from mlx_lm.utils import dequantize_model

    destination = Path(save_path).expanduser()
    refuse_existing(destination)
    folder = find_folder(model_path)
    keys = read_json(folder / "config.json")
    model = load_model(folder, keys, lazy=True)
    dtype = model.image_newline.dtype
    load_adapters(model, adapter_path)
    fused = [(name, module.fuse(dequantize)) for name, module in model.named_modules() if hasattr(module, "fuse")]
    model.update_modules(tree_unflatten(fused))
    if dequantize:
        dequantize_model(model)
        keys = {key: value for key, value in keys.items() if key not in ("quantization", "quantization_config")}
    keys["router_select"] = model.config.has_router
    model.set_dtype(dtype)
    parts = parts_of(model)
    total = sum(part.bytes for part in parts)
    tensors = tensors_of(model)
    del model, fused  # so that a shard's arrays are freed once they are written
    with appearing(destination, total) as partial:
        write_shards(partial, _taken(tensors), total, progress)
        copy_side_files(folder, partial)
        (partial / "README.md").write_text(model_card(str(model_path), keys), encoding="utf-8")
        write_json(partial / "config.json", dict(sorted(keys.items())))
    return parts


def _taken(tensors: dict[str, mx.array]) -> Iterator[tuple[str, mx.array]]:
    """Each tensor, given away."""
    while tensors:
        yield tensors.popitem()
