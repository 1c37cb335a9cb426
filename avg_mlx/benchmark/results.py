"""What comes of a question: the rows of answers.jsonl."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..journal import Row
from .questions import Question

STAGES = ("preprocess", "vision", "router")  # which come before a granularity is chosen


@dataclass(frozen=True)
class Attempt:
    """An answer in one mode."""

    granularities: list[int]  # one for each image
    source: str | None  # why they were chosen, as in inference/view.py; None without an image
    answer: str
    visual_tokens: int
    new_tokens: int  # including the end-of-sequence token where it was reached
    prefill: float  # seconds of packing, and of the prompt's way through the language model up to the first token
    generation: float  # seconds of the tokens after the first
    problem: str | None = None  # why the answer is empty, where the question could not be asked

    @classmethod
    def missing(cls, problem: str) -> "Attempt":
        """The empty answer where a question cannot be asked."""
        return cls([], None, "", 0, 0, 0.0, 0.0, problem)


@dataclass(frozen=True)
class Result:
    """What came of a question."""

    key: str  # the question's
    task: str
    doc_id: int
    text_tokens: int
    visual_tokens_finest: int
    router: list[list[float]] | None  # probabilities for each image, in the config's order; None if no mode routes
    seconds: dict[str, float]  # of STAGES
    attempts: dict[str, Attempt]  # by mode

    @classmethod
    def from_row(cls, row: Row) -> "Result":
        """Read a row. Raises TypeError, KeyError or AttributeError for anything else."""
        attempts = {mode: Attempt(**attempt) for mode, attempt in row["attempts"].items()}
        return cls(**{**row, "attempts": attempts})

    @classmethod
    def missing(cls, question: Question, modes: Iterable[str], problem: str) -> "Result":
        """Empty answers in all modes, for a question that cannot be asked in any."""
        seconds = dict.fromkeys(STAGES, 0.0)
        attempts = {mode: Attempt.missing(problem) for mode in modes}
        return cls(question.key, question.task, question.doc_id, 0, 0, None, seconds, attempts)

    def to_row(self) -> dict[str, Any]:
        """The row."""
        return asdict(self)

    def time_to_first_token(self, mode: str) -> float:
        """Seconds of the stages that a mode needs; one granularity for all needs no router."""
        stages = ("preprocess", "vision", *([] if mode.isdecimal() else ["router"]))
        return sum(self.seconds[stage] for stage in stages) + self.attempts[mode].prefill

    def total_time(self, mode: str) -> float:
        """Seconds until a mode's answer is complete."""
        return self.time_to_first_token(mode) + self.attempts[mode].generation


def read_rows(file: Path, rows: list[Row]) -> dict[str, Result]:
    """Results by key. Raises InputError that names the line of a row that is not one."""
    results = {}
    for number, row in enumerate(rows, 1):
        try:
            result = Result.from_row(row)
        except (TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{file}, line {number}: not an answer ({error}); choose another output") from error
        results[result.key] = result
    return results
