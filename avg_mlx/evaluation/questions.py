"""Question files: JSON lists or JSON Lines, simple or in LLaVA's format → questions with accepted answers."""

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import InputError, problem
from ..inputs.image_io import read_image_size
from ..inputs.prompt import PLACEHOLDER
from ..inputs.records import image_path, read_records

EXPECTED = 'expected lines such as {"image": "1.png", "question": "What is it?", "answer": "a cat"}'
SKIP_BAD = "fix it, or leave such questions out (skip_bad)"


@dataclass(frozen=True)
class Question:
    """A question about an image, and the answers that count as correct."""

    id: str
    image: str  # the name that the question file gives
    question: str
    answers: tuple[str, ...]
    category: str | None = None
    folder: Path = Path()  # the folder that the image's name is relative to

    @property
    def file(self) -> Path:
        """The path of the image."""
        return image_path(self.image, self.folder, strict=False)

    @cached_property
    def key(self) -> str:
        """A hash that tells questions apart: of all that the file says, and of the image's length in bytes."""
        size = self.file.stat().st_size
        content = [self.id, self.image, size, self.question, self.answers, self.category]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def read_questions(
    file: str | Path,
    image_folder: str | Path | None = None,
    *,
    skip_bad: bool = False,
    limit: int | None = None,
    strict_paths: bool = False,
) -> tuple[list[Question], list[str]]:
    """Read the first `limit` questions of a file; the second list says what is wrong with those left out.

    A record is `{"id"?, "image", "question", "answer" or "answers": one or several, "category"?}`, or LLaVA's
    `{"id"?, "image", "conversations"}`, where each human/gpt pair is a question. Image names are relative to
    `image_folder`, which is the file's own folder by default; with `strict_paths` no image may lie outside of it.

    Raises InputError for a file without questions and, unless `skip_bad`, for the first record that cannot be used.
    """
    file = Path(file)
    folder = file.parent if image_folder is None else Path(image_folder)
    questions: dict[str, Question] = {}  # by key
    bad: list[str] = []
    checked: dict[Path, InputError | None] = {}
    for place, record in read_records(file):
        try:
            if isinstance(record, InputError):
                raise record
            for question in _questions(record, place.rpartition(" ")[2], folder):
                _check_image(question, strict_paths, checked)
                if question.key in questions:
                    raise InputError(f"question {question.id!r} is there already; remove one of the two")
                questions[question.key] = question
        except Exception as error:
            bad.append(problem(f"{file}, {place}", error))
        if limit is not None and len(questions) >= limit:
            break
    if bad and not skip_bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise InputError(f"{bad[0]}{more}; {SKIP_BAD}")
    if not questions:
        raise InputError(f"{file} has no question{' that can be used' if bad else ''}; {EXPECTED}")
    return list(questions.values())[:limit], bad


def _questions(record: Any, number: str, folder: Path) -> list[Question]:
    """A record's questions. Raises InputError if one of them cannot be used."""
    if not isinstance(record, dict):
        raise InputError(f"{_shown(record)} is not a question; {EXPECTED}")
    id = str(record["id"]) if record.get("id") is not None else number
    image = record.get("image")
    image = image[0] if isinstance(image, list) and len(image) == 1 else image
    if not isinstance(image, str) or not image:
        raise InputError(f"question {id!r} has {_shown(image)} as its image; expected the name of one file")
    category = str(record["category"]) if record.get("category") is not None else None
    if "conversations" in record:
        pairs = _pairs(record["conversations"])
    else:
        pairs = [(record.get("question"), record.get("answers", record.get("answer")))]
    questions = []
    for n, (question, answers) in enumerate(pairs, 1):
        name = f"{id}-{n}" if len(pairs) > 1 else id
        question = question.replace(PLACEHOLDER, "").strip() if isinstance(question, str) else ""
        answers = [answers] if isinstance(answers, str) else answers
        if not question:
            raise InputError(f"question {name!r} has no text; {EXPECTED}")
        if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
            raise InputError(f"question {name!r} has {_shown(answers)} as its answer; expected a text or several")
        questions.append(Question(name, image, question, tuple(answers), category, folder))
    return questions


def _pairs(conversation: Any) -> list[tuple[Any, Any]]:
    """The questions and answers of LLaVA's turns."""
    turns = conversation if isinstance(conversation, list) else []
    speakers = [turn.get("from") if isinstance(turn, dict) else turn for turn in turns]
    if not turns or speakers != ["human", "gpt"] * (len(turns) // 2):
        raise InputError(f"the speakers are {_shown(speakers)}; expected human and gpt in turn, gpt being the last")
    values = [turn.get("value") for turn in turns]
    return list(zip(values[::2], values[1::2], strict=True))


def _shown(value: Any) -> str:
    """A value of the file, cut short."""
    return "nothing" if value is None or value == [] else f"{json.dumps(value):.60}"


def _check_image(question: Question, strict_paths: bool, checked: dict[Path, InputError | None]) -> None:
    """Raise InputError for a file that is missing or is not an image. Pixels are not decoded; outcomes are kept."""
    file = image_path(question.image, question.folder, strict_paths)
    if file not in checked:
        try:
            # Unlike Path.is_file, os.path.isfile is False for a name that is too long.
            if not os.path.isfile(file):
                raise InputError(f"there is no image {file}; check its name and the image folder")
            read_image_size(file)
            checked[file] = None
        except InputError as error:
            checked[file] = error
    if (problem := checked[file]) is not None:
        raise problem
