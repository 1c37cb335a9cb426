"""The architecture, parsed once from a checkpoint's own keys. Nothing here imports MLX."""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .errors import InputError
from .geometry import Pair, token_grid

MODEL_TYPE = "llava_llama"
TEXT_MODEL = "llama"  # the mlx-lm model behind MODEL_TYPE

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
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def from_dict(cls, keys: Mapping[str, Any]) -> "VisionConfig":
        """Parse a `CLIPVisionConfig`, alone or inside a whole `CLIPConfig`, with image_mean/std beside it."""
        keys = {**keys, **keys.get("vision_config", {})}
        _require(keys, "the vision tower's config", cls)
        vision = cls(**{f.name: _frozen(keys[f.name]) for f in fields(cls) if f.name in keys})
        _one_of("the vision tower's hidden_act", vision.hidden_act, ("quick_gelu", "gelu"))
        if vision.image_size % vision.patch_size:
            raise InputError(
                f"a crop of {vision.image_size} pixels is not a whole number of {vision.patch_size}-pixel patches"
            )
        return vision

    @property
    def patch_grid(self) -> Pair:
        """(rows, columns) of a crop's patches."""
        side = self.image_size // self.patch_size
        return side, side


@dataclass(frozen=True)
class Config:
    """AVG-LLaVA: language model, vision tower, projector, granularities and router."""

    text: Mapping[str, Any]  # the language model's keys, as mlx-lm reads them
    vision: VisionConfig
    hidden_size: int
    vocab_size: int
    context_length: int  # positions
    vision_layers: int  # encoder layers that are run: the features are the last one's output
    projector_depth: int
    granularities: tuple[int, ...]  # the config's order: it is the voter's layout
    image_aspect_ratio: str
    grid_pinpoints: tuple[Pair, ...]  # (height, width) in pixels
    filtered_text_num: int
    has_router: bool

    @classmethod
    def from_dict(cls, keys: Mapping[str, Any]) -> "Config":
        """Parse a checkpoint's `config.json` with its tower's under `vision_config`; InputError says what is off."""
        _one_of("model_type", keys.get("model_type"), (MODEL_TYPE,))
        if "vision_config" not in keys:
            raise InputError(
                "this is a PyTorch checkpoint (its config has no vision_config); "
                "convert it first: avg-mlx convert --hf-path FOLDER"
            )
        _require(keys, "config.json", None, *TEXT_KEYS, "image_aspect_ratio")
        vision = VisionConfig.from_dict(keys["vision_config"])
        _one_of("mm_vision_select_feature", keys.get("mm_vision_select_feature", "patch"), ("patch",))
        aspect = _one_of("image_aspect_ratio", keys["image_aspect_ratio"], ("anyres", "pad"))
        pinpoints: tuple[Pair, ...] = ()
        if aspect == "anyres":
            _one_of("mm_patch_merge_type", keys.get("mm_patch_merge_type"), ("spatial_unpad",))
            pinpoints = _pinpoints(keys.get("image_grid_pinpoints"), vision.image_size)
        patches = vision.patch_grid[0] * vision.patch_grid[1]
        return cls(
            # Llama's default is untied; mlx-lm's is tied.
            text={"tie_word_embeddings": False, **keys, "model_type": TEXT_MODEL},
            vision=vision,
            hidden_size=keys["hidden_size"],
            vocab_size=keys["vocab_size"],
            context_length=min(
                keys["max_position_embeddings"],
                keys.get("tokenizer_model_max_length", keys["max_position_embeddings"]),
            ),
            vision_layers=_vision_layers(keys.get("mm_vision_select_layer", -2), vision.num_hidden_layers),
            projector_depth=_projector_depth(keys.get("mm_projector_type", "linear")),
            granularities=_granularities(keys.get("vis_token_granularity", [patches]), vision.patch_grid),
            image_aspect_ratio=aspect,
            grid_pinpoints=pinpoints,
            filtered_text_num=keys.get("filtered_text_num", 32),
            has_router=bool(keys.get("router_select", False)),
        )

    @property
    def voter_size(self) -> int:
        """Positions the voter weighs: every granularity's tokens of one crop, then the filtered text."""
        return sum(self.granularities) + self.filtered_text_num

    @property
    def finest(self) -> int:
        return max(self.granularities)


TEXT_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "rms_norm_eps",
    "max_position_embeddings",
)


def _require(keys: Mapping[str, Any], where: str, cls: type | None, *names: str) -> None:
    if cls is not None:
        names = tuple(f.name for f in fields(cls) if f.name not in vars(cls))
    missing = [name for name in names if name not in keys]
    if missing:
        raise InputError(f"{where} lacks {', '.join(missing)}; is it the config of an AVG-LLaVA checkpoint?")


def _one_of(what: str, value: Any, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise InputError(f"{what} is {value!r}, but only {' and '.join(map(repr, allowed))} can be run")
    return value


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _vision_layers(select_layer: int, num_hidden_layers: int) -> int:
    """How many layers give `hidden_states[select_layer]`; entry 0 is the embeddings."""
    layers = select_layer if select_layer >= 0 else num_hidden_layers + 1 + select_layer
    if not 0 <= layers <= num_hidden_layers:
        raise InputError(f"mm_vision_select_layer is {select_layer}, but the tower has {num_hidden_layers} layers")
    return layers


def _projector_depth(projector_type: str) -> int:
    match = re.fullmatch(r"mlp(\d+)x_gelu", projector_type)
    if not match or int(match[1]) < 1:
        raise InputError(f"mm_projector_type is {projector_type!r}, but only 'mlpNx_gelu' (N = 1, 2, …) can be run")
    return int(match[1])


def _granularities(values: Any, patch_grid: Pair) -> tuple[int, ...]:
    values = tuple(_literal(values))
    patches = patch_grid[0] * patch_grid[1]
    for g in values:
        whole = isinstance(g, int) and 0 < g <= patches
        if not whole or (grid := token_grid(g, patch_grid))[0] * grid[1] != g:
            raise InputError(f"granularity {g!r} does not pool a crop of {patch_grid[0]}×{patch_grid[1]} patches")
    if not values or len(set(values)) < len(values):
        raise InputError(f"vis_token_granularity is {list(values)}, but one or more different numbers are expected")
    return values


def _pinpoints(values: Any, crop_size: int) -> tuple[Pair, ...]:
    """(width, height) pairs, listed or as a string, turned to (height, width)."""
    try:
        pinpoints = tuple((int(height), int(width)) for width, height in _literal(values))
    except (TypeError, ValueError, SyntaxError):
        pinpoints = ()
    if not pinpoints or any(side <= 0 or side % crop_size for pair in pinpoints for side in pair):
        raise InputError(
            f"image_grid_pinpoints is {values!r}, but a list of [width, height], multiples of {crop_size}, is expected"
        )
    return pinpoints


def _literal(values: Any) -> Any:
    return ast.literal_eval(values) if isinstance(values, str) else values
