"""A question, answered once at every granularity that a mode takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..errors import InputError
from ..inference.generation import decode
from ..inference.options import Decoding, Looking
from ..inference.steps import Seen, ask_again, choose, compose, score, see
from ..inputs.tokenizer import Tokenizer
from ..model.avg_llava import Model
from ..training.data import make_sample
from ..training.forward import feedback_losses
from .metric import matches
from .modes import ADAPTIVE, ORACLE, granularity_of
from .questions import Question
from .results import Attempt, Result


@dataclass
class Answerer:
    """Answers question after question, greedily. Consecutive questions about an image see it once."""

    model: Model
    tokenizer: Tokenizer
    modes: Sequence[str]
    seed: int
    max_tokens: int
    _last: tuple[Path, Seen] | None = None  # an image, and its first question

    def answer(self, question: Question) -> Result:
        """See, choose a granularity for every mode, and answer at each. Raises InputError for a bad question."""
        config, seen = self.model.config, self._see(question)
        probabilities = list(score(self.model, seen)[0].probabilities) if ADAPTIVE in self.modes else None
        losses = self._losses(question, seen) if ORACLE in self.modes else None
        chosen = {
            mode: granularity_of(mode, config.granularities, probabilities, losses, self.seed, question.key)
            for mode in self.modes
        }
        wanted = sorted(set(chosen.values()))
        first = int(question.key, 16) % len(wanted)  # the first one is slower, so granularities take turns
        attempts = {g: self._attempt(question, seen, g) for g in wanted[first:] + wanted[:first]}
        return Result(
            id=question.id,
            image=question.image,
            question=question.question,
            accepted=list(question.answers),
            category=question.category,
            granularities=list(config.granularities),
            router=probabilities,
            losses=losses,
            visual_tokens_finest=config.visual_tokens(config.finest, seen.crops[0].image_size),
            seconds={stage: getattr(seen.seconds, stage) for stage in ("preprocess", "vision", "router")},
            attempts=[attempts[g] for g in wanted],
            chosen=chosen,
            key=question.key,
        )

    def _see(self, question: Question) -> Seen:
        """See a question's image, unless the question before had the same."""
        if self._last is not None and self._last[0] == question.file:
            return ask_again(self.model, self.tokenizer, self._last[1], question.question)
        seen = see(self.model, self.tokenizer, question.question, question.file, Looking())
        self._last = question.file, seen
        return seen

    def _losses(self, question: Question, seen: Seen) -> list[float]:
        """The feedback losses of the first accepted answer, as training would measure them."""
        turns = [{"from": "human", "value": question.question}, {"from": "gpt", "value": question.answers[0]}]
        record = {"id": question.id, "conversations": turns}
        config, files = self.model.config, [question.file]
        sample = make_sample("as training data", record, files, self.tokenizer, config, config.context_length)
        return feedback_losses(self.model, sample, seen.features, seen.crops)

    def _attempt(self, question: Question, seen: Seen, granularity: int) -> Attempt:
        from mlx_lm.generate import generation_stream

        try:
            views = choose(self.model, seen, Looking(granularity=granularity))
        except InputError as error:
            raise InputError(f"at granularity {granularity}, {error}") from None
        prepared = compose(self.model, seen, views)
        *_, last = decode(self.model, self.tokenizer, prepared, Decoding(max_tokens=self.max_tokens))
        mx.synchronize(generation_stream)  # decoding is a token ahead, which would delay what is timed next
        answer = last.answer
        assert answer is not None
        return Attempt(
            granularity=granularity,
            answer=answer.text,
            correct=matches(answer.text, question.answers),
            visual_tokens=views[0].visual_tokens,
            new_tokens=len(answer.token_ids),
            prefill=prepared.layout.seconds.prefill,
            generation=prepared.layout.seconds.generation,
        )
