"""A converted folder becomes a checkpoint for PyTorch again, in the layout that it came from."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..config import KNOWN_TOWERS, VisionConfig
from ..errors import InputError
from ..model.inventory import sizes_of
from ..progress import Progress, silent
from .hub import hub_files
from .pytorch import AUTHORS_LAYOUT, HUB_LAYOUT, Layout
from .recasting import Recasting
from .side_files import PROCESSOR, copies, preprocessor_config
from .source import open_source
from .writing import Content, free_path, write_folder

TOWER_FOLDER = "vision_tower"


def export(model_path: str | Path, save_path: str | Path, *, progress: Progress = silent) -> None:
    """Write a converted folder as a checkpoint for PyTorch to `save_path`, which must not exist yet.

    The layout is that which the model was converted from. Quantized layers are dequantized. Converting the result gives
    the same tensors again. Raises InputError or AvgMlxError, and then leaves nothing behind.
    """
    destination = free_path(save_path)
    source = open_source(model_path)
    if not source.converted:
        raise InputError(f"{source.folder} is in PyTorch's layout already; give a converted folder")
    result = Recasting(source, dtype=None, dequantized="quantization" in source.keys, quantization=None)
    vision = result.target.config.vision
    if result.target.config.layout == "transformers":
        layout, files = HUB_LAYOUT, hub_files(source.folder, result.keys, vision)
    else:
        layout, files = AUTHORS_LAYOUT, _authors_files(source.folder, result.keys, vision)
    sizes: Counter[str] = Counter()
    for name, size in sizes_of(result.target).items():
        sizes[layout.origin(name).name] += size
    write_folder(destination, files, _restacked(layout, result.tensors()), sizes, progress=progress, framework="pt")


def _authors_files(folder: Path, keys: Mapping[str, Any], vision: VisionConfig) -> dict[str, Content]:
    """Return the files beside the weights. A vision tower that is not a known one gets a folder for its config."""
    files, keys = copies(folder), dict(keys)
    tower = keys.pop("vision_config")
    if keys["mm_vision_tower"] not in KNOWN_TOWERS:
        keys["mm_vision_tower"] = TOWER_FOLDER
        files[f"{TOWER_FOLDER}/config.json"] = {"model_type": "clip_vision_model", **tower}
        files[f"{TOWER_FOLDER}/{PROCESSOR}"] = preprocessor_config(vision)
    return files | {"config.json": keys}


def _restacked(layout: Layout, tensors: Iterable[tuple[str, mx.array]]) -> Iterator[tuple[str, mx.array]]:
    """Yield the tensors under their PyTorch names and in their shapes; query, key and value become one again."""
    stacks: dict[str, dict[int, mx.array]] = {}
    for name, array in tensors:
        place = layout.origin(name)
        if place.part is None:
            yield place.name, place.give(array)
            continue
        stack = stacks.setdefault(place.name, {})
        stack[place.part] = array
        if len(stack) == 3:
            yield place.name, mx.concatenate([stack[part] for part in range(3)])
            del stacks[place.name]
