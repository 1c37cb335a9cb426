"""The whole way from image and question to a streamed answer, around mlx-lm's decoding loop."""

import contextlib
import sys
from collections.abc import Generator, Iterator
from typing import Any, Unpack, cast

import mlx.core as mx

from ..inputs.prompt import Messages
from ..inputs.tokenizer import Tokenizer
from ..model.avg_llava import Model
from .answer import Answer, Segment
from .caches import Key, Loan, PrefixCache
from .options import (
    Decoding,
    GenerateOptions,
    LogitsProcessor,
    Looking,
    RouteOptions,
    check_names,
    pick,
)
from .steps import Images, Layout, PreparedPrompt, Stopwatch, choose, prepare, see
from .view import View


def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str | Messages,
    image: Images = None,
    **options: Unpack[GenerateOptions],
) -> Answer:
    """Give the whole answer at once; parameters as for `stream_generate`."""
    *_, last = stream_generate(model, tokenizer, prompt, image, **options)
    assert last.answer is not None
    return last.answer


def route(
    model: Model, tokenizer: Tokenizer, prompt: str | Messages, image: Images, **options: Unpack[RouteOptions]
) -> tuple[View, ...]:
    """Tell how closely each image would be looked at, without generating; options as for `stream_generate`."""
    check_names(options, RouteOptions)
    looking = pick(Looking, options)
    looking.check(model.config)
    return choose(model, see(model, tokenizer, prompt, image, looking), looking)


def stream_generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str | Messages,
    image: Images = None,
    **options: Unpack[GenerateOptions],
) -> Iterator[Segment]:
    """Answer a question about any number of images, segment by segment.

    prompt: a question, or messages of role ("system", "user", "assistant") and content, where `<image>` marks an
    image's place. image: path, http(s) URL, data URI, bytes or Pillow image, or several. The options are the fields of
    `Looking` and `Decoding`, which describe them.

    Raises OptionError or InputError at once for options that are unknown or cannot be used, and InputError with the
    first segment for a prompt or an image that cannot be used.
    """
    check_names(options, GenerateOptions)
    looking, decoding = pick(Looking, options), pick(Decoding, options)
    looking.check(model.config)
    decoding.check(model.config)
    return answer(model, tokenizer, prompt, image, looking, decoding)


def answer(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str | Messages,
    images: Images,
    looking: Looking,
    decoding: Decoding,
) -> Iterator[Segment]:
    """Go the whole way: `prepare` sees the images, chooses how closely, and composes the input; `decode` answers."""
    prepared = prepare(model, tokenizer, prompt, images, looking)
    yield from decode(model, tokenizer, prepared, decoding)


def decode(
    model: Model,
    tokenizer: Tokenizer,
    prepared: PreparedPrompt,
    decoding: Decoding,
    kv: PrefixCache | None = None,
) -> Generator[Segment, None, None]:
    """Answer a prepared prompt.

    kv: positions that it holds are not prefilled again. Rotating and quantized caches always start afresh.
    """
    clock, layout = Stopwatch(), prepared.layout
    ids = layout.position_ids(tokenizer.bos_token_id or 0)
    store, keys = PrefixCache(), list[Key](ids)
    if kv is not None and decoding.plain_kv:
        store, keys = kv, layout.position_keys()
    limit = token_limit(model, layout, decoding.max_tokens)
    detokenizer = tokenizer.detokenizer
    tokens: list[int] = []
    text = ""
    with store.lend(keys, _empty_layers(model, decoding.max_kv_size)) as loan:
        for token in _tokens(model, ids, prepared.embeddings, loan, limit, decoding):
            if not tokens:
                layout.seconds.prefill += clock.lap()
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
    layout.seconds.generation = clock.lap()
    yield Segment(segment, token, Answer.of(text + segment, tokens, stopped, layout, loan.reused))


def token_limit(model: Model, layout: Layout, max_tokens: int) -> int:
    """How many new tokens there may be; -1 asks for all that the context has room for."""
    room = model.config.context_length - layout.positions + 1  # the last token need not enter the model again
    return room if max_tokens == -1 else min(max_tokens, room)


def _empty_layers(model: Model, max_kv_size: int | None) -> list[Any]:
    from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

    if max_kv_size is None:
        return make_prompt_cache(model.language_model)
    # generate_step ignores max_kv_size for models that make their cache themselves.
    return [RotatingKVCache(max_kv_size, keep=4) for _ in model.language_model.layers]


def _tokens(
    model: Model, ids: list[int], embeddings: mx.array, loan: Loan, limit: int, decoding: Decoding
) -> Iterator[int]:
    """Token after token, the end-of-sequence token included.

    ids: the prompt's, for processors such as repetition penalties; visual tokens pass as BOS, which no answer has.
    """
    from mlx_lm.generate import generate_step, generation_stream, wired_limit

    reused, new = mx.split(mx.array(ids), [loan.reused])
    with contextlib.ExitStack() as stack:
        with contextlib.redirect_stdout(sys.stderr):  # wired_limit prints its warning
            stack.enter_context(wired_limit(model, cast(list[mx.Stream], [generation_stream])))
        for token, _ in generate_step(
            new,
            model.language_model,
            max_tokens=limit,
            input_embeddings=embeddings[loan.reused :],
            prompt_cache=loan.layers,
            sampler=decoding.sampler,
            logits_processors=[_after(reused, processor) for processor in decoding.logits_processors or ()],
            prefill_step_size=decoding.prefill_step_size,
            kv_bits=decoding.kv_bits,
            kv_group_size=decoding.group_size(model.config) if decoding.kv_bits else 0,
            quantized_kv_start=decoding.quantized_kv_start,
            prompt_progress_callback=decoding.prompt_progress_callback,
        ):
            yield int(token)


def _after(reused: mx.array, processor: LogitsProcessor) -> LogitsProcessor:
    """A logits processor that also sees the tokens whose KV was reused."""
    return lambda tokens, logits: processor(mx.concatenate([reused, tokens]), logits)
