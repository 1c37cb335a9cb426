"""A converted folder becomes a checkpoint in the authors' PyTorch layout: their names, shapes and config."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import mlx.core as mx

from ..config import KNOWN_TOWERS
from ..errors import InputError
from ..model.inventory import sizes_of
from ..progress import Progress, silent
from .pytorch import origin
from .recasting import Recasting
from .side_files import PROCESSOR, copies, preprocessor_config
from .source import open_source
from .writing import free_path, write_folder

TOWER_FOLDER = "vision_tower"


def export(model_path: str | Path, save_path: str | Path, *, progress: Progress = silent) -> None:
    """Write a converted folder as an AVG-LLaVA checkpoint for PyTorch to `save_path`, which must not exist yet.

    Quantized layers are dequantized. A vision tower that is not a known one gets its config in a folder beside the
    weights. Converting the result gives the same tensors again. Raises InputError or AvgMlxError, and then leaves
    nothing behind.
    """
    destination = free_path(save_path)
    source = open_source(model_path)
    if not source.converted:
        raise InputError(f"{source.folder} is in PyTorch's layout already; give a converted folder")
    result = Recasting(source, dtype=None, dequantized="quantization" in source.keys, quantization=None)
    files = copies(source.folder)
    keys = dict(result.keys)
    vision = keys.pop("vision_config")
    if keys["mm_vision_tower"] not in KNOWN_TOWERS:
        keys["mm_vision_tower"] = TOWER_FOLDER
        files[f"{TOWER_FOLDER}/config.json"] = {"model_type": "clip_vision_model", **vision}
        files[f"{TOWER_FOLDER}/{PROCESSOR}"] = preprocessor_config(result.target.config.vision)
    files["config.json"] = keys
    sizes: Counter[str] = Counter()
    for name, size in sizes_of(result.target).items():
        sizes[origin(name).name] += size
    write_folder(destination, files, _restacked(result.tensors()), sizes, progress=progress, framework="pt")


def _restacked(tensors: Iterable[tuple[str, mx.array]]) -> Iterator[tuple[str, mx.array]]:
    """Yield the tensors under their PyTorch names and in their shapes; query, key and value become one again."""
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
