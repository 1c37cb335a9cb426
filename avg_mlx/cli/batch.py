"""`avg-mlx generate --batch`: a file of questions → a file of answers, which can be gone on with."""

import argparse
import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AvgMlxError, InputError
from .answering import decoding_options, open_model

if TYPE_CHECKING:
    from ..inference.batch import Request

PLACES = ("model", "revision", "adapter_path", "batch", "output", "batch_size", "prefill_step_size", "quiet", "verbose")


@dataclass(frozen=True)
class Question:
    """A line of the questions' file."""

    line: int
    id: str | int
    request: "Request"
    text: str  # as it stands in the file


def answer_file(args: argparse.Namespace) -> None:
    """Answer what --output does not have yet; tell of each line that cannot be answered, and go on."""
    import mlx.core as mx

    group = mx.distributed.init()
    if group.size() > 1:
        raise InputError("--batch is for one process; start it without mlx.launch")
    _check(args)
    questions, problems = _read_questions(args)
    for problem in problems:
        print(problem, file=sys.stderr)
    _append(args.output, b"")  # so that it is known before the model is loaded whether this can be done
    start = time.perf_counter()
    model, tokenizer = open_model(args, group)
    load_seconds = time.perf_counter() - start

    from ..inference.batch import stream_batch
    from ..model.inventory import fingerprint
    from .generate import report
    from .progress import Bar

    made_by = {"model": fingerprint(model, router=True), "options": _options_hash(args)}
    keys = {question.id: _hash(made_by, question.text) for question in questions}
    answered = _open(args.output, args.batch, keys)
    todo = [question for question in questions if question.id not in answered]
    decoding = {name: decoding_options(args)[name] for name in ("sampler", "logits_processors", "prefill_step_size")}
    answers = stream_batch(
        model,
        tokenizer,
        [question.request for question in todo],
        batch_size=args.batch_size,
        max_pixels=args.max_pixels,
        **decoding,
    )
    with Bar("Answering", "question") as bar:
        done = len(answered)
        bar.show(done, len(questions))
        for n, answer in answers:
            question = todo[n]
            if isinstance(answer, AvgMlxError):
                problems.append(_problem(args.batch, question.line, answer))
                bar.say(problems[-1])
            else:
                row = {"id": question.id, **report(answer, load_seconds), "key": keys[question.id]}
                _append(args.output, (json.dumps(row, ensure_ascii=False) + "\n").encode())
            done += 1
            bar.show(done, len(questions))
    if problems:
        raise InputError(
            f"{len(problems)} lines of {args.batch} have no answer, all others do; mend them and run this again"
        )


def _check(args: argparse.Namespace) -> None:
    if args.output is None:
        raise InputError("--batch answers into a file; name it with --output")
    if args.image:
        raise InputError("--image is for one question; --batch has the images in its file")
    if args.max_kv_size is not None or args.kv_bits is not None:
        raise InputError("--batch has a plain KV cache; leave --max-kv-size and --kv-bits out")


def _read_questions(args: argparse.Namespace) -> tuple[list[Question], list[str]]:
    """The questions, and what is wrong with the other lines."""
    questions: dict[str | int, Question] = {}
    problems: list[str] = []
    try:
        lines = args.batch.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"cannot read {args.batch} ({error.strerror}); give a file of questions") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            question = _question(line, number, args)
            if question.id in questions:
                raise InputError(f"id {question.id!r} is line {questions[question.id].line}'s already; choose another")
            questions[question.id] = question
        except InputError as error:
            problems.append(_problem(args.batch, number, error))
    if not questions:
        raise InputError(problems[0] if problems else f"{args.batch} has no questions; expected JSON Lines")
    return list(questions.values()), problems


def _problem(file: Path, line: int, error: AvgMlxError) -> str:
    return f"{file}, line {line}: {' '.join(str(error).split())}"


def _question(line: bytes, number: int, args: argparse.Namespace) -> Question:
    from ..inference.batch import Request

    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # among them halves of surrogate pairs, which are no characters
        raise InputError(f"not JSON ({error}); expected an object on each line") from None
    if not isinstance(record, dict):
        raise InputError(f"a {type(record).__name__}, expected an object with id, image and prompt")
    id, images = record.get("id"), record.get("image")
    prompt = record.get("prompt", record.get("question"))
    images = [] if images is None else images if isinstance(images, list) else [images]
    granularity = record.get("granularity", args.granularity)
    max_tokens = record.get("max_tokens", args.max_tokens)
    if not isinstance(id, str | int) or isinstance(id, bool):
        raise InputError(f"id is {id!r}, expected a text or a whole number")
    if not isinstance(prompt, str):
        raise InputError(f"prompt is {prompt!r}, expected a text")
    if not all(isinstance(image, str) for image in images):
        raise InputError(f"image is {record['image']!r}, expected a path, URL or data URI, or a list of them")
    if type(max_tokens) is not int:
        raise InputError(f"max_tokens is {max_tokens!r}, expected a whole number")
    request = Request(
        prompt,
        [_located(image, args.batch.parent) for image in images],
        granularity,
        args.max_visual_tokens if granularity == "auto" else None,
        args.system_prompt,
        max_tokens,
    )
    return Question(number, id, request, json.dumps([prompt, images, granularity, max_tokens]))


def _located(image: str, folder: Path) -> str:
    """A path leads from the questions' folder; URLs stay what they are."""
    if image.partition(":")[0].lower() in ("http", "https", "data"):
        return image
    return str(folder / Path(image).expanduser())


def _options_hash(args: argparse.Namespace) -> str:
    options = {name: value for name, value in vars(args).items() if name not in PLACES}
    return _hash(options)


def _hash(*what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def _open(output: Path, batch: Path, keys: dict[str | int, str]) -> set[str | int]:
    """The ids that `output` has answers to; a last line that was cut off is dropped."""
    *lines, rest = output.read_bytes().split(b"\n")
    answered = set()
    for number, line in enumerate(lines, 1):
        id = _answered(line, keys)
        if id is None:
            raise InputError(
                f"{output}, line {number}: not this model's answer to a question of {batch} with these options; "
                "choose another --output"
            )
        answered.add(id)
    os.truncate(output, output.stat().st_size - len(rest))
    return answered


def _answered(line: bytes, keys: dict[str | int, str]) -> str | int | None:
    """The id of an answer, if it is one to be kept."""
    try:
        row = json.loads(line)
        return row["id"] if keys[row["id"]] == row["key"] else None
    except (ValueError, TypeError, KeyError):
        return None


def _append(file: Path, content: bytes) -> None:
    try:
        with file.open("ab") as stream:
            stream.write(content)
    except OSError as error:
        raise AvgMlxError(f"cannot write {file} ({error.strerror}); see to that and run it again: it goes on") from None
