"""Many questions: answers go into a journal, row by row, and a later run resumes it."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import InputError, Interrupted, printable, problem
from ..journal import Journal
from ..model.inventory import fingerprint
from ..progress import Progress, silent
from .answering import Answerer
from .questions import Question
from .results import Result, read_rows

ANSWERS = "answers.jsonl"
SKIP_BAD = "fix it, or have such questions answered with nothing (skip_bad)"
RESUME = "run the same command again to resume"


def settings_of(answerer: Answerer) -> dict[str, Any]:
    """What must not change while a journal is resumed."""
    return {"model": fingerprint(answerer.model, router=True), "modes": list(answerer.modes)}


def open_journal(folder: Path, answerer: Answerer) -> Journal:
    """Open the answers in a folder. Raises InputError if they are another model's, or in other modes."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; choose a folder for the answers")
    return Journal(folder / ANSWERS, settings_of(answerer))


def ask(
    answerer: Answerer,
    questions: Sequence[Question],
    journal: Journal | None,
    skip_bad: bool,
    report: Progress = silent,
) -> dict[str, Result]:
    """Answer each question once, unless the journal holds its answer, and return the results by the questions' keys.

    skip_bad: a question whose image is damaged, or that fails otherwise, has an empty answer, which the journal does
    not keep. report: is called with the number of questions done and the number of all.

    Raises InputError for such a question otherwise; Interrupted on Ctrl-C, with every answer so far in the journal.
    """
    wanted = {question.key: question for question in questions}
    held = read_rows(journal.file, journal.rows) if journal else {}
    results = {key: held[key] for key in wanted if key in held}
    left = [question for key, question in wanted.items() if key not in results]
    report(len(results), len(wanted))
    try:
        if left:  # once for nothing: kernels are compiled and memory is taken before anything is timed
            with suppress(Exception):
                Answerer(answerer.model, answerer.tokenizer, answerer.modes).answer(replace(left[0], max_tokens=2))
        for question in left:
            results[question.key] = _answer(answerer, question, journal, skip_bad)
            report(len(results), len(wanted))
    except KeyboardInterrupt as stop:
        told = f"interrupted; {len(results)} of {len(wanted)} questions are answered"
        raise Interrupted(f"{told}; {RESUME}" if journal else told) from stop
    return results


def _answer(answerer: Answerer, question: Question, journal: Journal | None, skip_bad: bool) -> Result:
    try:
        result = answerer.answer(question)
    except Exception as error:  # whatever it is, the other questions may be without it
        told = problem(f"question {printable(question.id, 80)}", error)
        if not skip_bad:
            raise InputError(f"{told}; {SKIP_BAD}; then {RESUME}") from error
        return Result.missing(question, answerer.modes, told)
    if journal:
        journal.append(result.to_row())
    return result
