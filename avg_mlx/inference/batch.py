"""Many questions at a time: images are seen together, and answers are decoded together."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict, Unpack

from ..errors import AvgMlxError, InputError, failure
from ..inputs.image import Crops
from ..inputs.image_io import MAX_PIXELS
from ..inputs.prompt import Messages
from ..inputs.tokenizer import Tokenizer
from ..model.avg_llava import Model
from .answer import Answer
from .caches import VisionCache
from .generation import token_limit
from .options import (
    AUTO,
    MAX_TOKENS,
    PREFILL_STEP_SIZE,
    Granularity,
    LogitsProcessor,
    Looking,
    Sampler,
    check_max_tokens,
    check_names,
)
from .prefill import check_joinable, prefill
from .steps import Images, Layout, Stopwatch, prepare, read_crops

BATCH_SIZE = 8


@dataclass(frozen=True)
class Request:
    """A question of a batch; its fields are parameters of `stream_generate`."""

    prompt: str | Messages
    image: Images = None
    granularity: Granularity = AUTO
    max_visual_tokens: int | None = None
    system_prompt: str | None = None
    max_tokens: int = MAX_TOKENS
    token_cost: float = 0.0

    @property
    def looking(self) -> Looking:
        """How closely to look at its images."""
        return Looking(self.granularity, self.max_visual_tokens, self.token_cost, self.system_prompt)


class BatchOptions(TypedDict, total=False):
    """The options that all questions of a batch share; `Batch` has their defaults."""

    batch_size: int
    max_pixels: int
    sampler: Sampler | None
    logits_processors: Sequence[LogitsProcessor] | None
    prefill_step_size: int


@dataclass
class _Answering:
    """A request whose prompt is in its KV cache, except for the last position."""

    layout: Layout
    limit: int
    ids: list[int]  # one for each of the prompt's positions
    layers: list[Any]
    tokens: list[int] = field(default_factory=list)  # of the answer


def generate_batch(
    model: Model, tokenizer: Tokenizer, requests: Sequence[Request], **options: Unpack[BatchOptions]
) -> list[Answer | AvgMlxError]:
    """Return the answers in the order of `requests`, or the error in place of an answer that cannot be given.

    Options and errors raised are those of `stream_batch`.
    """
    answers = dict(stream_batch(model, tokenizer, requests, **options))
    return [answers[n] for n in range(len(requests))]


def stream_batch(
    model: Model, tokenizer: Tokenizer, requests: Sequence[Request], **options: Unpack[BatchOptions]
) -> Iterator[tuple[int, Answer | AvgMlxError]]:
    """Answer `requests`, `batch_size` together; yields a request's number and its answer as each is complete.

    Answers equal those of `generate`. A request that cannot be answered yields its error, whatever that is, and the
    others go on. Where a group fails as a whole, its requests are answered one by one.
    Preprocess and vision seconds of an answer are those of its whole batch. Options: batch_size, max_pixels,
    sampler, logits_processors and prefill_step_size. Raises OptionError or InputError at once for options that are
    unknown or cannot be used.
    """
    check_names(options, BatchOptions)
    batch = _Batch(model, tokenizer, **options)
    for name in ("batch_size", "prefill_step_size"):
        if getattr(batch, name) < 1:
            raise InputError(f"{name} is {getattr(batch, name)}; expected 1 or more")
    return batch.answer(requests)


@dataclass
class _Batch:
    """Answers requests in groups of `batch_size`."""

    model: Model
    tokenizer: Tokenizer
    batch_size: int = BATCH_SIZE
    max_pixels: int = MAX_PIXELS
    sampler: Sampler | None = None
    logits_processors: Sequence[LogitsProcessor] | None = None
    prefill_step_size: int = PREFILL_STEP_SIZE

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer | AvgMlxError]]:
        """Answer one group after the other."""
        cache = VisionCache(self.model)
        numbered = list(enumerate(requests))
        for start in range(0, len(numbered), self.batch_size):
            yield from self._answer_group(dict(numbered[start : start + self.batch_size]), cache)

    def _answer_group(
        self, requests: Mapping[int, Request], cache: VisionCache
    ) -> Iterator[tuple[int, Answer | AvgMlxError]]:
        """Answer requests together. If that fails, answer what is left one by one, so that only the culprit fails."""
        left = dict(requests)
        try:
            for n, outcome in self._answer_together(requests, cache):
                del left[n]
                yield n, outcome
            return
        except Exception as error:  # such as a MemoryError, which may be of all that the group holds
            failed = failure(error)
        if len(requests) == 1:
            yield from dict.fromkeys(left, failed).items()
        else:
            for n, request in left.items():
                yield from self._answer_group({n: request}, cache)

    def _answer_together(
        self, requests: Mapping[int, Request], cache: VisionCache
    ) -> Iterator[tuple[int, Answer | AvgMlxError]]:
        """Prepare and decode a group."""
        answerings: dict[int, _Answering] = {}
        for n, outcome in self._prepare(requests, cache):
            if isinstance(outcome, _Answering):
                answerings[n] = outcome
            else:
                yield n, outcome
        yield from self._decode(answerings)

    def _prepare(
        self, requests: Mapping[int, Request], cache: VisionCache
    ) -> Iterator[tuple[int, _Answering | AvgMlxError]]:
        """See all images in one go, then prefill each request into a KV cache of its own."""
        clock = Stopwatch()
        images: dict[int, list[Crops]] = {}
        for n, request in requests.items():
            try:
                request.looking.check(self.model.config)
                check_max_tokens(request.max_tokens)
                images[n] = read_crops(request.image, self.model.config, self.max_pixels)
            except AvgMlxError as error:
                yield n, failure(error)
        preprocess = clock.lap()
        together = [crops for several in images.values() for crops in several]
        unseen = {crops.digest for crops in together if crops not in cache}
        vision = clock.lap(*cache.features(together))
        for n, crops in images.items():
            first_seen = unseen & {c.digest for c in crops}
            unseen -= first_seen
            try:
                answering = self._prefill(requests[n], crops, cache)
            except AvgMlxError as error:
                yield n, failure(error)
                continue
            layout = answering.layout
            seconds = replace(layout.seconds, preprocess=preprocess, vision=vision)
            calls = layout.vision_calls + len(first_seen)
            yield n, replace(answering, layout=replace(layout, seconds=seconds, vision_calls=calls))

    def _prefill(self, request: Request, crops: list[Crops], cache: VisionCache) -> _Answering:
        """Prepare a request and put all positions but the last into a KV cache."""
        from mlx_lm.models.cache import make_prompt_cache

        prepared = prepare(self.model, self.tokenizer, request.prompt, crops, request.looking, cache)
        layout = prepared.layout
        check_joinable(layout)
        clock = Stopwatch()
        layers = make_prompt_cache(self.model.language_model)
        for _ in prefill(self.model, prepared.embeddings[:-1], layers, self.prefill_step_size):
            pass
        layout.seconds.prefill += clock.lap()
        limit = token_limit(self.model, layout, request.max_tokens)
        return _Answering(layout, limit, layout.position_ids(self.tokenizer.bos_token_id or 0), layers)

    def _decode(self, answerings: dict[int, _Answering]) -> Iterator[tuple[int, Answer]]:
        """Decode all answers token by token, and yield each as it ends."""
        from mlx_lm.generate import BatchGenerator

        if not answerings:
            return
        clock = Stopwatch()
        generator = BatchGenerator(
            self.model.language_model,
            stop_tokens=[[token] for token in self.tokenizer.eos_token_ids],
            sampler=self.sampler,
            logits_processors=list(self.logits_processors or ()),
            completion_batch_size=len(answerings),
            prefill_batch_size=len(answerings),
        )
        with closing(generator):
            uids = generator.insert(
                [a.ids[-1:] for a in answerings.values()],
                max_tokens=[a.limit for a in answerings.values()],
                caches=[a.layers for a in answerings.values()],
                all_tokens=[a.ids[:-1] for a in answerings.values()],
            )
            numbers = dict(zip(uids, answerings, strict=True))
            for answering in answerings.values():
                answering.layers = []  # the generator merges them
            generation = 0.0
            while responses := generator.next_generated():
                generation += clock.lap()
                for response in responses:
                    n = numbers[response.uid]
                    answerings[n].tokens.append(response.token)
                    if response.finish_reason is not None:
                        answerings[n].layout.seconds.generation = generation
                        yield n, self._answer(answerings[n])

    def _answer(self, answering: _Answering) -> Answer:
        tokens = answering.tokens
        stopped = tokens[-1] in self.tokenizer.eos_token_ids
        detokenizer = self.tokenizer.detokenizer
        for token in tokens[:-1] if stopped else tokens:
            detokenizer.add_token(token)
        detokenizer.finalize()
        return Answer.of(detokenizer.text, tokens, stopped, answering.layout, reused=0)
