"""A file of questions becomes a file of answers, which can be resumed."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import AvgMlxError, InputError, Interrupted, problem
from ..inputs.fetching import shown_url
from ..inputs.image_io import MAX_PIXELS
from ..inputs.records import image_path, parse_records, read_bytes
from ..inputs.tokenizer import Tokenizer
from ..journal import Journal
from ..model.avg_llava import Model
from ..model.inventory import fingerprint
from ..progress import Progress, silent
from .answer import Answer, report
from .batch import BATCH_SIZE, Request, stream_batch
from .options import AUTO, PREFILL_STEP_SIZE
from .sampling import Sampling

URL_SCHEMES = ("http", "https", "data")


@dataclass(frozen=True)
class FiledRequest:
    """A question of a file, and where it stands there."""

    place: str  # such as "questions.jsonl, line 3"
    id: str | int
    request: Request
    text: str  # all of its line that matters to the answer


@dataclass(frozen=True)
class FileOptions:
    """The options that all answers of a file share. `model` and `revision` name the model in the rows."""

    model: str = ""
    revision: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    batch_size: int = BATCH_SIZE
    prefill_step_size: int = PREFILL_STEP_SIZE
    max_pixels: int = MAX_PIXELS
    load_seconds: float = 0.0


def read_requests(
    name: str, content: bytes, folder: Path, defaults: Request, *, strict_paths: bool = False
) -> tuple[list[FiledRequest], list[str]]:
    """Return the questions of a file's content, and what is wrong with its other records.

    A record is `{"id", "prompt" or "question", "image"?, "granularity"?, "max_tokens"?}`; `defaults` has the options
    for those that say nothing. Image paths are relative to `folder`; with `strict_paths` none may leave it, and nothing
    is downloaded. Raises InputError if no record can be used.
    """
    requests: dict[str | int, FiledRequest] = {}
    problems: list[str] = []
    for place, record in parse_records(name, content):
        place = f"{name}, {place}"
        try:
            filed = _filed(place, record, folder, defaults, strict_paths)
            if filed.id in requests:
                first = requests[filed.id].place.rpartition(", ")[2]
                raise InputError(f"id {filed.id!r} is the id of {first} too; choose another")
            requests[filed.id] = filed
        except Exception as error:
            problems.append(problem(place, error))
    if not requests:
        raise InputError(problems[0] if problems else f"{name} has no questions; expected JSON Lines")
    return list(requests.values()), problems


def answer_file(
    model: Model,
    tokenizer: Tokenizer,
    file: str | Path,
    output: str | Path,
    *,
    defaults: Request | None = None,
    options: FileOptions | None = None,
    strict_paths: bool = False,
    tell: Callable[[str], None] = lambda problem: None,
    progress: Progress = silent,
) -> list[str]:
    """Answer a file of questions into `output`, as `avg-mlx generate --batch` does.

    Returns what was wrong with the questions that have no answer. `read_requests` says what the file holds and what
    `defaults` and `strict_paths` are for; `answer_requests` says what is written, when it is resumed, and which errors
    are raised.
    """
    file, options = Path(file), options or FileOptions()
    content, defaults = read_bytes(file), defaults or Request("")
    requests, problems = read_requests(str(file), content, file.parent, defaults, strict_paths=strict_paths)
    for told in problems:
        tell(told)
    return problems + answer_requests(model, tokenizer, requests, Path(output), options, tell=tell, progress=progress)


def stream_requests(
    model: Model, tokenizer: Tokenizer, requests: Sequence[FiledRequest], options: FileOptions
) -> Iterator[tuple[FiledRequest, dict[str, Any] | AvgMlxError]]:
    """Answer questions several at a time; yields each with its row, or with the error that it has instead."""
    answers = stream_batch(
        model,
        tokenizer,
        [filed.request for filed in requests],
        batch_size=options.batch_size,
        max_pixels=options.max_pixels,
        sampler=options.sampling.sampler(tokenizer),
        logits_processors=options.sampling.logits_processors(),
        prefill_step_size=options.prefill_step_size,
    )
    for n, answer in answers:
        yield requests[n], _row(requests[n], answer, options) if isinstance(answer, Answer) else answer


def answer_requests(
    model: Model,
    tokenizer: Tokenizer,
    requests: Sequence[FiledRequest],
    output: Path,
    options: FileOptions = FileOptions(),  # it is frozen
    *,
    tell: Callable[[str], None] = lambda problem: None,
    progress: Progress = silent,
) -> list[str]:
    """Answer what `output` has no answer to yet; returns what was wrong with the questions that have none.

    `output` gets a row for each answer as it is complete: its id, the keys of `report`, and a key that ties it to
    model, options and question. `tell` hears of each problem at once. Raises InputError if `output` has rows of another
    model, of other options or questions, or is being written by another process; Interrupted after Ctrl-C.
    """
    made_by = _hash(fingerprint(model, router=True), asdict(options.sampling), sorted(tokenizer.eos_token_ids))
    keys = {filed.id: _hash(made_by, filed.text) for filed in requests}
    problems: list[str] = []
    with Journal(output) as journal:
        answered = {_answered(output, n, row, keys) for n, row in enumerate(journal.rows, 1)}
        todo = [filed for filed in requests if filed.id not in answered]
        done = len(answered)
        progress(done, len(requests))
        try:
            for filed, row in stream_requests(model, tokenizer, todo, options):
                if isinstance(row, AvgMlxError):
                    problems.append(problem(filed.place, row))
                    tell(problems[-1])
                else:
                    journal.append({**row, "key": keys[filed.id]})
                done += 1
                progress(done, len(requests))
        except KeyboardInterrupt as stop:
            raise Interrupted(
                f"interrupted; {len(journal.rows)} of {len(requests)} answers are in {output}, "
                "and the same command resumes from there"
            ) from stop
    return problems


def _filed(place: str, record: Any, folder: Path, defaults: Request, strict_paths: bool) -> FiledRequest:
    """Check a record; InputError says what is wrong with it."""
    if isinstance(record, InputError):
        raise record
    if not isinstance(record, dict):
        raise InputError(f"a {type(record).__name__}, expected an object with id, image and prompt")
    id, images = record.get("id"), record.get("image")
    prompt = record.get("prompt", record.get("question"))
    images = [] if images is None else images if isinstance(images, list) else [images]
    granularity = record.get("granularity", defaults.granularity)
    max_tokens = record.get("max_tokens", defaults.max_tokens)
    if not isinstance(id, str | int) or isinstance(id, bool):
        raise InputError(f"id is {id!r}, expected a text or a whole number")
    if not isinstance(prompt, str):
        raise InputError(f"prompt is {prompt!r}, expected a text")
    if not all(isinstance(image, str) for image in images):
        raise InputError(f"image is {record['image']!r}, expected a path, URL or data URI, or a list of them")
    if type(max_tokens) is not int:
        raise InputError(f"max_tokens is {max_tokens!r}, expected a whole number")
    # A line that forces a granularity has no use for what weighs or limits the router's choice.
    budget, cost = (defaults.max_visual_tokens, defaults.token_cost) if granularity == AUTO else (None, 0.0)
    request = replace(
        defaults,
        prompt=prompt,
        image=[_located(image, folder, strict_paths) for image in images],
        granularity=granularity,
        max_visual_tokens=budget,
        token_cost=cost,
        max_tokens=max_tokens,
    )
    asked = [prompt, images, granularity, max_tokens, budget, defaults.system_prompt]
    text = json.dumps([*asked, cost] if cost else asked)
    return FiledRequest(place, id, request, text)


def _located(image: str, folder: Path, strict_paths: bool) -> str:
    """Resolve a path from the folder of the questions; URLs stay as they are."""
    scheme = image.partition(":")[0].lower()
    if scheme in ("http", "https") and strict_paths:
        raise InputError(f"{shown_url(image)} is an address, which strict_paths forbids; download it, and give a path")
    return image if scheme in URL_SCHEMES else str(image_path(image, folder, strict_paths))


def _row(filed: FiledRequest, answer: Answer, options: FileOptions) -> dict[str, Any]:
    return {"id": filed.id, **report(answer, options.model, options.revision, options.load_seconds)}


def _answered(output: Path, number: int, row: Mapping[str, Any], keys: Mapping[str | int, str]) -> str | int:
    """Return the id of a row, if it answers one of the questions with the same model and options."""
    id = row.get("id")
    if not isinstance(id, str | int) or id not in keys or keys[id] != row.get("key"):
        raise InputError(
            f"{output}, line {number}: this does not answer a question of this file with this model and these "
            "options; choose another output"
        )
    return id


def _hash(*what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
