"""The options of looking and decoding: their names, defaults and bounds, checked before any image is read."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict, TypeVar

import mlx.core as mx

from ..config import Config
from ..errors import InputError, OptionError, nearest
from ..geometry import poolings
from ..inputs.image_io import MAX_PIXELS

AUTO: Literal["auto"] = "auto"
MAX_TOKENS = 256
PREFILL_STEP_SIZE = 2048  # positions, mlx-lm's default
SMALLEST_KV = 5  # positions of a rotating KV cache, which keeps the first four
KV_BITS = (2, 3, 4, 5, 6, 8)  # that MLX quantizes to
KV_GROUP_SIZES = (32, 64, 128)  # that MLX quantizes
CHOSEN_GROUP_SIZES = (64, 32)  # that this package chooses from, the preferred one first

Granularity = int | Literal["auto"]
Sampler = Callable[[mx.array], mx.array]  # log-probabilities → token ids
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]  # (tokens so far, logits) → logits

Options = TypeVar("Options")


class RouteOptions(TypedDict, total=False):
    """The options of `route`."""

    max_visual_tokens: int | None
    token_cost: float
    system_prompt: str | None
    max_pixels: int


class ExplainOptions(RouteOptions, total=False):
    """The options of `explain`: all that say how closely images are looked at."""

    granularity: Granularity


class DecodingOptions(TypedDict, total=False):
    """The options of the language model; `Decoding` has their defaults."""

    max_tokens: int
    max_kv_size: int | None
    sampler: Sampler | None
    logits_processors: Sequence[LogitsProcessor] | None
    prefill_step_size: int
    kv_bits: int | None
    kv_group_size: int | None
    quantized_kv_start: int
    prompt_progress_callback: Callable[[int, int], None] | None


class AskOptions(DecodingOptions, total=False):
    """The options of a question in a conversation."""

    granularity: Granularity
    max_visual_tokens: int | None
    token_cost: float


class GenerateOptions(AskOptions, total=False):
    """The options of `generate` and `stream_generate`."""

    system_prompt: str | None
    max_pixels: int


@dataclass(frozen=True)
class Looking:
    """How closely images are looked at, and what may be read.

    granularity: "auto" lets the router choose, or is the finest where there is no router; a number forces that many
    visual tokens per crop. max_visual_tokens: a budget for each image, within which "auto" stays. token_cost: the price
    of the finest granularity's visual tokens, in log-probability; fewer cost their share of it, and "auto" is what the
    router likes best after cost. system_prompt: replaces the one that the model was trained with. max_pixels: larger
    images are refused.
    """

    granularity: Granularity = AUTO
    max_visual_tokens: int | None = None
    token_cost: float = 0.0
    system_prompt: str | None = None
    max_pixels: int = MAX_PIXELS

    def check(self, config: Config) -> None:
        """Raise InputError for options that the model does not have, or that contradict each other."""
        if not 0 <= self.token_cost < math.inf:
            raise InputError(f"token_cost is {self.token_cost}; expected a number from 0")
        if self.token_cost and not config.has_router:
            raise InputError("token_cost weighs what the router thinks, but this model has none; leave it out")
        if self.granularity == AUTO:
            return
        choices = forcible(config)
        if self.granularity not in choices:
            listed = ", ".join(map(str, choices))
            raise InputError(f"granularity is {self.granularity!r}; choose {AUTO} or one of this model's: {listed}")
        if self.max_visual_tokens is not None:
            raise InputError(
                f"granularity {self.granularity} forces a choice and max_visual_tokens limits the router's; give one"
            )
        if self.token_cost:
            raise InputError(
                f"granularity {self.granularity} forces a choice and token_cost weighs the router's; give one"
            )


def forcible(config: Config) -> list[int]:
    """The granularities that may be forced, the coarsest first.

    They are the model's own. A plain model has only one and no router, and its patches may be pooled to any other.
    """
    plain = len(config.granularities) == 1 and not config.has_router
    return poolings(config.vision.patch_grid) if plain else sorted(config.granularities)


@dataclass(frozen=True)
class Decoding:
    """How the language model answers.

    max_tokens: new tokens at most, -1 for as many as the context has room for. max_kv_size: positions that a rotating
    KV cache keeps. sampler and logits_processors: as mlx-lm makes them; greedy by default. prefill_step_size: prompt
    positions that are processed at a time. kv_bits: quantizes the KV cache, in groups of kv_group_size (by default
    the largest that divides the model's head size), from position quantized_kv_start on. prompt_progress_callback: is
    called with the positions prefilled and the positions of the prompt.
    """

    max_tokens: int = MAX_TOKENS
    max_kv_size: int | None = None
    sampler: Sampler | None = None
    logits_processors: Sequence[LogitsProcessor] | None = None
    prefill_step_size: int = PREFILL_STEP_SIZE
    kv_bits: int | None = None
    kv_group_size: int | None = None
    quantized_kv_start: int = 5000
    prompt_progress_callback: Callable[[int, int], None] | None = None

    @property
    def plain_kv(self) -> bool:
        """Whether the KV cache neither rotates nor is quantized, so that a prefix of it can be reused."""
        return self.max_kv_size is None and self.kv_bits is None

    def check(self, config: Config) -> None:
        """Raise InputError for values that are out of bounds, or that contradict each other or the model."""
        check_max_tokens(self.max_tokens)
        if self.prefill_step_size < 1:
            raise InputError(f"prefill_step_size is {self.prefill_step_size}; expected 1 or more")
        if self.max_kv_size is not None and self.max_kv_size < SMALLEST_KV:
            raise InputError(f"max_kv_size is {self.max_kv_size}; expected {SMALLEST_KV} or more")
        if self.kv_bits is not None:
            if self.kv_bits not in KV_BITS:
                raise InputError(f"kv_bits is {self.kv_bits}; expected one of {', '.join(map(str, KV_BITS))}")
            if self.kv_group_size not in (None, *KV_GROUP_SIZES):
                sizes = ", ".join(map(str, KV_GROUP_SIZES))
                raise InputError(f"kv_group_size is {self.kv_group_size}; expected one of {sizes}")
            if self.max_kv_size is not None:
                raise InputError("a rotating KV cache (max_kv_size) cannot be quantized (kv_bits); give one of the two")
            self.group_size(config)

    def group_size(self, config: Config) -> int:
        """How many numbers of a quantized KV cache share a scale; InputError if no such size divides a head."""
        head = config.head_size
        sizes = CHOSEN_GROUP_SIZES if self.kv_group_size is None else (self.kv_group_size,)
        fitting = [size for size in sizes if head % size == 0]
        if not fitting:
            raise InputError(
                f"kv_group_size {' or '.join(map(str, sizes))} does not divide this model's head size {head}; "
                "choose one that does, or leave kv_bits out"
            )
        return fitting[0]


def check_max_tokens(max_tokens: int) -> None:
    """Raise InputError for a limit that no answer can keep to."""
    if max_tokens < 1 and max_tokens != -1:
        raise InputError(f"max_tokens is {max_tokens}; expected 1 or more, or -1 for as many as the context allows")


def check_names(options: Mapping[str, object], known: type) -> None:
    """Raise OptionError for a name that the TypedDict `known` does not have; it says which one is nearest."""
    names = list(known.__annotations__)
    for name in options:
        if name not in names:
            hint = nearest(name, names) or f"; choose from {', '.join(sorted(names))}"
            raise OptionError(f"{name} is not an option here{hint}")


def pick(kind: type[Options], options: Mapping[str, Any]) -> Options:
    """The dataclass `kind` made of those options that it has."""
    return kind(**{field.name: options[field.name] for field in fields(kind) if field.name in options})  # type: ignore[arg-type]
