"""An evaluation: every question is answered once, row by row in a file that a later run resumes."""

import copy
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import AvgMlxError, InputError, Interrupted, printable, problem
from ..files import write_json, write_text
from ..inference.options import check_max_tokens
from ..inputs.tokenizer import Tokenizer
from ..journal import Journal, Row
from ..model.avg_llava import Model
from ..model.inventory import fingerprint
from ..progress import Progress, silent
from .answering import Answerer
from .calibration import calibrate, calibration_table
from .dial import dial_table, turned
from .modes import ADAPTIVE, ORACLE, RANDOM, all_modes, check_modes
from .plot import plot_accuracy, plot_choices, plot_reliability
from .questions import SKIP_BAD, Question
from .results import Result, parse_results
from .summary import summarize, table

logger = logging.getLogger(__name__)

ANSWERS = "answers.jsonl"
MAX_TOKENS = 32
RESUME = "run the same command again to resume"


@dataclass(frozen=True)
class Evaluation:
    """What came of an evaluation."""

    results: list[Result]  # in the order of the questions
    skipped: list[str]  # what was wrong with the questions that were left out
    summary: dict[str, Any]  # as in summary.json
    table: str  # as in table.md


def evaluate(
    model: Model,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    output: str | Path,
    *,
    modes: Sequence[str | int] | None = None,
    seed: int = 0,
    max_tokens: int = MAX_TOKENS,
    skip_bad: bool = False,
    skipped: Sequence[str] = (),
    token_costs: Sequence[float] = (),
    target_accuracy: float | None = None,
    target_tokens: float | None = None,
    report: Progress = silent,
) -> Evaluation:
    """Ask `questions` in all `modes`, and leave answers, table, summary and pictures in the folder `output`.

    Questions that the folder answers already are not asked again. In a group of processes (mlx.launch) each answers its
    share and the first one writes.

    modes: "adaptive", "random", "oracle", or granularities; by default all that the model has. seed: determines the
    random mode. max_tokens: limits each answer. skip_bad: leaves out questions whose image is damaged or that do not
    fit into the model's context, instead of raising InputError. skipped: what was wrong with questions that were left
    out before. token_costs: tell what the router's choice would be worth at these, from the same answers.
    target_accuracy, target_tokens: name the token cost that reaches them. report: is called with the number of
    questions done and the number of all.

    Raises InputError if the folder belongs to another model, other questions or other options, or if another process
    is writing to it; Interrupted on Ctrl-C, with every answer so far in the folder.
    """
    group, output = mx.distributed.init(), Path(output)
    first = group.rank() == 0
    if modes is None and not model.config.has_router and first:
        logger.warning("this model has no router: no adaptive mode, only %s", ", ".join(all_modes(model.config)))
    modes = check_modes(all_modes(model.config) if modes is None else modes, model.config)
    turning = bool(token_costs) or target_accuracy is not None or target_tokens is not None
    if turning and (absent := [mode for mode in all_modes(model.config) if mode not in (*modes, RANDOM, ORACLE)]):
        raise InputError(f"token costs are compared by the answers of all modes; add {', '.join(absent)} to modes")
    if turning and ADAPTIVE not in modes:
        raise InputError("token costs weigh what the router thinks, but this model has none; leave them out")
    check_max_tokens(max_tokens)
    model.eval()
    settings = {"model": fingerprint(model, router=True), "modes": modes, "seed": seed, "max_tokens": max_tokens}
    with ExitStack() as stack:
        journal = stack.enter_context(_opened(output, settings, questions)) if first else None
        known = _gather(journal.rows if journal else [], group)
        results = {row["key"]: Result.from_dict(row) for row in known}
        answerer = Answerer(model, tokenizer, modes, seed, max_tokens)
        try:
            failed = _ask(answerer, questions, results, journal, group, skip_bad, report)
        except KeyboardInterrupt as stop:
            told = f"interrupted; {len(results)} of {len(questions)} questions are answered"
            raise Interrupted(f"{told}; {RESUME}") from stop
        evaluation = _conclude(questions, results, [*skipped, *failed], settings)
        if turning:
            dial = turned(evaluation.results, token_costs, target_accuracy, target_tokens)
            summary = {**evaluation.summary, "dial": dial}
            evaluation = replace(evaluation, summary=summary, table=f"{evaluation.table}\n{dial_table(dial)}")
        if first:
            _write(output, evaluation)
    return evaluation


@contextmanager
def _opened(folder: Path, settings: dict[str, Any], questions: Sequence[Question]) -> Iterator[Journal]:
    """Open the folder's answers. Raises InputError if they are answers to anything but these questions."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; choose a folder for the output")
    with Journal(folder / ANSWERS, settings) as journal:
        strangers = {result.key: result for result in parse_results(journal.file, journal.rows)}
        for question in questions:
            strangers.pop(question.key, None)
        if strangers:
            example = next(iter(strangers.values())).id
            raise InputError(
                f"{folder} holds answers to {len(strangers)} questions that are not among these or have changed since "
                f"(such as {example!r}); give the questions that it was made with, or choose another output"
            )
        yield journal


def _ask(
    answerer: Answerer,
    questions: Sequence[Question],
    results: dict[str, Result],
    journal: Journal | None,
    group: mx.distributed.Group,
    skip_bad: bool,
    report: Progress,
) -> list[str]:
    """Answer the questions that `results` lacks, and add them there. Returns what is wrong with the others."""
    problems: list[str] = []
    report(len(results), len(questions))
    for outcomes in _rounds(answerer, [q for q in questions if q.key not in results], group):
        rows = [outcome for outcome in outcomes if isinstance(outcome, dict)]
        failed = [outcome for outcome in outcomes if isinstance(outcome, str)]
        if journal:
            journal.append(*rows)
        results |= {row["key"]: Result.from_dict(row) for row in rows}
        if failed and not skip_bad:
            raise InputError(f"{failed[0]}; {SKIP_BAD}; then {RESUME}")
        problems += failed
        report(len(results) + len(problems), len(questions))
    return problems


def _rounds(
    answerer: Answerer, questions: Sequence[Question], group: mx.distributed.Group
) -> Iterator[list[Row | str]]:
    """Answer as many questions at a time as there are processes; yields rows, or what is wrong with a question."""
    if questions:  # once for nothing: kernels are compiled and memory is taken before anything is timed
        _try(copy.copy(answerer), questions[0])
    for start in range(0, len(questions), group.size()):
        mine = questions[start : start + group.size()][group.rank() :][:1]
        yield _gather([_try(answerer, question) for question in mine], group)


def _try(answerer: Answerer, question: Question) -> Row | str:
    """A question's row, or what is wrong with it."""
    try:
        return answerer.answer(question).to_dict()
    except Exception as error:  # whatever it is, the other questions may be without it
        return problem(f"question {printable(repr(question.id), 80)}", error)


def _gather(items: Sequence[Any], group: mx.distributed.Group) -> list[Any]:
    """The items of all processes, in their order; anything that JSON can hold."""
    text = json.dumps(items).encode()
    lengths = np.array(mx.distributed.all_gather(mx.array([len(text)]), group=group))
    padded = np.frombuffer(text.ljust(lengths.max()), np.uint8)
    rows = np.array(mx.distributed.all_gather(mx.array(padded)[None], group=group))
    return [item for row in rows for item in json.loads(row.tobytes())]


def _conclude(
    questions: Sequence[Question], results: dict[str, Result], skipped: list[str], settings: dict[str, Any]
) -> Evaluation:
    """Sum up the results. Raises InputError if there are none."""
    if not results:
        reason = "".join(f"; {problem}" for problem in skipped[-1:])
        raise InputError(f"none of {len(questions)} questions can be asked{reason}")
    ordered = [results[question.key] for question in questions if question.key in results]
    summary = summarize(ordered, settings, len(skipped))
    written = table(summary)
    if calibration := calibrate(ordered, settings["modes"]):
        summary["calibration"] = calibration
        written += f"\n{calibration_table(calibration)}"
    return Evaluation(ordered, skipped, summary, written)


def _write(folder: Path, evaluation: Evaluation) -> None:
    try:
        write_json(folder / "summary.json", evaluation.summary)
        write_text(folder / "table.md", evaluation.table)
        plot_accuracy(evaluation.summary, folder / "accuracy.png")
        plot_choices(evaluation.summary, folder / "choices.png")
        plot_reliability(evaluation.summary, folder / "reliability.png")
    except OSError as error:
        reason = error.strerror or error
        raise AvgMlxError(f"cannot write into {folder} ({reason}); make room, then {RESUME}") from error
