"""Where a model comes from: a folder here or on the Hugging Face Hub, in the authors' layout, the Hub's or ours."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from ..config import HUB_TYPES, KNOWN_TOWERS, form_of
from ..errors import AvgMlxError, InputError, listing, printable, shown
from ..files import read_json
from ..model.avg_llava import Model
from ..model.inventory import dtype_name, tensors_of
from .demo import DEMO, demo_model
from .hub import translated
from .pytorch import AUTHORS_LAYOUT, TOWER, UNUSED, Layout, Origin, hub_layout
from .quantization import DTYPES, Dtype
from .shards import Shards, open_shards
from .weight_files import absent_files

HUB_FILES = ("*.json", "*.jinja", "*.safetensors", "*.bin", "tokenizer.model")
PLAIN = "projector.layers.0.bias"  # a tensor that any model has, and that is never quantized
HEAD = "language_model.lm_head.weight"


def find_folder(path_or_repo: str | Path, revision: str | None = None, patterns: Sequence[str] = HUB_FILES) -> Path:
    """Return a local folder or the demo model's, or download the Hub repository of that name.

    Without a network, or with HF_HUB_OFFLINE=1, it is the Hub's cache that delivers. patterns: the repository's files
    that are needed. Raises InputError if the path is a file or names neither a folder nor a repository, AvgMlxError if
    neither the Hub nor its cache delivers the repository.
    """
    if path_or_repo == DEMO:
        return demo_model()
    folder = Path(os.path.expanduser(path_or_repo))
    if os.path.isdir(folder):  # unlike Path.is_dir, it is false of a name that is too long
        return folder
    if os.path.exists(folder):
        raise InputError(f"{folder} is a file; give the model's folder")
    repo = str(path_or_repo)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo) or repo.startswith("."):
        raise InputError(
            f"there is no folder {printable(repo)}; give a folder, a Hub repository such as owner/name, or demo"
        )
    folder = _download(repo, revision, patterns)
    if absent := absent_files(folder, weights="*.safetensors" in patterns):
        raise AvgMlxError(
            f"{repo} lacks {listing(absent)} in {folder}; if its download was interrupted, run this again online"
        )
    return folder


def _download(repo: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # from the Hub client, the network or the disk
        if "*.bin" in patterns and hasattr(error, "snapshot_path"):
            # Offline, and the cache lacks some of the files. Beside safetensors, pickles are not needed.
            return _download(repo, revision, [pattern for pattern in patterns if pattern != "*.bin"])
        reason = first_line(error)
        raise AvgMlxError(f"there is no folder {repo}, and the Hub did not deliver it ({reason})") from error


@dataclass(frozen=True)
class Source:
    """A checkpoint whose tensors are read by our names, one at a time."""

    folder: Path
    keys: dict[str, Any]  # the config, with the vision tower's in it, and with whether there is a router
    shards: Sequence[Shards]
    layout: Layout | None = None  # None: the names are ours

    @property
    def converted(self) -> bool:
        """Whether it is a folder that this package wrote."""
        return self.layout is None

    @property
    def names(self) -> set[str]:
        """The names of all stored tensors, as the files spell them."""
        return {name for shards in self.shards for name in shards.shapes}

    @property
    def dtype(self) -> Dtype:
        """The type that the config declares, or else the one that an unquantized tensor has."""
        declared = self.keys.get("torch_dtype")
        return cast(Dtype, declared if declared in DTYPES else dtype_name(self.read(PLAIN).dtype))

    def read(self, name: str) -> mx.array:
        """Return our tensor `name`, lazily."""
        place = self._origin(name)
        shards = next(shards for shards in self.shards if place.name in shards.shapes)
        return place.take(shards.read(place.name))

    def check(self, model: Model) -> None:
        """Raise InputError if the tensors are not those of `model`, or have a type that it cannot compute with.

        It lists all that are missing, that have no use in the model, or that have another shape.
        """
        places = [(self._origin(name), array) for name, array in tensors_of(model).items()]
        expected = {place.name: place.shape(array.shape) for place, array in places}
        found = {name: shape for shards in self.shards for name, shape in shards.shapes.items()}
        surplus = found.keys() - expected.keys()
        if not self.converted:
            head = self._origin(HEAD).name if model.config.text["tie_word_embeddings"] else None
            surplus = {name for name in surplus if not UNUSED.search(name) and name != head}
        misshapen = [n for n in sorted(expected.keys() & found.keys()) if expected[n] != found[n]]
        findings = {
            "missing": sorted(expected.keys() - found.keys()),
            "unexpected": sorted(surplus),
            "misshapen": [f"{n} is {found[n]}, expected {expected[n]}" for n in misshapen],
        }
        problems = [f"{len(names)} {kind} ({listing(names, 100)})" for kind, names in findings.items() if names]
        if problems:
            raise InputError(
                f"the tensors of {self.folder} do not fit its config: {'; '.join(problems)}; download it again"
            )
        self._check_dtypes({place.name: array.dtype for place, array in places})

    def _check_dtypes(self, expected: dict[str, mx.Dtype]) -> None:
        """Raise InputError for weights that are not floats, and for packed ones that are not of their type."""
        floats = DTYPES if self.converted else (*DTYPES, "float64")
        dtypes = {name: dtype for shards in self.shards for name, dtype in shards.dtypes.items()}
        wrong = []
        for name, dtype in expected.items():
            allowed = floats if mx.issubdtype(dtype, mx.floating) else (dtype_name(dtype),)
            if dtypes[name] not in allowed:
                wrong.append(f"{name} is {dtypes[name]}, expected {' or '.join(allowed)}")
        if wrong:
            remedy = "convert the checkpoint again" if self.converted else f"get it in {' or '.join(DTYPES)}"
            found = f"{len(wrong)} of the tensors of {self.folder} cannot be computed with"
            raise InputError(f"{found} (the first: {wrong[0]}); {remedy}")

    def _origin(self, name: str) -> Origin:
        return self.layout.origin(name) if self.layout else Origin(name)


def open_source(path_or_repo: str | Path, revision: str | None = None) -> Source:
    """Find a checkpoint, its vision tower's config and, where its own weights lack the tower, the tower's weights.

    Raises InputError if it is not a LLaVA checkpoint that can be run or is damaged, AvgMlxError if the Hub cannot be
    reached.
    """
    folder = find_folder(path_or_repo, revision)
    keys = read_json(folder / "config.json")
    if (how := keys.get("quantization_config")) and "quantization" not in keys:
        method = how.get("quant_method") if isinstance(how, dict) else how
        raise InputError(f"{folder} is quantized by {shown(method)}; give the original, which convert -q quantizes")
    form = form_of(keys)
    if form == "hub":
        keys, shards = translated(folder, keys), open_shards(folder)
        return Source(folder, keys | _has_router(shards), [shards], hub_layout(shards.shapes))
    if form is None:
        raise InputError(
            f"{folder} is a model of type {shown(keys.get('model_type'))}; give a LLaVA checkpoint: "
            f"{', '.join(HUB_TYPES)}, llava_llama, llava_mistral and their like"
        )
    if keys["model_type"] == "llava":  # the authors' first models
        keys["model_type"] = "llava_llama"
    shards = open_shards(folder)
    return Source(folder, keys, [shards]) if form == "converted" else _authors_source(folder, keys, shards)


def _authors_source(folder: Path, keys: dict[str, Any], shards: Shards) -> Source:
    """Complete a config in the authors' layout with its tower's."""
    name = keys.get("mm_vision_tower")
    if not isinstance(name, str):
        raise InputError(f"{folder}/config.json has no mm_vision_tower to name the vision tower; download it again")
    if keys.get("mm_use_im_start_end"):
        raise InputError(f"{folder} has tokens around its images (mm_use_im_start_end), which cannot be run")
    if "matryoshka_vis_token_scale" in keys:  # M3, whose granularities are AVG-LLaVA's by another name
        keys["vis_token_granularity"] = keys["matryoshka_vis_token_scale"]
    has_tower = any(tensor.startswith(TOWER) for tensor in shards.shapes)
    keys |= _has_router(shards)
    known = {} if os.path.isdir(folder / name) else KNOWN_TOWERS.get(name, {})
    if known and has_tower:
        return Source(folder, {**keys, "vision_config": known}, [shards], AUTHORS_LAYOUT)
    tower = _find_tower(folder, name, ("*.json",) if has_tower else HUB_FILES)
    keys["vision_config"] = known or _tower_config(tower)
    both = [shards, *([] if has_tower else [open_shards(tower, TOWER)])]
    return Source(folder, keys, both, AUTHORS_LAYOUT)


def _has_router(shards: Shards) -> dict[str, bool]:
    return {"router_select": any(name.startswith("model.router.") for name in shards.shapes)}


def _find_tower(folder: Path, name: str, patterns: Sequence[str]) -> Path:
    """Return the folder of a vision tower, which lies in the checkpoint's `folder` or on the Hub."""
    if os.path.isdir(folder / name):
        return folder / name
    if "siglip" in name.lower():
        raise InputError(f"the vision tower is {printable(name)}, a SigLIP, but only CLIP's can be run")
    try:
        return find_folder(name, patterns=patterns)
    except AvgMlxError as error:
        raise InputError(
            f"unknown vision tower {printable(name)}: not a folder in {folder}, "
            f"not one of {', '.join(KNOWN_TOWERS)}; {error}"
        ) from error


def _tower_config(tower: Path) -> dict[str, Any]:
    """Return a vision tower's config, with the pixels' mean and deviation of its image processor."""
    keys = read_json(tower / "config.json")
    if isinstance(keys.get("vision_config"), dict):  # a whole CLIP's
        keys = keys["vision_config"]
    if keys.get("model_type", "clip_vision_model") != "clip_vision_model":
        raise InputError(
            f"the vision tower {tower} is a {shown(keys['model_type'])}; give a checkpoint with a CLIP tower"
        )
    if (tower / "preprocessor_config.json").exists():
        processor = read_json(tower / "preprocessor_config.json")
        keys |= {key: processor[key] for key in ("image_mean", "image_std") if key in processor}
    return keys


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its type where it has no text."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
