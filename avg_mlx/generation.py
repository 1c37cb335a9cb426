"""A streamed answer, around mlx-lm's decoding loop."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx

from .errors import InputError
from .image_io import MAX_PIXELS, ImageSource
from .model import Model
from .prompt import Messages
from .view import AUTO, Stopwatch, View, Views, look

MAX_TOKENS = 256


@dataclass(frozen=True)
class Timings:
    """Seconds per stage, and tokens per second."""

    preprocess: float
    vision: float
    router: float
    prefill: float  # packing, and the prompt's way through the language model up to the first token
    prompt_tokens_per_second: float
    generation_tokens_per_second: float  # of the tokens after the first

    @property
    def time_to_first_token(self) -> float:
        return self.preprocess + self.vision + self.router + self.prefill


@dataclass(frozen=True)
class Answer:
    """A finished generation."""

    text: str
    token_ids: tuple[int, ...]  # with the end-of-sequence token where it was reached
    finish_reason: str  # "stop" or "length"
    views: tuple[View, ...]  # one for each image
    prompt_token_ids: tuple[int, ...]  # text, and -200 for each image
    prompt_tokens: int  # positions that entered the language model
    timings: Timings
    peak_memory_gb: float


@dataclass(frozen=True)
class Segment:
    """A piece of the answer as it is decoded; the last one carries the whole answer."""

    text: str
    token_id: int
    answer: Answer | None = None


def generate(model: Model, tokenizer, prompt: str | Messages, image=None, **options: Any) -> Answer:
    """The whole answer at once; parameters as for `stream_generate`."""
    for segment in stream_generate(model, tokenizer, prompt, image, **options):
        if segment.answer is not None:
            return segment.answer
    raise AssertionError("stream_generate ends with an answer")


def route(model: Model, tokenizer, prompt: str | Messages, image, **options: Any) -> tuple[View, ...]:
    """How closely each image would be looked at, without generating; options as for `stream_generate`.

    Of these: max_visual_tokens, system_prompt and max_pixels.
    """
    return look(model, tokenizer, prompt, image, **options).views


def stream_generate(
    model: Model,
    tokenizer,
    prompt: str | Messages,
    image: ImageSource | Sequence[ImageSource] | None = None,
    *,
    granularity: int | str = AUTO,
    max_visual_tokens: int | None = None,
    system_prompt: str | None = None,
    max_pixels: int = MAX_PIXELS,
    max_tokens: int = MAX_TOKENS,
    max_kv_size: int | None = None,
    **step_options: Any,
) -> Iterator[Segment]:
    """Answer a question about any number of images, segment by segment.

    prompt: a question, or messages of role ("system", "user", "assistant") and content, where `<image>` marks an
    image's place. image: path, http(s) URL, data URI, bytes or Pillow image, or several. granularity: "auto", for
    the router, or visual tokens per crop. max_visual_tokens: a budget for each image, within which the router
    chooses. max_pixels: larger images are refused. max_tokens: new tokens at most, -1 for as many as the context
    has room for, where it always ends. max_kv_size: positions that a rotating KV cache keeps. step_options:
    mlx-lm's `generate_step` takes them: sampler, logits_processors, prefill_step_size, kv_bits, kv_group_size,
    quantized_kv_start, prompt_progress_callback.

    Raises InputError for what cannot be used.
    """
    _check_decoding(model, max_tokens, max_kv_size, step_options)
    stopwatch = Stopwatch()
    views = look(
        model,
        tokenizer,
        prompt,
        image,
        granularity=granularity,
        max_visual_tokens=max_visual_tokens,
        system_prompt=system_prompt,
        max_pixels=max_pixels,
        stopwatch=stopwatch,
    )
    room = model.config.context_length - views.positions + 1  # the last token need not enter the model again
    limit = room if max_tokens == -1 else min(max_tokens, room)
    detokenizer = tokenizer.detokenizer
    tokens: list[int] = []
    text = ""
    for token in _decode(model, tokenizer, views, limit, max_kv_size, step_options):
        if not tokens:
            stopwatch.clock("prefill")
        tokens.append(token)
        stopped = token in tokenizer.eos_token_ids
        if not stopped:
            detokenizer.add_token(token)
        if stopped or len(tokens) == limit:
            break
        segment = detokenizer.last_segment
        text += segment
        yield Segment(segment, token)
    detokenizer.finalize()
    segment = detokenizer.last_segment
    stopwatch.clock("generation")
    yield Segment(segment, token, _answer(text + segment, tokens, stopped, views, stopwatch.seconds))


def _decode(
    model: Model, tokenizer, views: Views, limit: int, max_kv_size: int | None, options: dict[str, Any]
) -> Iterator[int]:
    """Token after token, the end-of-sequence token included."""
    from mlx_lm.generate import generate_step, generation_stream, wired_limit
    from mlx_lm.models.cache import RotatingKVCache

    if max_kv_size is not None:  # generate_step's own is not heard by models that make their cache themselves
        options["prompt_cache"] = [RotatingKVCache(max_kv_size, keep=4) for _ in model.language_model.layers]
    embeddings = views.embeddings(model)
    mx.eval(embeddings)
    # Repetition penalties read the prompt's ids. Visual tokens pass as BOS, which no answer contains.
    ids = mx.array(views.position_ids(tokenizer.bos_token_id or 0))
    with contextlib.ExitStack() as stack:
        with contextlib.redirect_stdout(sys.stderr):  # wired_limit prints its warning
            stack.enter_context(wired_limit(model, cast(list[mx.Stream], [generation_stream])))
        for token, _ in generate_step(
            ids, model.language_model, max_tokens=limit, input_embeddings=embeddings, **options
        ):
            yield int(token)


def _answer(text: str, tokens: list[int], stopped: bool, views: Views, seconds: dict[str, float]) -> Answer:
    timings = Timings(
        preprocess=seconds["preprocess"],
        vision=seconds["vision"],
        router=seconds["router"],
        prefill=seconds["prefill"],
        prompt_tokens_per_second=views.positions / seconds["prefill"],
        generation_tokens_per_second=(len(tokens) - 1) / seconds["generation"],
    )
    return Answer(
        text=text,
        token_ids=tuple(tokens),
        finish_reason="stop" if stopped else "length",
        views=views.views,
        prompt_token_ids=views.ids,
        prompt_tokens=views.positions,
        timings=timings,
        peak_memory_gb=mx.get_peak_memory() / 1e9,
    )


def _check_decoding(model: Model, max_tokens: int, max_kv_size: int | None, step_options: dict[str, Any]) -> None:
    if max_tokens < 1 and max_tokens != -1:
        raise InputError(f"max_tokens is {max_tokens}; expected 1 or more, or -1 for as many as fit")
    kv_bits, group_size = step_options.get("kv_bits"), step_options.get("kv_group_size", 64)
    if kv_bits is None:
        return
    if max_kv_size is not None:
        raise InputError("a rotating KV cache (max_kv_size) cannot be quantized (kv_bits); choose one")
    text = model.config.text
    head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    if head_dim % group_size:
        raise InputError(
            f"kv_group_size is {group_size}, which does not divide this model's head size {head_dim}; "
            "choose one that does, or leave kv_bits out"
        )
