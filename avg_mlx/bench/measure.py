"""Where an answer's time and memory go at each granularity: both measured and counted."""

import contextlib
import platform
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from io import BytesIO
from typing import Any

import mlx.core as mx
from PIL import Image

from ..blas import BLAS
from ..config import Config
from ..errors import InputError
from ..inference.answer import Answer
from ..inference.generation import generate
from ..inference.options import AUTO, forcible
from ..inputs.image_io import ImageSource
from ..inputs.prompt import PLACEHOLDER_ID, build_messages, encode_messages
from ..inputs.tokenizer import Tokenizer
from ..model.avg_llava import Model
from ..model.inventory import dtype_name, parts_of
from ..progress import Progress, silent
from ..version import VERSION
from .cost import Cost, Work

STAGES = ("preprocess", "vision", "router", "prefill")
TEXT_TOKENS = 60
CERTAIN = 1e4  # a logit far above all others


@dataclass(frozen=True)
class Spread:
    """The median of a few measurements, with the least and the most."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Row:
    """What an answer takes at one granularity. Times are in seconds, and work is counted."""

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
        """The counted work of all stages before the first token."""
        return self.work["vision"] + self.work["router"] + self.work["prefill"]


@dataclass(frozen=True)
class Options:
    """What is asked, and how often. Every round passes all granularities, so that drift affects them alike.

    Raises InputError for numbers that are out of bounds.
    """

    prompt: str
    image: ImageSource
    granularities: tuple[int, ...]
    repeats: int = 3  # measured rounds
    warmup: int = 1  # rounds before them
    decode_tokens: int = 32  # after the first token

    def __post_init__(self) -> None:
        for name, least in (("repeats", 1), ("warmup", 0), ("decode_tokens", 1)):
            if (value := getattr(self, name)) < least:
                raise InputError(f"{name} is {value}; expected {least} or more")
        if not self.granularities:
            raise InputError("there is no granularity to measure; give one or more")

    def check(self, config: Config) -> None:
        """Raise InputError for a granularity that the model cannot be made to take."""
        choices = forcible(config)
        unknown = set(self.granularities) - set(choices)
        if unknown:
            listed = ", ".join(map(str, choices))
            raise InputError(f"granularity {min(unknown)} is not one of this model's; choose from {listed}")


def measure(model: Model, tokenizer: Tokenizer, options: Options, report: Progress = silent) -> list[Row]:
    """Measure each granularity, the coarsest first; `report` is called with the answers done and all answers.

    Raises InputError for options that the model cannot run.
    """
    options.check(model.config)
    granularities = sorted(options.granularities)
    answers: dict[int, list[Answer]] = {g: [] for g in granularities}
    rounds, done = options.warmup + options.repeats, 0
    with _endless(tokenizer):
        for n in range(rounds):
            for g in granularities:
                answer = ask(model, tokenizer, options, g)
                if n >= options.warmup:
                    answers[g].append(answer)
                report(done := done + 1, rounds * len(granularities))
    cost = cost_of(model)
    return [_row(g, answers[g], cost) for g in granularities]


def ask(model: Model, tokenizer: Tokenizer, options: Options, granularity: int) -> Answer:
    """Answer once at `granularity`; the router, where there is one, is run and chooses it."""
    mx.reset_peak_memory()
    with steered(model, granularity):
        return generate(
            model,
            tokenizer,
            options.prompt,
            options.image,
            granularity=AUTO if model.config.has_router else granularity,
            max_tokens=options.decode_tokens + 1,  # the first token is the prompt's
        )


@contextlib.contextmanager
def steered(model: Model, granularity: int) -> Iterator[None]:
    """Let the router do all its work, but let its last bias decide. Does nothing for a model without a router."""
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
def _endless(tokenizer: Tokenizer) -> Iterator[None]:
    """Let no token end an answer, so that all answers are equally long."""
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
    """A cost model of this model, with its weights' bits and with activations as wide as its unquantized weights."""
    bits = {part.name: part.bits_per_weight for part in parts_of(model)}
    return Cost(model.config, bits, 8 * model.dtype.size)


def describe(model: Model, tokenizer: Tokenizer, options: Options) -> dict[str, Any]:
    """What is measured, and on which device and versions."""
    parts = parts_of(model)
    kind = "CPU"
    if mx.default_device().type == mx.DeviceType.gpu:
        kind = "Metal" if mx.metal.is_available() else "CUDA"
    return {
        "device": kind,
        "chip": mx.device_info()["device_name"],
        "system": f"{platform.system()} {platform.machine()}",
        "blas": BLAS,
        "versions": {"avg-mlx": VERSION, **{name: version(name) for name in ("mlx", "mlx-lm")}},
        "dtype": dtype_name(model.dtype),
        "bits_per_weight": {part.name: round(part.bits_per_weight, 2) for part in parts},
        "parameters": sum(part.parameters for part in parts),
        "weights_gb": sum(part.bytes for part in parts) / 1e9,
        "text_tokens": count_text_tokens(tokenizer, options.prompt),
        "repeats": options.repeats,
        "warmup": options.warmup,
        "decode_tokens": options.decode_tokens,
    }


def synthetic_image(width: int, height: int) -> bytes:
    """A JPEG file of that size that has detail everywhere."""
    file = BytesIO()
    picture = Image.merge("RGB", [Image.effect_mandelbrot((width, height), (-2, -1.2, 1, 1.2), q) for q in (9, 30, 99)])
    picture.save(file, "JPEG", quality=90)
    return file.getvalue()


def prompt_of(tokenizer: Tokenizer, text_tokens: int | None) -> str:
    """A question that makes a prompt of that many text tokens, including the conversation's template and BOS.

    None stands for TEXT_TOKENS, or for the shortest prompt where the template alone takes that many. Raises InputError
    if no question gives exactly that many.
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


def count_text_tokens(tokenizer: Tokenizer, prompt: str) -> int:
    """The number of text tokens in a prompt about one image."""
    ids = encode_messages(tokenizer, build_messages(prompt, images=1))
    return sum(id != PLACEHOLDER_ID for id in ids)
