"""A streamed answer, around mlx-lm's decoding loop."""

import contextlib
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx

from ..errors import InputError
from ..inputs.image_io import MAX_PIXELS
from ..inputs.prompt import Messages
from ..model.avg_llava import Model
from .caches import Key, Loan, PrefixCache
from .view import AUTO, Images, Layout, Stopwatch, View, Views, look

MAX_TOKENS = 256

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]  # (tokens so far, logits) → logits


@dataclass(frozen=True)
class Timings:
    """Seconds per stage, and tokens per second."""

    preprocess: float
    vision: float
    router: float
    prefill: float  # packing, and the prompt's way through the language model up to the first token
    prompt_tokens_per_second: float  # of those that were prefilled
    generation_tokens_per_second: float  # of the tokens after the first

    @property
    def time_to_first_token(self) -> float:
        return self.preprocess + self.vision + self.router + self.prefill


@dataclass(frozen=True)
class Counters:
    """The work that an answer took."""

    vision_calls: int  # images that went through the vision tower
    router_calls: int  # images that were routed
    prefilled: int  # positions that went through the language model before the first token
    reused: int  # positions before them, whose KV was there


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
    counters: Counters
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
    image: Images = None,
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
    check_decoding(model, max_tokens, max_kv_size, step_options)
    stopwatch = Stopwatch()
    # What look returns is not held here, so that `stream_answer` can let go of it.
    yield from stream_answer(
        model,
        tokenizer,
        look(
            model,
            tokenizer,
            prompt,
            image,
            granularity=granularity,
            max_visual_tokens=max_visual_tokens,
            system_prompt=system_prompt,
            max_pixels=max_pixels,
            stopwatch=stopwatch,
        ),
        stopwatch,
        max_tokens=max_tokens,
        max_kv_size=max_kv_size,
        **step_options,
    )


def stream_answer(
    model: Model,
    tokenizer,
    views: Views,
    stopwatch: Stopwatch,
    *,
    max_tokens: int = MAX_TOKENS,
    max_kv_size: int | None = None,
    kv: PrefixCache | None = None,
    **step_options: Any,
) -> Generator[Segment, None, None]:
    """Answer a prompt whose images have been looked at; options as for `stream_generate`.

    kv: what it holds of the prompt is not prefilled again. Rotating and quantized caches always start afresh.
    """
    embeddings = views.embeddings(model)
    mx.eval(embeddings)
    layout = views.layout()
    del views  # and with it the features
    ids = layout.position_ids(tokenizer.bos_token_id or 0)
    if kv is not None and max_kv_size is None and step_options.get("kv_bits") is None:
        store, keys = kv, layout.position_keys()
    else:
        store, keys = PrefixCache(), list[Key](ids)
    limit = token_limit(model, layout, max_tokens)
    detokenizer = tokenizer.detokenizer
    tokens: list[int] = []
    text = ""
    with store.lend(keys, _empty_layers(model, max_kv_size)) as loan:
        for token in _decode(model, ids, embeddings, loan, limit, step_options):
            if not tokens:
                stopwatch.clock("prefill")
            tokens.append(token)
            loan.keys.append(token)
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
    answer = make_answer(text + segment, tokens, stopped, layout, loan.reused, stopwatch.seconds)
    yield Segment(segment, token, answer)


def token_limit(model: Model, layout: Layout, max_tokens: int) -> int:
    """How many new tokens there may be; -1 asks for all that the context has room for."""
    room = model.config.context_length - layout.positions + 1  # the last token need not enter the model again
    return room if max_tokens == -1 else min(max_tokens, room)


def _empty_layers(model: Model, max_kv_size: int | None) -> list[Any]:
    from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

    if max_kv_size is None:
        return make_prompt_cache(model.language_model)
    # generate_step's own is not heard by models that make their cache themselves
    return [RotatingKVCache(max_kv_size, keep=4) for _ in model.language_model.layers]


def _decode(
    model: Model, ids: list[int], embeddings: mx.array, loan: Loan, limit: int, options: dict[str, Any]
) -> Iterator[int]:
    """Token after token, the end-of-sequence token included.

    ids: for what reads the prompt's, such as repetition penalties; visual tokens pass as BOS, which no answer has.
    """
    from mlx_lm.generate import generate_step, generation_stream, wired_limit

    reused, new = mx.split(mx.array(ids), [loan.reused])
    processors = [_after(reused, processor) for processor in options.pop("logits_processors", None) or []]
    with contextlib.ExitStack() as stack:
        with contextlib.redirect_stdout(sys.stderr):  # wired_limit prints its warning
            stack.enter_context(wired_limit(model, cast(list[mx.Stream], [generation_stream])))
        for token, _ in generate_step(
            new,
            model.language_model,
            max_tokens=limit,
            input_embeddings=embeddings[loan.reused :],
            prompt_cache=loan.layers,
            logits_processors=processors,
            **options,
        ):
            yield int(token)


def _after(reused: mx.array, processor: LogitsProcessor) -> LogitsProcessor:
    """A logits processor that is shown the tokens that were not prefilled, too."""
    return lambda tokens, logits: processor(mx.concatenate([reused, tokens]), logits)


def make_answer(
    text: str, tokens: list[int], stopped: bool, layout: Layout, reused: int, seconds: dict[str, float]
) -> Answer:
    """The answer of these tokens; `seconds` of preprocess, vision, router, prefill and generation."""
    prefilled = layout.positions - reused
    return Answer(
        text=text,
        token_ids=tuple(tokens),
        finish_reason="stop" if stopped else "length",
        views=layout.views,
        prompt_token_ids=layout.ids,
        prompt_tokens=layout.positions,
        timings=Timings(
            preprocess=seconds["preprocess"],
            vision=seconds["vision"],
            router=seconds["router"],
            prefill=seconds["prefill"],
            prompt_tokens_per_second=prefilled / seconds["prefill"],
            generation_tokens_per_second=(len(tokens) - 1) / seconds["generation"],
        ),
        counters=Counters(
            vision_calls=layout.vision_calls,
            router_calls=sum(view.routing is not None for view in layout.views),
            prefilled=prefilled,
            reused=reused,
        ),
        peak_memory_gb=mx.get_peak_memory() / 1e9,
    )


def check_decoding(model: Model, max_tokens: int, max_kv_size: int | None, step_options: dict[str, Any]) -> None:
    """Raise InputError for options of decoding that cannot be used."""
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
