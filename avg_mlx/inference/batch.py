"""Many questions at a time: images seen together, answers decoded together."""

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

from ..errors import AvgMlxError, InputError
from ..inputs.image import Crops
from ..inputs.image_io import MAX_PIXELS
from ..inputs.prompt import PLACEHOLDER_ID, Messages
from ..model.avg_llava import Model
from .caches import VisionCache
from .generation import MAX_TOKENS, Answer, LogitsProcessor, check_decoding, make_answer, token_limit
from .view import AUTO, Images, Layout, Stopwatch, look, read_crops

BATCH_SIZE = 8
PREFILL_STEP_SIZE = 2048


@dataclass(frozen=True)
class Request:
    """A question of a batch; its fields are parameters of `stream_generate`."""

    prompt: str | Messages
    image: Images = None
    granularity: int | str = AUTO
    max_visual_tokens: int | None = None
    system_prompt: str | None = None
    max_tokens: int = MAX_TOKENS


@dataclass
class _Answering:
    """A request whose prompt is in the KV cache but for the last position."""

    layout: Layout
    limit: int
    ids: list[int]  # of the prompt's positions
    layers: list[Any]
    seconds: dict[str, float]
    tokens: list[int] = field(default_factory=list)  # of the answer


def generate_batch(model: Model, tokenizer, requests: Sequence[Request], **options: Any) -> list[Answer | AvgMlxError]:
    """The answers in the order of `requests`; in place of one that cannot be given, what is wrong with its request.

    Options as for `stream_batch`.
    """
    answers = dict(stream_batch(model, tokenizer, requests, **options))
    return [answers[n] for n in range(len(requests))]


def stream_batch(
    model: Model,
    tokenizer,
    requests: Sequence[Request],
    *,
    batch_size: int = BATCH_SIZE,
    max_pixels: int = MAX_PIXELS,
    sampler=None,
    logits_processors: list[LogitsProcessor] | None = None,
    prefill_step_size: int = PREFILL_STEP_SIZE,
) -> Iterator[tuple[int, Answer | AvgMlxError]]:
    """Answer `requests`, `batch_size` together; yields a request's number and its answer as each is complete.

    Answers are those of `generate`. A request that cannot be answered yields its error, and the others go on. An
    answer's timings: preprocess and vision are its whole batch's.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; expected 1 or more")
    vision = VisionCache(model)
    numbered = list(enumerate(requests))
    for start in range(0, len(numbered), batch_size):
        batch = dict(numbered[start : start + batch_size])
        prepared: dict[int, _Answering] = {}
        for n, outcome in _prepare(model, tokenizer, batch, vision, max_pixels, prefill_step_size):
            if isinstance(outcome, _Answering):
                prepared[n] = outcome
            else:
                yield n, outcome
        yield from _decode(model, tokenizer, prepared, sampler, logits_processors)


def _prepare(
    model: Model, tokenizer, batch: dict[int, Request], vision: VisionCache, max_pixels: int, prefill_step_size: int
) -> Iterator[tuple[int, _Answering | AvgMlxError]]:
    """Look at all images, then prefill each request into its own KV cache."""
    stopwatch = Stopwatch()
    images: dict[int, list[Crops]] = {}
    for n, request in batch.items():
        try:
            check_decoding(model, request.max_tokens, None, {})
            images[n] = read_crops(request.image, model.config, max_pixels)
        except AvgMlxError as error:
            yield n, error
    stopwatch.clock("preprocess")
    together = [crops for several in images.values() for crops in several]
    unseen = {crops.digest for crops in together if crops not in vision}
    stopwatch.clock("vision", *vision.features(together))
    for n, crops in images.items():
        first_seen = unseen & {c.digest for c in crops}
        unseen -= first_seen
        own = Stopwatch()
        try:
            embeddings, layout = _look(model, tokenizer, batch[n], crops, vision, own)
        except AvgMlxError as error:
            yield n, error
            continue
        layers = _prefill(model, embeddings, prefill_step_size)
        own.clock("prefill")
        layout = replace(layout, vision_calls=layout.vision_calls + len(first_seen))
        limit = token_limit(model, layout, batch[n].max_tokens)
        ids = layout.position_ids(tokenizer.bos_token_id or 0)
        yield n, _Answering(layout, limit, ids, layers, {**own.seconds, **stopwatch.seconds})


def _look(
    model: Model, tokenizer, request: Request, crops: list[Crops], vision: VisionCache, stopwatch: Stopwatch
) -> tuple[mx.array, Layout]:
    views = look(
        model,
        tokenizer,
        request.prompt,
        crops,
        granularity=request.granularity,
        max_visual_tokens=request.max_visual_tokens,
        system_prompt=request.system_prompt,
        vision=vision,
        stopwatch=stopwatch,
    )
    if views.ids[-1] == PLACEHOLDER_ID:  # mlx-lm decodes batches from a token
        raise InputError("this chat template ends with the image, which a batch cannot; ask one by one")
    return views.embeddings(model), views.layout()


def _prefill(model: Model, embeddings: mx.array, step: int) -> list[Any]:
    """The KV of all positions but the last."""
    from mlx_lm.models.cache import make_prompt_cache

    layers = make_prompt_cache(model.language_model)
    embeddings = embeddings[:-1]
    for start in range(0, len(embeddings), step):
        model.hidden(embeddings[None, start : start + step], layers)
        mx.eval([layer.state for layer in layers])
        mx.clear_cache()
    return layers


def _decode(
    model: Model, tokenizer, prepared: dict[int, _Answering], sampler, logits_processors: list[LogitsProcessor] | None
) -> Iterator[tuple[int, Answer]]:
    """All answers token by token, each as it ends."""
    from mlx_lm.generate import BatchGenerator

    if not prepared:
        return
    start = time.perf_counter()
    generator = BatchGenerator(
        model.language_model,
        stop_tokens=[[token] for token in tokenizer.eos_token_ids],
        sampler=sampler,
        logits_processors=logits_processors,
        completion_batch_size=len(prepared),
        prefill_batch_size=len(prepared),
    )
    with closing(generator):
        answerings = prepared.values()
        uids = generator.insert(
            [a.ids[-1:] for a in answerings],
            max_tokens=[a.limit for a in answerings],
            caches=[a.layers for a in answerings],
            all_tokens=[a.ids[:-1] for a in answerings],
        )
        numbers = dict(zip(uids, prepared, strict=True))
        for answering in answerings:
            answering.layers = []  # the generator merges them
        while responses := generator.next_generated():
            for response in responses:
                n = numbers[response.uid]
                prepared[n].tokens.append(response.token)
                if response.finish_reason is not None:
                    yield n, _answer(tokenizer, prepared[n], time.perf_counter() - start)


def _answer(tokenizer, answering: _Answering, generation: float) -> Answer:
    tokens = answering.tokens
    stopped = tokens[-1] in tokenizer.eos_token_ids
    detokenizer = tokenizer.detokenizer
    for token in tokens[:-1] if stopped else tokens:
        detokenizer.add_token(token)
    detokenizer.finalize()
    seconds = {**answering.seconds, "generation": generation}
    return make_answer(detokenizer.text, tokens, stopped, answering.layout, 0, seconds)
