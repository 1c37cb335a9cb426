"""A converted folder → the authors' PyTorch layout: names, shapes, shards and index."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import mlx.core as mx

from ..config import KNOWN_TOWERS
from ..errors import InputError
from ..files import write_json
from ..model.inventory import parts_of
from .checkpoint import build_model
from .conversion import converted_tensors, dequantized, preprocessor_config
from .pytorch import origin
from .source import open_source
from .writing import Progress, appearing, copy_side_files, refuse_existing, write_shards

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


def export(model_path: str | Path, save_path: str | Path, *, progress: Progress = lambda done, total: None) -> None:
    """Write a converted folder as an AVG-LLaVA checkpoint for PyTorch to `save_path`, which must not exist yet.

    Quantized layers are dequantized. A vision tower that is not a known one gets its config in a folder beside the
    weights. Converting the result gives the same tensors again. Raises InputError or AvgMlxError, and then leaves
    nothing behind.
    """
    destination = Path(save_path).expanduser()
    refuse_existing(destination)
    source = open_source(model_path)
    if not source.converted:
        raise InputError(f"{source.folder} is in PyTorch's layout already; give a converted folder")
    stored, target = (build_model(source.keys, source.names) for _ in range(2))
    source.check(stored)
    keys = dict(source.keys)
    dtype = getattr(mx, keys["torch_dtype"])
    if "quantization" in keys:
        keys = dequantized(target, keys)
    target.set_dtype(dtype)
    total = sum(part.bytes for part in parts_of(target))
    with appearing(destination, total) as folder:
        tensors = _restacked(converted_tensors(source, stored, target, dtype))
        write_shards(folder, tensors, total, progress, framework="pt")
        copy_side_files(source.folder, folder, TOKENIZER_FILES)
        vision = keys.pop("vision_config")
        if keys["mm_vision_tower"] not in KNOWN_TOWERS:
            keys["mm_vision_tower"] = "vision_tower"
            (folder / "vision_tower").mkdir()
            write_json(folder / "vision_tower" / "config.json", {"model_type": "clip_vision_model", **vision})
            preprocessor = preprocessor_config(target.config.vision)
            write_json(folder / "vision_tower" / "preprocessor_config.json", preprocessor)
        write_json(folder / "config.json", keys)


def _restacked(tensors: Iterable[tuple[str, mx.array]]) -> Iterator[tuple[str, mx.array]]:
    """The tensors under their PyTorch names and in their shapes; queries, keys and values become one again."""
    stacks: dict[str, dict[int, mx.array]] = {}
    for name, array in tensors:
        place = origin(name)
        if place.part is None:
            yield place.name, place.give(array)
            continue
        stack = stacks.setdefault(place.name, {})
        stack[place.part] = array
        if len(stack) == 3:
            yield place.name, mx.concatenate([stack[part] for part in range(3)])
            del stacks[place.name]
