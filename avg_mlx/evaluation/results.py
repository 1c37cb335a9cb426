"""What an evaluation finds out about each question: the rows of answers.jsonl."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import MAX_DATA, read_file
from ..journal import parse_row
from .modes import ADAPTIVE


@dataclass(frozen=True)
class Attempt:
    """An answer at one granularity."""

    granularity: int
    answer: str
    correct: bool
    visual_tokens: int
    new_tokens: int  # including the end-of-sequence token where it was reached
    prefill: float  # seconds of packing, and of the prompt's way through the language model up to the first token
    generation: float  # seconds of the tokens after the first


@dataclass(frozen=True)
class Result:
    """What came of a question."""

    id: str
    image: str
    question: str
    accepted: list[str]
    category: str | None
    granularities: list[int]
    router: list[float] | None  # probabilities, in the order of granularities
    losses: list[float] | None  # of the first accepted answer, in the order of granularities
    visual_tokens_finest: int
    seconds: dict[str, float]  # of preprocess, vision and router, which come before a granularity is chosen
    attempts: list[Attempt]
    chosen: dict[str, int]  # {mode: granularity}
    key: str  # the question's hash

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> "Result":
        """Read a row. Raises TypeError, KeyError or ValueError for anything else."""
        return cls(**{**row, "attempts": [Attempt(**attempt) for attempt in row["attempts"]]})

    def to_dict(self) -> dict[str, Any]:
        """The row."""
        return asdict(self)

    def attempt(self, mode: str) -> Attempt:
        """The answer that a mode gives."""
        return next(attempt for attempt in self.attempts if attempt.granularity == self.chosen[mode])

    def time_to_first_token(self, mode: str) -> float:
        """Seconds of the stages that a mode needs; only the adaptive one needs the router."""
        stages = ("preprocess", "vision", *(["router"] if mode == ADAPTIVE else []))
        return sum(self.seconds[stage] for stage in stages) + self.attempt(mode).prefill

    def total_time(self, mode: str) -> float:
        """Seconds until a mode's answer is complete."""
        return self.time_to_first_token(mode) + self.attempt(mode).generation


def parse_results(file: Path, rows: Iterable[dict[str, Any]]) -> list[Result]:
    """Read the rows of a file. Raises InputError that names the line of a row that is not a result."""
    results = []
    for number, row in enumerate(rows, 1):
        try:
            results.append(Result.from_dict(row))
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{file}, line {number}: not an answer ({error}); choose another output") from error
    return results


def read_results(file: Path) -> list[Result]:
    """Read a complete file of results."""
    lines = read_file(file, "give the file that an evaluation wrote", MAX_DATA).splitlines()
    return parse_results(file, [parse_row(file, number, line) for number, line in enumerate(lines, 1)])
