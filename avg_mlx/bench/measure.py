"""Where an answer's time and memory go at each granularity: measured, and counted beside it."""

import contextlib
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from io import BytesIO
from typing import Any

import mlx.core as mx
from PIL import Image

from ..errors import InputError
from ..inference.generation import Answer, generate
from ..inputs.image_io import ImageSource
from ..inputs.prompt import PLACEHOLDER_ID, build_messages, encode_messages
from ..model.avg_llava import Model
from ..model.inventory import parts_of
from ..version import VERSION
from .cost import Cost, Work

STAGES = ("preprocess", "vision", "router", "prefill")
TEXT_TOKENS = 60
CERTAIN = 1e4  # a logit that no other comes near


@dataclass(frozen=True)
class Spread:
    """The median of a few measurements, with the smallest and the largest."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Row:
    """What one granularity takes. Times are seconds, work is counted."""

    granularity: int
    visual_tokens: int
    prompt_tokens: int
    preprocess: Spread
    vision: Spread
    router: Spread
    prefill: Spread
    time_to_first_token: Spread
    decode_tokens_per_second: Spread
    peak_memory_gb: Spread
    work: dict[str, Work]  # vision, router, prefill; decode: one step

    @property
    def work_to_first_token(self) -> Work:
        return self.work["vision"] + self.work["router"] + self.work["prefill"]


@dataclass(frozen=True)
class Options:
    """What is asked, and how often. Every round passes all granularities, so that drift is shared."""

    prompt: str
    image: ImageSource
    granularities: tuple[int, ...]
    repeats: int = 3
    warmup: int = 1
    decode_tokens: int = 32


def measure(model: Model, tokenizer, options: Options, progress: Callable[[int, int], None]) -> list[Row]:
    """A row for each granularity, coarsest first; `progress` is told (answers done, answers in all)."""
    granularities = sorted(options.granularities)
    unknown = set(granularities) - set(model.config.granularities)
    if unknown:
        choices = ", ".join(map(str, sorted(model.config.granularities)))
        raise InputError(f"granularity {min(unknown)} is none of this model's: {choices}")
    answers: dict[int, list[Answer]] = {g: [] for g in granularities}
    rounds, done = options.warmup + options.repeats, 0
    with _endless(tokenizer):
        for n in range(rounds):
            for g in granularities:
                answer = ask(model, tokenizer, options, g)
                if n >= options.warmup:
                    answers[g].append(answer)
                progress(done := done + 1, rounds * len(granularities))
    cost = cost_of(model)
    return [_row(g, answers[g], cost) for g in granularities]


def ask(model: Model, tokenizer, options: Options, granularity: int) -> Answer:
    """An answer for which the router has been run, and has found `granularity` best."""
    mx.reset_peak_memory()
    with steered(model, granularity):
        return generate(
            model,
            tokenizer,
            options.prompt,
            options.image,
            granularity="auto" if model.config.has_router else granularity,
            max_tokens=options.decode_tokens + 1,  # the first one belongs to the prompt
        )


@contextlib.contextmanager
def steered(model: Model, granularity: int) -> Iterator[None]:
    """The router does all its work, but its last bias decides; without a router, nothing is done."""
    if not model.config.has_router:
        yield
        return
    norm = model.router.logit_norm
    bias = norm.bias
    norm.bias = mx.array([CERTAIN if g == granularity else 0.0 for g in model.config.granularities], bias.dtype)
    try:
        yield
    finally:
        norm.bias = bias


@contextlib.contextmanager
def _endless(tokenizer) -> Iterator[None]:
    """No token ends an answer, so that all answers are equally long."""
    ends = tokenizer.eos_token_ids
    tokenizer.eos_token_ids = ()
    try:
        yield
    finally:
        tokenizer.eos_token_ids = ends


def _row(granularity: int, answers: Sequence[Answer], cost: Cost) -> Row:
    view, positions = answers[0].views[0], answers[0].prompt_tokens
    text_tokens = positions - view.visual_tokens
    seconds = {stage: Spread.of([getattr(a.timings, stage) for a in answers]) for stage in STAGES}
    return Row(
        granularity,
        view.visual_tokens,
        positions,
        **seconds,
        time_to_first_token=Spread.of([a.timings.time_to_first_token for a in answers]),
        decode_tokens_per_second=Spread.of([a.timings.generation_tokens_per_second for a in answers]),
        peak_memory_gb=Spread.of([a.peak_memory_gb for a in answers]),
        work={
            "vision": cost.vision(view.crops),
            "router": cost.router(view.crops, text_tokens) if view.routing else Work(),
            "prefill": cost.prefill(positions),
            "decode": cost.decode(positions + 1),
        },
    )


def cost_of(model: Model) -> Cost:
    """Counts a model as it stands: its weights' bits, and activations as wide as its newline token."""
    bits = {part.name: part.bits_per_weight for part in parts_of(model)}
    return Cost(model.config, bits, 8 * model.image_newline.itemsize)


def describe(model: Model, tokenizer, options: Options) -> dict[str, Any]:
    """What was measured, and on what."""
    parts = parts_of(model)
    kind = "CPU"
    if mx.default_device().type == mx.DeviceType.gpu:
        kind = "Metal" if mx.metal.is_available() else "CUDA"
    return {
        "device": kind,
        "chip": mx.device_info()["device_name"],
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"avg-mlx": VERSION, **{name: version(name) for name in ("mlx", "mlx-lm")}},
        "dtype": str(model.image_newline.dtype).rpartition(".")[2],
        "bits_per_weight": {part.name: round(part.bits_per_weight, 2) for part in parts},
        "parameters": sum(part.parameters for part in parts),
        "weights_gb": sum(part.bytes for part in parts) / 1e9,
        "text_tokens": count_text_tokens(tokenizer, options.prompt),
        "repeats": options.repeats,
        "warmup": options.warmup,
        "decode_tokens": options.decode_tokens,
    }


def synthetic_image(width: int, height: int) -> bytes:
    """A JPEG file of that size with something to see everywhere."""
    file = BytesIO()
    picture = Image.merge("RGB", [Image.effect_mandelbrot((width, height), (-2, -1.2, 1, 1.2), q) for q in (9, 30, 99)])
    picture.save(file, "JPEG", quality=90)
    return file.getvalue()


def prompt_of(tokenizer, text_tokens: int | None) -> str:
    """A question that makes a prompt of so many text tokens, the conversation's template and BOS among them.

    None: TEXT_TOKENS, or what the shortest question makes where the template alone takes as many.
    """
    template = count_text_tokens(tokenizer, "a") - 1
    text_tokens = text_tokens or max(TEXT_TOKENS, template + 1)
    question = " ".join(["a"] * (text_tokens - template))
    if not question or count_text_tokens(tokenizer, question) != text_tokens:
        raise InputError(
            f"no question makes {text_tokens} text tokens with this tokenizer, whose template alone takes {template}; "
            "give another number, or the prompt itself"
        )
    return question


def count_text_tokens(tokenizer, prompt: str) -> int:
    """Of a prompt about one image."""
    ids = encode_messages(tokenizer, build_messages(prompt, images=1))
    return sum(id != PLACEHOLDER_ID for id in ids)
