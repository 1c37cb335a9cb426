"""What happens to a request before its answer, in steps between which the other answers go on."""

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any

from ...errors import InputError
from ...explaining.explain import explain_views
from ...explaining.explanation import Explanation
from ...inference.caches import VisionCache
from ...inference.generation import token_limit
from ...inference.options import AUTO
from ...inference.prefill import check_joinable, prefill
from ...inference.steps import Layout, PreparedPrompt, Seconds, Seen, Stopwatch, choose, compose
from ...inference.view import View
from ...inputs.prompt import build_messages, encode_messages
from ...inputs.tokenizer import Tokenizer
from ...model.avg_llava import Model
from ..jobs import Job, Routed
from .admission import Admission
from .decoder import Decoder
from .prefixes import Prefixes
from .row import Row
from .scores import Vocabulary
from .tally import Tally
from .work import Work


@dataclass
class Preparation:
    """Looks at the images of a request, chooses how closely, puts its prompt into KV, and lets its answer begin."""

    model: Model
    tokenizer: Tokenizer
    vision: VisionCache
    prefixes: Prefixes
    admission: Admission
    decoder: Decoder
    tally: Tally
    step_size: int
    load_cost: Callable[[], float]  # the token cost of what waits now

    def __post_init__(self) -> None:
        self._vocabulary = Vocabulary(self.tokenizer)

    def steps(self, work: Work) -> Generator[None]:
        """Prepare a request, step by step. Raises InputError for what the client gave, before `Routed` is told."""
        seen = yield from self._look(work.job)
        views = self._choose(work, seen)
        if work.job.route_only:
            explaining = work.job.explain
            explained = explain_views(self.model, self.tokenizer, seen, views) if explaining else ()
            self._tell(work, seen, views, explained)
            self.tally.outcomes["routed"] += 1
            return
        prepared = compose(self.model, seen, views)
        limit = self._limit(prepared.layout, work.job.max_tokens)
        self._tell(work, seen, views)
        work.drop_images()
        del seen  # and with it the features
        while not self.admission.admit(work, prepared.layout.positions + limit - 1):
            yield
        layers, reused = yield from self._prefill(prepared)
        row = Row(work, prepared.layout, limit, reused, self.tokenizer, self._vocabulary)
        self.decoder.insert(row, layers)

    def _look(self, job: Job) -> Generator[None, None, Seen]:
        """Read the messages, then let one image after the other pass the vision tower."""
        clock = Stopwatch()
        messages = build_messages(job.messages, len(job.images))
        ids = encode_messages(self.tokenizer, messages, limit=self.model.config.context_length)
        text = self.model.embed_text(ids)
        seconds = Seconds(preprocess=job.preprocess_seconds + clock.lap(text))
        missed, features = self.vision.misses, []
        for crops in job.images:
            yield
            clock = Stopwatch()
            features += self.vision.features([crops])
            seconds.vision += clock.lap(features[-1])
        yield
        return Seen(tuple(ids), text, job.images, tuple(features), self.vision.misses - missed, seconds)

    def _choose(self, work: Work, seen: Seen) -> tuple[View, ...]:
        """Choose how closely to look at each image; a full queue makes visual tokens dearer."""
        ways = work.job.looking
        if (cost := self.load_cost()) and self.model.config.has_router:
            ways = tuple(replace(w, token_cost=w.token_cost + cost) if w.granularity == AUTO else w for w in ways)
        work.under_load = ways != work.job.looking
        return choose(self.model, seen, ways)

    def _limit(self, layout: Layout, max_tokens: int) -> int:
        """How many tokens the answer may have. Raises InputError if it cannot join others, or fits into no memory."""
        check_joinable(layout)
        limit, most = token_limit(self.model, layout, max_tokens), self.admission.longest
        if max_tokens == -1:
            limit = min(limit, most - layout.positions + 1)
        if limit < 1 or layout.positions + limit - 1 > most:
            raise InputError(
                f"the prompt takes {layout.positions} positions, and with its answer more than the {most} that this "
                "server has memory for; ask for fewer tokens, shorten it, or look less closely"
            )
        return limit

    def _tell(self, work: Work, seen: Seen, views: tuple[View, ...], explained: tuple[Explanation, ...] = ()) -> None:
        """Tell that looking succeeded."""
        positions = len(seen.text) + sum(view.visual_tokens for view in views)
        waited = work.waited(seen.seconds.vision + seen.seconds.router)
        self.tally.routed(views, positions, seen.vision_calls, work.under_load)
        self.tally.worked(seen.seconds)
        seconds = replace(seen.seconds)
        work.tell(Routed(views, positions, work.under_load, seen.vision_calls, seconds, waited, explained))

    def _prefill(self, prepared: PreparedPrompt) -> Generator[None, None, tuple[list[Any], int]]:
        """Put all positions but the last into KV, and keep it for others; returns it and what was there already."""
        from mlx_lm.models.cache import make_prompt_cache

        keys = prepared.layout.position_keys()[:-1]
        layers, reused = self.prefixes.find(keys)
        layers = layers or make_prompt_cache(self.model.language_model)
        clock = Stopwatch()
        for _ in prefill(self.model, prepared.embeddings[reused:-1], layers, self.step_size):
            prepared.layout.seconds.prefill += clock.lap()
            yield
            clock = Stopwatch()
        self.prefixes.keep(keys, layers)
        self.tally.worked(Seconds(prefill=prepared.layout.seconds.prefill))
        return layers, reused
