"""An evaluation: every question answered once, line by line in a file that can be gone on with."""

import copy
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import AvgMlxError, InputError
from ..files import read_json
from ..model.avg_llava import Model
from ..model.inventory import fingerprint
from .answering import Answerer, Result
from .modes import all_modes, check_modes
from .plot import plot_accuracy, plot_choices
from .questions import SKIP_BAD, Question
from .summary import summarize, table

logger = logging.getLogger(__name__)

ANSWERS = "answers.jsonl"
SETTINGS = "run.json"
MAX_TOKENS = 32


@dataclass(frozen=True)
class Evaluation:
    """What came of an evaluation."""

    results: list[Result]  # in the order of the questions
    skipped: list[str]  # what was wrong with the questions that were left out
    summary: dict[str, Any]  # as in summary.json
    table: str  # as in table.md


def evaluate(
    model: Model,
    tokenizer,
    questions: Sequence[Question],
    output: str | Path,
    *,
    modes: Sequence[str] | None = None,
    seed: int = 0,
    max_tokens: int = MAX_TOKENS,
    skip_bad: bool = False,
    skipped: Sequence[str] = (),
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Ask `questions` in all `modes`; answers, table, summary and a picture are in the folder `output` afterwards.

    What the folder lacks is answered and written line by line, so that it can be resumed. In a group of processes
    (mlx.launch) each answers its share and the first one writes. modes: "adaptive", "random", "oracle", or a
    granularity as a text; by default all that the model has. skip_bad: leave out, instead of raising InputError,
    questions whose image is damaged or that do not fit the model; `skipped` tells of those left out before. `report`
    gets how many questions are done, and how many there are. Raises InputError if the folder is another model's, other
    questions' or other options'.
    """
    group, output = mx.distributed.init(), Path(output)
    first = group.rank() == 0
    model.eval()
    if modes is None and not model.config.has_router and first:
        logger.warning("this model has no router (a Stage-3 checkpoint): the adaptive mode is left out")
    modes = all_modes(model.config) if modes is None else check_modes(modes, model.config)
    settings = {"model": fingerprint(model, router=True), "modes": modes, "seed": seed, "max_tokens": max_tokens}
    known = _open(output, settings, questions) if first else []
    results = {result.key: result for result in map(Result.from_dict, _gather(known, group))}

    todo = [question for question in questions if question.key not in results]
    done, problems = len(results), list(skipped)
    report(done, len(questions))
    answerer = Answerer(model, tokenizer, modes, seed, max_tokens)
    for answered in _rounds(answerer, todo, group):
        new = [Result.from_dict(answer) for answer in answered if isinstance(answer, dict)]
        if first:
            _append(output / ANSWERS, new)
        results |= {result.key: result for result in new}
        failed = [answer for answer in answered if isinstance(answer, str)]
        if failed and not skip_bad:
            raise InputError(f"{failed[0]}; {SKIP_BAD}, and run it again: it goes on")
        problems += failed
        done += len(answered)
        report(done, len(questions))

    if not results:
        told = "".join(f"; {problem}" for problem in problems[-1:])
        raise InputError(f"none of {len(questions)} questions can be asked{told}")
    ordered = [results[question.key] for question in questions if question.key in results]
    summary = summarize(ordered, settings, len(problems))
    evaluation = Evaluation(ordered, problems, summary, table(summary))
    if first:
        _write(output / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
        _write(output / "table.md", evaluation.table)
        plot_accuracy(summary, output / "accuracy.png")
        plot_choices(summary, output / "choices.png")
    return evaluation


def _rounds(answerer: Answerer, questions: Sequence[Question], group) -> Iterator[list[dict[str, Any] | str]]:
    """What came of as many questions as there are processes, again and again: results, or what is wrong."""
    if questions:  # once for nothing: kernels are compiled and memory is taken before anything is timed
        _try(copy.copy(answerer), questions[0])
    for start in range(0, len(questions), group.size()):
        mine = questions[start : start + group.size()][group.rank() :][:1]
        yield _gather([_try(answerer, question) for question in mine], group)


def _open(folder: Path, settings: dict[str, Any], questions: Sequence[Question]) -> list[dict[str, Any]]:
    """The lines that `folder` has already; InputError if they are of anything else."""
    file = folder / SETTINGS
    if file.exists():
        before = read_json(file)
        changed = [key for key in settings if before.get(key) != settings[key]]
        if changed:
            told = "; ".join(f"{key} was {before.get(key)!r} and is {settings[key]!r}" for key in changed)
            raise InputError(f"{folder} holds another evaluation: {told}. Set it back, or choose another --output")
    elif (folder / ANSWERS).exists():
        raise InputError(f"{folder} holds {ANSWERS} but no {SETTINGS} that tells of what; choose another --output")
    elif folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; choose a folder for --output")
    known = read_results(folder / ANSWERS) if (folder / ANSWERS).exists() else []
    strangers = {result.key: result for result in known}
    for question in questions:
        strangers.pop(question.key, None)
    if strangers:
        example = next(iter(strangers.values())).id
        raise InputError(
            f"{folder} holds answers to {len(strangers)} questions that are not among these or have changed since "
            f"(such as {example!r}); give the questions it was made of, or choose another --output"
        )
    folder.mkdir(parents=True, exist_ok=True)
    _write(file, json.dumps(settings, indent=2) + "\n")
    _write(folder / ANSWERS, "".join(map(_line, known)))  # without a line that was cut off
    return [result.to_dict() for result in known]


def read_results(file: Path) -> list[Result]:
    """The lines of a results' file; a last one that was cut off is left out. InputError for anything else."""
    results = []
    for n, line in enumerate(file.read_bytes().split(b"\n")[:-1], 1):
        try:
            results.append(Result.from_dict(json.loads(line)))
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{file}, line {n}: not an answer ({error}); choose another --output") from error
    return results


def _try(answerer: Answerer, question: Question) -> dict[str, Any] | str:
    """A question's result, or what is wrong with it."""
    try:
        return answerer.answer(question).to_dict()
    except InputError as error:
        return f"question {question.id!r}: {error}"


def _gather(items: list[Any], group) -> list[Any]:
    """What every process has to tell, in their order; anything that JSON can say."""
    text = json.dumps(items).encode()
    lengths = np.array(mx.distributed.all_gather(mx.array([len(text)]), group=group))
    padded = np.frombuffer(text.ljust(lengths.max()), np.uint8)
    rows = np.array(mx.distributed.all_gather(mx.array(padded)[None], group=group))
    return [item for row in rows for item in json.loads(row.tobytes())]


def _line(result: Result) -> str:
    return json.dumps(result.to_dict(), ensure_ascii=False) + "\n"


def _append(file: Path, results: Iterable[Result]) -> None:
    try:
        with file.open("a", encoding="utf-8") as stream:
            stream.write("".join(map(_line, results)))
    except OSError as error:
        raise AvgMlxError(
            f"cannot write {file} ({error.strerror}); make room, then run it again: it goes on"
        ) from error


def _write(file: Path, text: str) -> None:
    """Write a file that appears when it is complete."""
    partial = file.with_name(f".partial-{file.name}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
