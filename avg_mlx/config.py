"""The architecture, parsed once from a checkpoint's own keys, without MLX."""

import ast
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from .errors import InputError
from .geometry import Pair, best_resolution, token_grid, visual_token_count

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
        _check(keys, "the vision tower's config", {"vision_config": dict})
        keys = {**keys, **keys.get("vision_config", {})}
        types = {f.name: f.type for f in fields(cls)}
        _check(keys, "the vision tower's config", types, required=[name for name in types if name not in vars(cls)])
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
    """The parts of an AVG-LLaVA model: language model, vision tower, projector, granularities and router."""

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
        """Parse a `config.json` that has the tower's config under `vision_config`; InputError says what is wrong."""
        _one_of("model_type", keys.get("model_type"), (MODEL_TYPE,))
        text = {"tie_word_embeddings": False, **keys, "model_type": TEXT_MODEL}  # mlx-lm's default is tied
        keys = {name: value for name, value in keys.items() if value is not None}
        if "vision_config" not in keys:
            raise InputError(
                "this is a PyTorch checkpoint (its config has no vision_config); "
                "convert it first: avg-mlx convert --hf-path FOLDER"
            )
        _check(keys, "config.json", {**REQUIRED, **OPTIONAL}, required=REQUIRED)
        vision = VisionConfig.from_dict(keys["vision_config"])
        _one_of("mm_vision_select_feature", keys.get("mm_vision_select_feature", "patch"), ("patch",))
        aspect = _one_of("image_aspect_ratio", keys["image_aspect_ratio"], ("anyres", "pad"))
        pinpoints: tuple[Pair, ...] = ()
        if aspect == "anyres":
            _one_of("mm_patch_merge_type", keys.get("mm_patch_merge_type"), ("spatial_unpad",))
            pinpoints = _pinpoints(keys.get("image_grid_pinpoints"), vision.image_size)
        patches = vision.patch_grid[0] * vision.patch_grid[1]
        return cls(
            text=text,
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
            has_router=keys.get("router_select", False),
        )

    def crop_grid(self, image_size: Pair) -> Pair:
        """Return the (rows, columns) of an image's local crops; (0, 0) if there is only the base crop."""
        if self.image_aspect_ratio == "pad":
            return 0, 0
        height, width = best_resolution(image_size, self.grid_pinpoints)
        return height // self.vision.image_size, width // self.vision.image_size

    def visual_tokens(self, granularity: int, image_size: Pair) -> int:
        """Count the tokens that an image of (height, width) takes at `granularity`."""
        return visual_token_count(granularity, self.vision.patch_grid, self.crop_grid(image_size), image_size)

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
    **dict.fromkeys(("num_key_value_heads", "head_dim", "tokenizer_model_max_length"), int),
    **dict.fromkeys(("attention_bias", "mlp_bias", "tie_word_embeddings", "router_select"), bool),
    **dict.fromkeys(("rope_scaling", "quantization", "vision_config"), dict),
    "filtered_text_num": range,  # 0: the router sees the image only
    "rope_theta": float,
    "mm_projector_type": str,
}
IN_WORDS: dict[Any, str] = {
    int: "a whole number above 0",
    range: "a whole number from 0",
    float: "a number",
    bool: "true or false",
    str: "a text",
    dict: "an object",
    tuple[float, ...]: "a list of numbers",
}


def _check(keys: Mapping[str, Any], where: str, types: Mapping[str, Any], required: Iterable[str] = ()) -> None:
    """Raise an InputError that lists all missing keys, or else all values of a wrong type."""
    missing = [name for name in required if name not in keys]
    if missing:
        raise InputError(f"{where} lacks {', '.join(missing)}; is it the config of an AVG-LLaVA checkpoint?")
    wrong = [
        f"{name} is {keys[name]!r}, expected {IN_WORDS[kind]}"
        for name, kind in types.items()
        if name in keys and not _is(kind, keys[name])
    ]
    if wrong:
        raise InputError(f"{where} is damaged: {'; '.join(wrong)}; download it again")


def _is(kind: Any, value: Any) -> bool:
    if kind in (int, range):
        return type(value) is int and value >= (kind is int)
    if kind is float:
        return type(value) in (int, float)
    if kind == tuple[float, ...]:
        return isinstance(value, list | tuple) and all(_is(float, number) for number in value)
    return isinstance(value, kind)


def _one_of(what: str, value: Any, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise InputError(f"{what} is {value!r}, but only {' and '.join(map(repr, allowed))} can be run")
    return value


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _vision_layers(select_layer: Any, num_hidden_layers: int) -> int:
    """Count the layers that give `hidden_states[select_layer]`, where entry 0 is the embeddings."""
    hidden_states = range(num_hidden_layers + 1)
    try:
        return hidden_states[select_layer]
    except (IndexError, TypeError):
        raise InputError(
            f"mm_vision_select_layer is {select_layer!r}, but the tower has {num_hidden_layers} layers"
        ) from None


def _projector_depth(projector_type: str) -> int:
    match = re.fullmatch(r"mlp(\d+)x_gelu", projector_type)
    if not match or int(match[1]) < 1:
        raise InputError(f"mm_projector_type is {projector_type!r}, but only 'mlpNx_gelu' (N = 1, 2, …) can be run")
    return int(match[1])


def _granularities(given: Any, patch_grid: Pair) -> tuple[int, ...]:
    values = _listed(given)
    patches = patch_grid[0] * patch_grid[1]
    for g in values:
        whole = isinstance(g, int) and 0 < g <= patches
        if not whole or (grid := token_grid(g, patch_grid))[0] * grid[1] != g:
            raise InputError(f"granularity {g!r} does not pool a crop of {patch_grid[0]}×{patch_grid[1]} patches")
    if not values or len(set(values)) < len(values):
        raise InputError(f"vis_token_granularity is {given!r}, but one or more different numbers are expected")
    return values


def _pinpoints(values: Any, crop_size: int) -> tuple[Pair, ...]:
    """Turn (width, height) pairs, listed or written as a string, into (height, width)."""
    try:
        pinpoints = tuple((int(height), int(width)) for width, height in _listed(values))
    except (TypeError, ValueError):
        pinpoints = ()
    if not pinpoints or any(side <= 0 or side % crop_size for pair in pinpoints for side in pair):
        raise InputError(
            f"image_grid_pinpoints is {values!r}, but a list of [width, height], multiples of {crop_size}, is expected"
        )
    return pinpoints


def _listed(values: Any) -> tuple[Any, ...]:
    """Return a list or tuple, as it stands or written as a string; empty if it is neither."""
    try:
        values = ast.literal_eval(values) if isinstance(values, str) else values
    except (ValueError, SyntaxError):
        return ()
    return tuple(values) if isinstance(values, list | tuple) else ()
