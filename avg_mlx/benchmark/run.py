"""A benchmark run: all questions of all tasks are answered, scored by lmms-eval, and joined with tokens and time."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AvgMlxError, InputError, Interrupted
from ..files import write_json, write_text
from ..inputs.tokenizer import Tokenizer
from ..model.avg_llava import Model
from ..progress import Progress, silent
from .answering import Answerer
from .asking import RESUME, ask, open_journal, settings_of
from .data import reason
from .modes import check_modes, default_modes
from .paper import benchmark_of
from .plot import plot_scores, plot_shares
from .questions import Question, question_of
from .results import Result
from .scoring import Score, score
from .summary import summarize, tables

if TYPE_CHECKING:
    from lmms_eval.api.task import ConfigurableTask


@dataclass(frozen=True)
class Outcome:
    """What came of a run."""

    summary: dict[str, Any]  # as in summary.json
    table: str  # as in table.md


def benchmark(
    model: Model,
    tokenizer: Tokenizer,
    tasks: "Mapping[str, ConfigurableTask]",
    output: str | Path,
    *,
    modes: Sequence[str | int] | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
    failed: Sequence[str] = (),
    report: Progress = silent,
) -> Outcome:
    """Ask all questions in all modes, and leave answers, tables, summary and pictures in the folder `output`.

    tasks: as `Tasks.load` gives them, by name. modes: as `looking_of` reads them; by default the router's choice and
    the finest granularity. limit: only the first questions of each task, rounded up where it scores several together.
    skip_bad: as in `ask`. failed: what is wrong with tasks that were left out before. report: is called with the number
    of questions done and the number of all.

    Raises InputError if the folder belongs to another model or other modes, for a question that cannot be asked unless
    `skip_bad`, and if there is nothing to ask; Interrupted on Ctrl-C, with every answer so far in the folder.
    """
    if not tasks:
        raise InputError("; ".join(failed) or "there are no tasks; name some")
    output = Path(output)
    model.eval()
    answerer = Answerer(model, tokenizer, check_modes(modes or default_modes(model.config), model.config))
    asked, told = {}, list(failed)
    for name, task in tasks.items():
        try:
            asked[name] = _questions(task, _limit(name, limit))
        except AvgMlxError as error:
            told.append(str(error))
    if not asked:
        raise InputError("; ".join(told))
    everything = [question for questions in asked.values() for question in questions]
    with open_journal(output, answerer) as journal:
        results = ask(answerer, everything, journal, skip_bad, report)
        found = {}
        try:
            for name, questions in asked.items():
                task, most = tasks[name], _limit(name, limit)
                own = [results[question.key] for question in questions]
                try:
                    scores = {mode: _score(task, own, mode, most, output) for mode in answerer.modes}
                    found[name] = summarize(benchmark_of(name), own, scores, model.config)
                except AvgMlxError as error:
                    told.append(str(error))
        except KeyboardInterrupt as stop:
            raise Interrupted(f"interrupted; all {len(results)} questions are answered; {RESUME}") from stop
        settings = settings_of(answerer) | {"limit": limit, "granularities": list(model.config.granularities)}
        return _conclude(output, settings, found, told)


def _limit(task: str, limit: int | None) -> int | None:
    """A limit as a multiple of what the task scores together."""
    together = benchmark_of(task).together
    return limit and -(-limit // together) * together


def _questions(task: "ConfigurableTask", limit: int | None) -> list[Question]:
    """A task's questions. Raises AvgMlxError where lmms-eval fails, and for a task that cannot be asked here."""
    name = task.config.task
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # lmms-eval shows how far it has come
            task.build_all_requests(limit=limit)
        return [question_of(instance, {name: task.dataset}) for instance in task.instances]
    except AvgMlxError:
        raise
    except Exception as error:
        raise AvgMlxError(f"lmms-eval cannot ask {name} ({reason(error)})") from error


def _score(
    task: "ConfigurableTask", results: Sequence[Result], mode: str, limit: int | None, output: Path
) -> dict[str, Score]:
    answers = {result.doc_id: result.attempts[mode].answer for result in results}
    return score(task, answers, limit, output / mode)


def _conclude(output: Path, settings: dict[str, Any], found: dict[str, Any], failed: list[str]) -> Outcome:
    """Sum up, and write it down."""
    from importlib.metadata import version

    summary = {"lmms_eval": version("lmms_eval"), **settings, "benchmarks": found, "failed": failed}
    outcome = Outcome(summary, tables(summary))
    try:
        write_json(output / "summary.json", summary)
        write_text(output / "table.md", outcome.table)
        plot_scores(summary, output / "scores.png")
        plot_shares(summary, output / "choices.png")
    except OSError as error:
        reason = error.strerror or error
        raise AvgMlxError(f"cannot write into {output} ({reason}); make room, then {RESUME}") from error
    return outcome
