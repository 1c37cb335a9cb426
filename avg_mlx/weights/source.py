"""What a conversion reads: an AVG-LLaVA checkpoint in the authors' layout, or a converted folder."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..config import KNOWN_TOWERS, MODEL_TYPE
from ..errors import AvgMlxError, InputError
from ..files import read_json
from ..model.avg_llava import Model
from ..model.inventory import shapes_of
from .checkpoint import check_shapes, find_folder
from .pytorch import TOWER, UNUSED, Origin, TowerShards, origin
from .shards import Shards, open_shards

HUB_FILES = ["*.json", "*.safetensors", "*.bin", "tokenizer.model"]


@dataclass(frozen=True)
class Source:
    """A checkpoint whose tensors are read by our names, one at a time."""

    folder: Path
    keys: dict[str, Any]  # the config, with the vision tower's and whether there is a router
    shards: Sequence[Shards]
    converted: bool

    @property
    def names(self) -> set[str]:
        """Of all stored tensors, as the files call them."""
        return {name for shards in self.shards for name in shards.shapes}

    def read(self, name: str) -> mx.array:
        """Our tensor `name`, lazily."""
        place = self._origin(name)
        shards = next(shards for shards in self.shards if place.name in shards.shapes)
        return place.take(shards.read(place.name))

    def check(self, model: Model) -> None:
        """Raise InputError that lists all tensors that `model` lacks, or has no use for, or has otherwise shaped."""
        places = [(self._origin(name), shape) for name, shape in shapes_of(model).items()]
        expected = {place.name: place.shape(shape) for place, shape in places}
        found = {name: shape for shards in self.shards for name, shape in shards.shapes.items()}
        unused = UNUSED if not model.config.text["tie_word_embeddings"] else re.compile(rf"{UNUSED.pattern}|^lm_head\.")
        useful = {name: shape for name, shape in found.items() if name in expected or not unused.search(name)}
        check_shapes(self.folder, expected, useful)

    def _origin(self, name: str) -> Origin:
        return Origin(name) if self.converted else origin(name)


def open_source(path_or_repo: str | Path, revision: str | None = None) -> Source:
    """Find a checkpoint, its vision tower's config and, where its shards lack them, the tower's weights."""
    folder = find_folder(path_or_repo, revision, HUB_FILES)
    keys = read_json(folder / "config.json")
    if keys.get("model_type") != MODEL_TYPE:
        raise InputError(
            f"{folder} is a model of type {keys.get('model_type')!r}, expected {MODEL_TYPE!r}: an AVG-LLaVA checkpoint"
        )
    shards = open_shards(folder)
    if "vision_config" in keys:
        return Source(folder, keys, [shards], converted=True)
    name = keys.get("mm_vision_tower")
    if not isinstance(name, str):
        raise InputError(f"{folder}/config.json has no mm_vision_tower, which names the vision tower; get it again")
    keys["vision_config"] = _tower_config(folder, name)
    keys["router_select"] = any(tensor.startswith("model.router.") for tensor in shards.shapes)
    if any(tensor.startswith(TOWER) for tensor in shards.shapes):
        return Source(folder, keys, [shards], converted=False)
    return Source(folder, keys, [shards, TowerShards(open_shards(_tower_folder(folder, name)))], converted=False)


def _tower_config(folder: Path, name: str) -> dict[str, Any]:
    """The keys of a tower beside the checkpoint, of a known one, or of one on the Hub, with its pixel statistics."""
    if name in KNOWN_TOWERS and not (folder / name).is_dir():
        return dict(KNOWN_TOWERS[name])
    tower = _tower_folder(folder, name, ["*.json"])
    keys = read_json(tower / "config.json")
    if isinstance(keys.get("vision_config"), dict):  # a whole CLIP's
        keys = keys["vision_config"]
    if keys.get("model_type", "clip_vision_model") != "clip_vision_model":
        raise InputError(f"the vision tower {name} is a {keys['model_type']!r}, expected a CLIP vision tower")
    if (tower / "preprocessor_config.json").is_file():
        processor = read_json(tower / "preprocessor_config.json")
        keys |= {key: processor[key] for key in ("image_mean", "image_std") if key in processor}
    return keys


def _tower_folder(folder: Path, name: str, patterns: list[str] = HUB_FILES) -> Path:
    if (folder / name).is_dir():
        return folder / name
    try:
        return find_folder(name, patterns=patterns)
    except AvgMlxError as error:
        raise InputError(
            f"unknown vision tower {name}: not a folder in {folder}, not one of {', '.join(KNOWN_TOWERS)}; {error}"
        ) from error
