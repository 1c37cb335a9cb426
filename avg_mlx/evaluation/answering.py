"""A question, answered once at every granularity that a mode wants."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import InputError
from ..inference.generation import stream_answer
from ..inference.view import Stopwatch, View, Views
from ..inputs.image import Crops, make_crops
from ..inputs.image_io import read_image
from ..inputs.prompt import build_messages, encode_messages
from ..model.avg_llava import Model
from ..training.data import make_sample
from ..training.forward import feedback_losses
from .metric import matches
from .modes import ADAPTIVE, ORACLE, choose
from .questions import Question


@dataclass(frozen=True)
class Attempt:
    """An answer at one granularity."""

    granularity: int
    answer: str
    correct: bool
    visual_tokens: int
    new_tokens: int  # with the end-of-sequence token where it was reached
    prefill: float  # seconds: packing, and the prompt's way through the language model up to the first token
    generation: float  # seconds: the tokens after the first


@dataclass(frozen=True)
class Result:
    """What came of a question: a line of the results' file."""

    id: str
    image: str
    question: str
    accepted: list[str]
    category: str | None
    granularities: list[int]
    router: list[float] | None  # probabilities, in the order of granularities
    losses: list[float] | None  # of the first accepted answer, in the order of granularities
    visual_tokens_finest: int
    seconds: dict[str, float]  # preprocess, vision, router: what comes before a granularity is chosen
    attempts: list[Attempt]
    chosen: dict[str, int]  # mode: granularity
    key: str  # the question's hash

    @classmethod
    def from_dict(cls, keys: dict[str, Any]) -> "Result":
        """Of a line's object; TypeError, KeyError or ValueError if it is none."""
        return cls(**{**keys, "attempts": [Attempt(**attempt) for attempt in keys["attempts"]]})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def attempt(self, mode: str) -> Attempt:
        """A mode's answer."""
        return next(attempt for attempt in self.attempts if attempt.granularity == self.chosen[mode])

    def time_to_first_token(self, mode: str) -> float:
        """Seconds of the stages that a mode needs; only the adaptive one needs the router."""
        stages = ("preprocess", "vision", *(["router"] if mode == ADAPTIVE else []))
        return sum(self.seconds[stage] for stage in stages) + self.attempt(mode).prefill

    def total_time(self, mode: str) -> float:
        """Seconds until a mode's answer is complete."""
        return self.time_to_first_token(mode) + self.attempt(mode).generation


@dataclass(frozen=True)
class _Image:
    """An image on its way out of the vision side."""

    file: Path
    crops: Crops
    features: mx.array
    seconds: dict[str, float]


@dataclass
class Answerer:
    """Answers question after question, greedily; consecutive ones about an image share its features."""

    model: Model
    tokenizer: Any
    modes: Sequence[str]
    seed: int
    max_tokens: int
    _image: _Image | None = None

    def answer(self, question: Question) -> Result:
        """Look once, then answer at every granularity that is chosen; InputError for what cannot be asked."""
        model, config = self.model, self.model.config
        image = self._look(question.file)
        stopwatch = Stopwatch()
        ids = encode_messages(self.tokenizer, build_messages(question.question, 1))
        text = model.embed_text(ids)
        stopwatch.clock("text", text)
        probabilities = None
        if ADAPTIVE in self.modes:
            scores = mx.softmax(model.route(image.features, text).astype(mx.float32))
            stopwatch.clock("router", scores)
            probabilities = np.array(scores).tolist()
        seconds = {**image.seconds, "router": stopwatch.seconds.get("router", 0.0)}
        seconds["preprocess"] += stopwatch.seconds["text"]
        losses = self._losses(question, image) if ORACLE in self.modes else None
        chosen = {
            mode: choose(mode, config.granularities, probabilities, losses, self.seed, question.key)
            for mode in self.modes
        }
        wanted = sorted(set(chosen.values()))
        first = int(question.key, 16) % len(wanted)  # it pays for waking up, so they take turns at being first
        attempts = {g: self._attempt(question, image, ids, text, g) for g in wanted[first:] + wanted[:first]}
        return Result(
            id=question.id,
            image=question.image,
            question=question.question,
            accepted=list(question.answers),
            category=question.category,
            granularities=list(config.granularities),
            router=probabilities,
            losses=losses,
            visual_tokens_finest=config.visual_tokens(config.finest, image.crops.image_size),
            seconds=seconds,
            attempts=[attempts[g] for g in wanted],
            chosen=chosen,
            key=question.key,
        )

    def _look(self, file: Path) -> _Image:
        if self._image is None or self._image.file != file:
            stopwatch = Stopwatch()
            crops = make_crops(read_image(file), self.model.config)
            stopwatch.clock("preprocess")
            features = self.model.encode(crops)
            stopwatch.clock("vision", features)
            self._image = _Image(file, crops, features, stopwatch.seconds)
        return self._image

    def _losses(self, question: Question, image: _Image) -> list[float]:
        """The feedback on the first accepted answer, as it would be trained."""
        turns = [{"from": "human", "value": question.question}, {"from": "gpt", "value": question.answers[0]}]
        record = {"id": question.id, "conversations": turns}
        sample = make_sample("as training data", record, [question.file], self.tokenizer)
        return feedback_losses(self.model, sample, [image.features], [image.crops])

    def _attempt(
        self, question: Question, image: _Image, ids: Sequence[int], text: mx.array, granularity: int
    ) -> Attempt:
        from mlx_lm.generate import generation_stream

        config, crops = self.model.config, image.crops
        counts = [config.visual_tokens(g, crops.image_size) for g in (granularity, config.finest)]
        view = View(granularity, "forced", None, len(crops), crops.crop_grid, *counts)
        views = Views(tuple(ids), (crops,), (view,), vision_calls=0, text=text, features=(image.features,))
        if views.positions > config.context_length:
            raise InputError(
                f"it takes {views.positions} positions at granularity {granularity}, but the model has "
                f"{config.context_length}; shorten it"
            )
        stopwatch = Stopwatch(dict(image.seconds) | {"router": 0.0})
        *_, last = stream_answer(self.model, self.tokenizer, views, stopwatch, max_tokens=self.max_tokens)
        mx.synchronize(generation_stream)  # decoding is a token ahead, and would be in the next clock's way
        answer = last.answer
        assert answer is not None
        return Attempt(
            granularity=granularity,
            answer=answer.text,
            correct=matches(answer.text, question.answers),
            visual_tokens=view.visual_tokens,
            new_tokens=len(answer.token_ids),
            prefill=stopwatch.seconds["prefill"],
            generation=stopwatch.seconds["generation"],
        )
