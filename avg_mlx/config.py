"""The architecture, parsed once from a checkpoint's own keys, without MLX.

A config may come from strangers. What it says in numbers is bounded here, far above all published models, so that the
unloaded model can be built in a moment. Its tensors are then compared with the weight files, before they take memory.
"""

import ast
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from .config_values import at_most, check_types, one_of
from .errors import InputError, shown
from .geometry import (
    ImageGeometry,
    Pair,
    best_resolution,
    image_geometry,
    poolings,
    token_grid,
    visual_token_count,
)

MODEL_TYPE = re.compile(r"llava_([a-z0-9_]{1,40})")  # the authors' way to name the language model, by mlx-lm's name
HUB_TYPES = {"llava_next": "LlavaNext", "llava": "Llava"}  # and how transformers' classes begin
LAYOUTS = ("llava", "transformers")  # where a checkpoint comes from: its authors' code, or the Hub's conversions
CLIP = "clip_vision_model"
ASPECTS = ("anyres", "pad", "crop")  # crop, which is transformers' alone: the middle of the image, as high as a crop

MAX_COUNT = 1024  # of heads, layers, experts and whatever else a key's name counts
MAX_LAYERS = 256  # of the language model and of the tower; the deepest published models have about 130
MAX_CROP = 4096  # pixels of a crop's side
MAX_PATCHES = 1 << 14  # of a crop
MAX_CROPS = 64  # of an image; LLaVA-OneVision has the most, 36
MAX_PIXELS = 1 << 24  # of all local crops of an image together
MAX_ENTRIES = 256  # of pinpoints and of granularities
NOTATION = re.compile(r"[\[\](),\s0-9]{1,10000}")  # of a list that is written as a string

CLIP_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "layer_norm_eps": 1e-5,
    "hidden_act": "quick_gelu",
}
KNOWN_TOWERS = {
    "openai/clip-vit-large-patch14": CLIP_LARGE | {"image_size": 224},
    "openai/clip-vit-large-patch14-336": CLIP_LARGE | {"image_size": 336},
}


def form_of(keys: Mapping[str, Any]) -> Literal["converted", "authors", "hub"] | None:
    """Say whose form a LLaVA's `config.json` has: this package's, its authors' or the Hub's; None if it is no LLaVA's.

    The authors' first models have one of the Hub's names. What this package writes has their keys, and the tower's.
    """
    kind, nested = keys.get("model_type"), keys.get("text_config") is not None
    if not isinstance(kind, str):
        return None
    if nested:
        return "hub" if kind in HUB_TYPES else None
    if kind != "llava" and not MODEL_TYPE.fullmatch(kind):
        return None
    return "authors" if keys.get("vision_config") is None else "converted"


def tower_type(keys: Mapping[str, Any]) -> str | None:
    """Return the type of the vision tower of a config of the Hub's, which is CLIP's where nothing is said.

    None if `vision_config` is damaged.
    """
    vision = keys.get("vision_config") or {}
    kind = vision.get("model_type", CLIP) if isinstance(vision, dict) else None
    return kind if isinstance(kind, str) else None


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP vision tower and the normalization of its pixels."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def from_dict(cls, keys: Mapping[str, Any]) -> "VisionConfig":
        """Parse a `CLIPVisionConfig`, alone or inside a whole `CLIPConfig`, with image_mean/std beside it."""
        check_types(keys, "the vision tower's config", {"vision_config": dict})
        keys = {**keys, **keys.get("vision_config", {})}
        types = {f.name: f.type for f in fields(cls)}
        required = [name for name in types if name not in vars(cls)]
        check_types(keys, "the vision tower's config", types, required)
        vision = cls(**{f.name: _frozen(keys[f.name]) for f in fields(cls) if f.name in keys})
        one_of("the vision tower's hidden_act", vision.hidden_act, ("quick_gelu", "gelu"))
        if vision.image_size % vision.patch_size:
            raise InputError(
                f"a crop of {vision.image_size} pixels is not a whole number of {vision.patch_size}-pixel patches"
            )
        at_most("the vision tower's num_hidden_layers", vision.num_hidden_layers, MAX_LAYERS)
        at_most("the vision tower's image_size", vision.image_size, MAX_CROP)
        at_most("the number of a crop's patches", math.prod(vision.patch_grid), MAX_PATCHES)
        if 0 in vision.image_std:
            raise InputError(f"image_std is {shown(vision.image_std)}, by which pixels cannot be divided")
        return vision

    @property
    def patch_grid(self) -> Pair:
        """(rows, columns) of a crop's patches."""
        side = self.image_size // self.patch_size
        return side, side


@dataclass(frozen=True)
class Config:
    """The parts of an AVG-LLaVA model: language model, vision tower, projector, granularities and router."""

    text: Mapping[str, Any]  # the language model's keys, as mlx-lm reads them
    vision: VisionConfig
    hidden_size: int
    vocab_size: int
    context_length: int  # positions
    layout: str  # one of LAYOUTS, whose geometry it follows
    vision_layers: int  # encoder layers that are run: the features are the last one's output
    projector_depth: int
    granularities: tuple[int, ...]  # the config's order: it is the voter's layout
    image_aspect_ratio: str
    grid_pinpoints: tuple[Pair, ...]  # (height, width) in pixels
    has_newline: bool
    filtered_text_num: int
    has_router: bool

    @classmethod
    def from_dict(cls, keys: Mapping[str, Any]) -> "Config":
        """Parse a `config.json` that has the tower's config under `vision_config`; InputError says what is wrong."""
        text_model = _text_model(keys.get("model_type"))
        keys = {name: value for name, value in keys.items() if value is not None}
        text = {"tie_word_embeddings": False, **keys, "model_type": text_model}  # mlx-lm's default is tied
        for name in ("sliding_window", "layer_types"):  # the window bounds the context: within it attention is full
            text.pop(name, None)
        if form_of(keys) != "converted":
            raise InputError(
                "this is a PyTorch checkpoint (a converted config.json has vision_config, and no text_config); "
                "convert it first: avg-mlx convert --hf-path FOLDER"
            )
        check_types(keys, "config.json", {**REQUIRED, **OPTIONAL}, required=REQUIRED)
        at_most("num_hidden_layers", keys["num_hidden_layers"], MAX_LAYERS)
        for name, value in keys.items():
            if name.startswith(("num_", "n_")) and type(value) is int:
                at_most(name, value, MAX_COUNT)
        quantization = keys.get("quantization", {})
        for how in (quantization, *quantization.values()):  # of all layers, and of single ones
            if isinstance(how, dict):
                check_types(how, "the quantization in config.json", QUANTIZATION)
        vision = VisionConfig.from_dict(keys["vision_config"])
        one_of("mm_vision_select_feature", keys.get("mm_vision_select_feature", "patch"), ("patch",))
        layout = one_of("layout", keys.get("layout", "llava"), LAYOUTS)
        aspect = one_of("image_aspect_ratio", keys["image_aspect_ratio"], ASPECTS)
        merge = keys.get("mm_patch_merge_type", "flat")
        pinpoints: tuple[Pair, ...] = ()
        if aspect == "anyres":
            one_of("mm_patch_merge_type", merge, ("spatial_unpad",))
            pinpoints = _pinpoints(keys.get("image_grid_pinpoints"), vision.image_size)
        patches = math.prod(vision.patch_grid)
        config = cls(
            text=text,
            vision=vision,
            hidden_size=keys["hidden_size"],
            vocab_size=keys["vocab_size"],
            context_length=int(min(keys["max_position_embeddings"], keys.get("tokenizer_model_max_length", math.inf))),
            layout=layout,
            vision_layers=_vision_layers(keys.get("mm_vision_select_layer", -2), vision.num_hidden_layers),
            projector_depth=_projector_depth(keys.get("mm_projector_type", "linear")),
            granularities=_granularities(keys.get("vis_token_granularity", [patches]), vision.patch_grid),
            image_aspect_ratio=aspect,
            grid_pinpoints=pinpoints,
            has_newline="unpad" in merge,
            filtered_text_num=keys.get("filtered_text_num", 32),
            has_router=keys.get("router_select", False),
        )
        return config._within(_sliding_window(keys))

    def _within(self, window: float) -> "Config":
        """Bound the context by a sliding window; InputError for one that an image would not fit into."""
        most = max(self.visual_tokens(self.finest, size) for size in self.grid_pinpoints or [(1, 1)])
        if window <= most:
            raise InputError(
                f"sliding_window is {window}, but an image takes up to {most} positions and full attention alone can "
                "be run; give a checkpoint without a sliding window"
            )
        return replace(self, context_length=int(min(self.context_length, window)))

    def crop_grid(self, image_size: Pair) -> Pair:
        """Return the (rows, columns) of an image's local crops; (0, 0) if there is only the base crop."""
        if not self.grid_pinpoints:
            return 0, 0
        height, width = best_resolution(image_size, self.grid_pinpoints)
        return height // self.vision.image_size, width // self.vision.image_size

    def visual_tokens(self, granularity: int, image_size: Pair) -> int:
        """Count the tokens that an image of (height, width) takes at `granularity`."""
        crop_grid = self.crop_grid(image_size)
        return visual_token_count(granularity, self.vision.patch_grid, crop_grid, image_size, self.rounds)

    def geometry(self, granularity: int, image_size: Pair) -> ImageGeometry:
        """Place an image's crops and tokens over the image of (height, width)."""
        return image_geometry(
            granularity,
            self.vision.patch_grid,
            self.vision.image_size,
            self.crop_grid(image_size),
            image_size,
            self.image_aspect_ratio,
            self.rounds,
        )

    @property
    def rounds(self) -> bool:
        """Whether unpadding rounds, as transformers does, where the authors truncate."""
        return self.layout == "transformers"

    @property
    def voter_size(self) -> int:
        """The number of positions that the voter weighs: one crop's tokens at every granularity, and filtered text."""
        return sum(self.granularities) + self.filtered_text_num

    @property
    def finest(self) -> int:
        """The largest granularity."""
        return max(self.granularities)

    @property
    def head_size(self) -> int:
        """The width of one attention head of the language model."""
        return int(self.text.get("head_dim") or self.hidden_size // self.text["num_attention_heads"])


REQUIRED: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), int),
    **dict.fromkeys(("vocab_size", "max_position_embeddings"), int),
    "rms_norm_eps": float,
    "image_aspect_ratio": str,
}
OPTIONAL: dict[str, Any] = {
    **dict.fromkeys(("num_key_value_heads", "head_dim", "sliding_window"), int),
    **dict.fromkeys(("attention_bias", "mlp_bias", "rope_traditional", "tie_word_embeddings"), bool),
    **dict.fromkeys(("router_select", "use_sliding_window"), bool),
    **dict.fromkeys(("rope_scaling", "quantization", "vision_config"), dict),
    "filtered_text_num": range,  # 0: the router sees the image only
    **dict.fromkeys(("rope_theta", "tokenizer_model_max_length"), float),  # transformers writes 10³⁰ for no limit
    **dict.fromkeys(("mm_projector_type", "mm_patch_merge_type"), str),
    "eos_token_id": list[int],
    "layer_types": list[str],
}
QUANTIZATION: dict[str, Any] = {"group_size": int, "bits": int, "mode": str}  # MLX divides by the first two


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _text_model(model_type: Any) -> str:
    match = MODEL_TYPE.fullmatch(model_type) if isinstance(model_type, str) else None
    if not match:
        raise InputError(f"model_type is {shown(model_type)}, but only 'llava_llama' and its like can be run")
    return match[1]


def _sliding_window(keys: Mapping[str, Any]) -> float:
    """Over how many positions a layer attends at most."""
    types = keys.get("layer_types")
    slides = keys.get("use_sliding_window", True) and (types is None or "sliding_attention" in types)
    return keys.get("sliding_window", math.inf) if slides else math.inf


def _vision_layers(select_layer: Any, num_hidden_layers: int) -> int:
    """Count the layers that give `hidden_states[select_layer]`, where entry 0 is the embeddings."""
    hidden_states = range(num_hidden_layers + 1)
    try:
        return hidden_states[select_layer]
    except (IndexError, TypeError):
        raise InputError(
            f"mm_vision_select_layer is {shown(select_layer)}, but the tower has {num_hidden_layers} layers"
        ) from None


def _projector_depth(projector_type: str) -> int:
    match = re.fullmatch(r"mlp([1-9][0-9]?)x_gelu", projector_type)
    if not match:
        raise InputError(
            f"mm_projector_type is {shown(projector_type)}, but only 'mlpNx_gelu' (N = 1, 2, … 99) can be run"
        )
    return int(match[1])


def _granularities(given: Any, patch_grid: Pair) -> tuple[int, ...]:
    values = _listed(given)
    for g in values:
        whole = type(g) is int and 0 < g <= math.prod(patch_grid)
        if not whole or math.prod(token_grid(g, patch_grid)) != g:
            choices = ", ".join(map(str, poolings(patch_grid)))
            grid = f"{patch_grid[0]}×{patch_grid[1]}"
            raise InputError(f"granularity {shown(g)} does not pool a crop of {grid} patches; choose from {choices}")
    if not values or len(set(values)) < len(values):
        raise InputError(
            f"vis_token_granularity is {shown(given)}, but one or more different numbers are expected, "
            f"at most {MAX_ENTRIES}"
        )
    return values


def default_granularities(patch_grid: Pair) -> list[int]:
    """Return a crop's patches, and their half, quarter, eighth and sixteenth, as far as the grid can be pooled."""
    patches = math.prod(patch_grid)
    return [g for g in poolings(patch_grid) if patches / g in (1, 2, 4, 8, 16)]


def _pinpoints(values: Any, crop_size: int) -> tuple[Pair, ...]:
    """Turn (width, height) pairs, listed or written as a string, into (height, width)."""
    try:
        pinpoints = tuple((height, width) for width, height in _listed(values))
    except (TypeError, ValueError):
        pinpoints = ()
    sides = [side for pinpoint in pinpoints for side in pinpoint]
    if not sides or any(type(side) is not int or side <= 0 or side % crop_size for side in sides):
        raise InputError(
            f"image_grid_pinpoints is {shown(values)}, but a list of [width, height], multiples of {crop_size}, "
            "is expected"
        )
    most = min(MAX_CROPS, MAX_PIXELS // crop_size**2)
    for height, width in pinpoints:
        at_most(f"the number of crops in the pinpoint {width}×{height}", height * width // crop_size**2, most)
    return pinpoints


def _listed(values: Any) -> tuple[Any, ...]:
    """Return a list or tuple, as it stands or written as a string; empty if it is neither, or too long."""
    if isinstance(values, str) and NOTATION.fullmatch(values):
        try:
            values = ast.literal_eval(values)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return ()
    return tuple(values) if isinstance(values, list | tuple) and len(values) <= MAX_ENTRIES else ()
