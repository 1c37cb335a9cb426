"""Which checkpoints are on this machine: in folders here, in the Hub's cache, and the demo model.

Only configs, headers and sizes of files are read, and MLX is not loaded.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import CLIP, Config, form_of, tower_type
from ..errors import InputError, listing, printable, problem, shown
from ..files import read_json
from .demo import DEMO, demo_model
from .quantization import DTYPES, Dtype, widths
from .weight_files import WeightFiles, absent_files, opened, weight_files


@dataclass(frozen=True)
class Place:
    """Where a checkpoint may lie, and what it is called wherever a model is asked for."""

    folder: Path
    name: str  # a path, a Hub repository as owner/name, or demo
    cached: bool = False  # it is a snapshot in the Hub's cache
    revision: str | None = None  # the snapshot's commit, unless it is that of the main branch

    @property
    def title(self) -> str:
        """The name, and the beginning of the revision."""
        return f"{self.name}@{self.revision[:8]}" if self.revision else self.name


@dataclass(frozen=True)
class Checkpoint:
    """A LLaVA that can be run if it is converted, and otherwise be converted."""

    place: Place
    family: str
    converted: bool
    text_model: str  # such as llama or mistral
    bits: tuple[int, ...]  # of the language model's weights, if they are quantized; several in a mixture
    dtype: Dtype | None  # of all others, if the config says so
    bytes: int  # of the weight files
    has_router: bool | None  # None: only unpickling the weights would tell


def find_checkpoints(folders: Iterable[str | Path] = (".",)) -> tuple[list[Checkpoint], list[str]]:
    """Return the checkpoints in `folders`, in their direct subfolders and in the Hub's cache, and the demo at the end.

    Also returns a line for each one that is damaged, incomplete or quantized by others. What is no LLaVA is passed
    over. Raises InputError if one of `folders` is no folder.
    """
    found: dict[str, Checkpoint] = {}
    problems: dict[str, str] = {}
    for place in (*_local(folders), *_cached(), Place(demo_model(), DEMO)):
        where = os.path.realpath(place.folder)
        if where in found or where in problems:
            continue
        try:
            if checkpoint := examine(place):
                found[where] = checkpoint
        except (InputError, OSError) as error:
            problems[where] = problem(place.title, error)
    return list(found.values()), list(problems.values())


def _local(folders: Iterable[str | Path]) -> Iterator[Place]:
    """Yield each folder and its direct subfolders, but for hidden ones."""
    for given in folders:
        folder = Path(os.path.expanduser(given))
        if not os.path.isdir(folder):
            raise InputError(f"{printable(folder)} is not a folder; give folders in which models may lie")
        inside = (
            entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".") and os.path.isdir(entry)
        )
        for place in (folder, *inside):
            name = str(place)
            # The demo's name and an option's would not be taken for a folder's.
            yield Place(place, f"./{name}" if name == DEMO or name.startswith("-") else name)


def _cached() -> Iterator[Place]:
    """Yield the snapshots in the Hub's cache.

    huggingface_hub.scan_cache_dir passes over a repository in which any link is broken, or whose newest download has
    not yet begun, though another of its snapshots may be whole.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    for repo in sorted(Path(HF_HUB_CACHE).expanduser().glob("models--*--*")):
        name = "/".join(repo.name.split("--", 2)[1:])
        try:
            main = (repo / "refs" / "main").read_text()
        except (OSError, UnicodeDecodeError):
            main = None
        commits = {snapshot.name for snapshot in (repo / "snapshots").glob("*") if os.path.isdir(snapshot)}
        for commit in sorted(commits | ({main} if main else set()), key=lambda commit: (commit != main, commit)):
            yield Place(repo / "snapshots" / commit, name, cached=True, revision=None if commit == main else commit)


def examine(place: Place) -> Checkpoint | None:
    """Look at one folder. Returns None if there is no LLaVA that could be run.

    Raises InputError if it is incomplete or damaged, or if its weights were quantized by others.
    """
    folder = place.folder
    if not os.path.isfile(folder / "config.json"):
        if place.cached and "llava" in place.name.lower():  # a download that has only begun has nothing but its name
            raise _incomplete(place, ["config.json"])
        return None
    keys = read_json(folder / "config.json")
    form = form_of(keys)
    text = keys["text_config"] if form == "hub" else keys
    if not isinstance(text, dict):
        raise InputError(f"text_config is {shown(text)}, expected an object; download it again")
    if form is None or (form == "hub" and tower_type(keys) != CLIP) or (form == "authors" and not _names_clip(keys)):
        return None
    config = Config.from_dict(keys) if form == "converted" else None
    quantization = keys.get("quantization")
    if config is None and (quantization or keys.get("quantization_config")):
        raise InputError("its weights are quantized by others; get the original, which convert -q quantizes")
    if absent := absent_files(folder):
        raise _incomplete(place, absent)
    weights = weight_files(folder)
    assert weights is not None  # or they would be absent
    names = _tensor_names(weights)
    dtypes = [keys.get(name) for keys in (keys, text) for name in ("dtype", "torch_dtype")]
    return Checkpoint(
        place,
        family=_family(keys),
        converted=config is not None,
        text_model=_text_model(text.get("model_type")),
        bits=tuple(widths(quantization)) if config and quantization else (),
        dtype=next((dtype for dtype in DTYPES if dtype in dtypes), None),
        bytes=sum(os.path.getsize(path) for path in weights.paths),
        has_router=config.has_router if config else _has_router(names),
    )


def _incomplete(place: Place, absent: list[str]) -> InputError:
    revision = f" --revision {place.revision}" if place.revision else ""
    remedy = f"complete it with: hf download {place.name}{revision}" if place.cached else "copy or download it again"
    return InputError(f"it lacks {listing(absent)}; {remedy}")


def _names_clip(keys: Mapping[str, Any]) -> bool:
    """Whether the vision tower in the authors' layout may be a CLIP."""
    tower = keys.get("mm_vision_tower")
    return isinstance(tower, str) and "siglip" not in tower.lower()


def _family(keys: Mapping[str, Any]) -> str:
    if "matryoshka_vis_token_scale" in keys:
        return "Matryoshka M3"
    if "vis_token_granularity" in keys:
        return "AVG-LLaVA"
    anyres = keys["model_type"] == "llava_next" or keys.get("image_aspect_ratio") == "anyres"
    return "LLaVA-NeXT" if anyres else "LLaVA-1.5"


def _text_model(model_type: object) -> str:
    """Return the language model's kind, which both the authors and the Hub leave out where it was the first one."""
    return "llama" if model_type in (None, "llava") else str(model_type).removeprefix("llava_")


def _tensor_names(weights: WeightFiles) -> set[str]:
    """Return what the tensors are called: none for pickles without an index. InputError for a truncated file."""
    names = set(weights.tensors)
    for path in [] if weights.pickled else weights.paths:
        with opened(path) as tensors:
            names |= set(tensors.keys())
    return names


def _has_router(names: set[str]) -> bool | None:
    """Whether there is a router among tensors that are not converted; it has the same names in either layout."""
    return any(name.startswith("model.router.") for name in names) if names else None
