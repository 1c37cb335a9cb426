"""Questions are answered one after the other, in several modes from one look at each image."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import get_args

import mlx.core as mx

from ..inference.caches import VisionCache
from ..inference.generation import decode
from ..inference.options import AUTO, Decoding, Looking
from ..inference.steps import Seen, choose, compose, score, see
from ..inference.view import Routing, View, ViewSource
from ..inputs.prompt import TooLong
from ..inputs.tokenizer import Tokenizer
from ..model.avg_llava import Model
from .questions import Question, prompt_of
from .results import STAGES, Attempt, Result


@dataclass
class Answerer:
    """Answers greedily in all modes. Image features are kept for the next questions, in a bounded cache."""

    model: Model
    tokenizer: Tokenizer
    modes: Mapping[str, Looking]  # by name
    cache: VisionCache = field(init=False)
    _vision: dict[str, float] = field(default_factory=dict)  # seconds of seeing an image, by its digest

    def __post_init__(self) -> None:
        self.cache = VisionCache(self.model)

    def answer(self, question: Question) -> Result:
        """See, choose granularities in every mode, and answer. What does not fit into the context has an empty answer.

        Raises whatever reading an image raises, and InputError if a mode has no granularity for it.
        """
        images = question.images()
        try:
            seen = see(self.model, self.tokenizer, prompt_of(question.text, len(images)), images, Looking(), self.cache)
        except TooLong as error:
            return Result.missing(question, self.modes, str(error))
        seen.seconds.vision = self._vision_seconds(seen)
        routings, config = self._route(seen), self.model.config
        attempts = self._attempts(question, seen, routings)
        return Result(
            key=question.key,
            task=question.task,
            doc_id=question.doc_id,
            text_tokens=len(seen.text),
            visual_tokens_finest=sum(config.visual_tokens(config.finest, crops.image_size) for crops in seen.crops),
            router=[list(routing.probabilities) for routing in routings] if routings else None,
            seconds={stage: getattr(seen.seconds, stage) for stage in STAGES},
            attempts=attempts,
        )

    def _vision_seconds(self, seen: Seen) -> float:
        """What seeing the images takes without the help of the cache: the seconds of the first time."""
        if not seen.crops:
            return seen.seconds.vision
        new = {crops.digest: len(crops) for crops in seen.crops if crops.digest not in self._vision}
        self._vision |= {digest: seen.seconds.vision * n / sum(new.values()) for digest, n in new.items()}
        return sum(self._vision[crops.digest] for crops in seen.crops)

    def _route(self, seen: Seen) -> list[Routing] | None:
        """The router's scores, if there are images, a router, and a mode that asks it."""
        asked = any(looking.granularity == AUTO for looking in self.modes.values())
        return score(self.model, seen) if asked and seen.crops and self.model.config.has_router else None

    def _attempts(self, question: Question, seen: Seen, routings: list[Routing] | None) -> dict[str, Attempt]:
        """An attempt for each mode; modes that choose the same share an answer."""
        answers: dict[tuple[int, ...], Attempt] = {}
        attempts = {}
        modes = list(self.modes)
        first = int(question.key, 16) % len(modes)  # the first one is slower, so modes take turns
        for mode in modes[first:] + modes[:first]:
            try:
                views = choose(self.model, seen, self.modes[mode], routings)
            except TooLong as error:
                attempts[mode] = Attempt.missing(str(error))
                continue
            chosen = tuple(view.granularity for view in views)
            if chosen not in answers:
                answers[chosen] = self._decode(seen, views, question.max_tokens)
            source = max((view.source for view in views), key=get_args(ViewSource).index, default=None)
            attempts[mode] = replace(answers[chosen], source=source)
        return {mode: attempts[mode] for mode in modes}

    def _decode(self, seen: Seen, views: tuple[View, ...], max_tokens: int) -> Attempt:
        from mlx_lm.generate import generation_stream

        prepared = compose(self.model, seen, views)
        *_, last = decode(self.model, self.tokenizer, prepared, Decoding(max_tokens=max_tokens))
        mx.synchronize(generation_stream)  # decoding is a token ahead, which would delay what is timed next
        assert last.answer is not None
        return Attempt(
            granularities=[view.granularity for view in views],
            source=None,
            answer=last.answer.text,
            visual_tokens=sum(view.visual_tokens for view in views),
            new_tokens=len(last.answer.token_ids),
            prefill=prepared.layout.seconds.prefill,
            generation=prepared.layout.seconds.generation,
        )
