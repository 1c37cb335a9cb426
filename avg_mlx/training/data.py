"""Training data in LLaVA's format → samples of ids and labels."""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import InputError, printable
from ..geometry import Pair
from ..inputs.image_io import read_image, read_image_size
from ..inputs.prompt import PLACEHOLDER, TooLong, build_messages, encode_messages
from ..inputs.records import image_path, read_records
from ..inputs.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

IGNORED = -100
DECODERS = 4  # images that are decoded at a time
SHOWN_FAULTS = 3  # of images that cannot be decoded
ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Sample:
    """A conversation: what is read, and what is learned of it."""

    id: str
    ids: tuple[int, ...]  # -200 for each image
    labels: tuple[int, ...]  # the answers' ids, IGNORED elsewhere
    images: tuple[Path, ...]
    image_sizes: tuple[Pair, ...]  # (height, width)

    @property
    def answer_tokens(self) -> int:
        """How many labels are learned."""
        return sum(label != IGNORED for label in self.labels)

    @cached_property
    def key(self) -> str:
        """A hash of what the sample says, and of its images' names, sizes and lengths in bytes."""
        files = [(image.name, image.stat().st_size) for image in self.images]
        content = [self.id, self.ids, self.labels, files, self.image_sizes]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def positions(self, config: Config, granularity: int) -> int:
        """The length of the language model's input at `granularity`."""
        visual = sum(config.visual_tokens(granularity, size) for size in self.image_sizes)
        return len(self.ids) - len(self.images) + visual


def read_samples(
    data: Path,
    image_folder: Path | None,
    tokenizer: Tokenizer,
    config: Config,
    max_seq_length: int | None = None,
    strict_paths: bool = False,
) -> list[Sample]:
    """Read the samples of a JSON list or a JSON Lines file of `{"id", "image", "conversations"}`.

    `image` may be absent, a name or a list of names, relative to `image_folder` (by default the file's own). Samples
    that do not fit into `max_seq_length` positions, or into the model's context, are left out, and it is logged how
    many they are. Raises InputError that says which sample is wrong, and lists all image files that are missing.
    """
    limit = min(max_seq_length or config.context_length, config.context_length)
    records, fitting = _read(data, image_folder, strict_paths), []
    for record in records:
        with contextlib.suppress(TooLong):
            fitting.append(make_sample(*record, tokenizer, config, limit))
    return _skipped(len(records), fitting, f"they take more than {limit} positions")


def routable(samples: Sequence[Sample]) -> list[Sample]:
    """Pick the samples with exactly one image, and log how many have not.

    By the reference's definition they are the only ones for which there is a granularity to choose.
    """
    one_image = [sample for sample in samples if len(sample.images) == 1]
    return _skipped(len(samples), one_image, "a router chooses for exactly one image")


def _skipped(samples: int, left: list[Sample], why: str) -> list[Sample]:
    if len(left) < samples:
        logger.warning("%d of %d samples skipped: %s", samples - len(left), samples, why)
    return left


def make_sample(
    where: str, record: dict[str, Any], images: list[Path], tokenizer: Tokenizer, config: Config, limit: int
) -> Sample:
    """Tokenize a record's conversation.

    Raises InputError, which calls the record `where`, if it cannot be learned, and TooLong if it takes more than
    `limit` positions.
    """
    messages = [_message(where, turn) for turn in record["conversations"]]
    roles = [message["role"] for message in messages]
    if len(roles) < 2 or roles != ["user", "assistant"] * (len(roles) // 2):
        found = [turn["from"] for turn in record["conversations"]]
        raise InputError(
            f"{where}: its turns are {printable(found)}; expected human and gpt in turn, human first and gpt last"
        )
    try:
        messages = build_messages(messages, len(images))
        ids = encode_messages(tokenizer, messages, awaits_answer=False, limit=limit)
        sizes = tuple(read_image_size(file) for file in images)
        sample = Sample(str(record["id"]), tuple(ids), (), tuple(images), sizes)
        if (positions := sample.positions(config, config.finest)) > limit:
            raise TooLong(f"it takes {positions} positions, more than {limit}; shorten it")
        labels, end = [IGNORED] * len(ids), _end_of_sequence(tokenizer)
        for turn in range(1, len(messages), 2):  # each reads all before it; the limit of positions limits that too
            question = encode_messages(tokenizer, messages[:turn])
            answered = encode_messages(tokenizer, messages[: turn + 1], awaits_answer=False)
            if ids[: len(question)] != question or ids[: len(answered)] != answered:
                raise InputError(f"turn {turn + 1} does not begin at a token of its own; rephrase it")
            answer = slice(len(question), len(answered))
            labels[answer] = ids[answer]
            if not set(tokenizer.eos_token_ids).intersection(ids[answer]):
                # The Hub's templates end answers with a space or with nothing. To stop there has to be learned too.
                said = encode_messages(tokenizer, messages[: turn + 1], awaits_answer=False, stripped=True)
                ids += [end] * (len(said) == len(ids))
                labels[len(said) : len(answered)] = [IGNORED] * (len(answered) - len(said))
                labels[len(said) : len(said) + 1] = [end]
    except InputError as error:
        raise type(error)(f"{where}: {error}") from error
    return replace(sample, ids=tuple(ids), labels=tuple(labels))


def _end_of_sequence(tokenizer: Tokenizer) -> int:
    """The tokenizer's own end-of-sequence token, if answers end there, or else another one."""
    own = tokenizer.get_vocab().get(tokenizer.special_tokens_map.get("eos_token", ""))
    return own if own is not None and own in tokenizer.eos_token_ids else min(tokenizer.eos_token_ids)


def _read(data: Path, image_folder: Path | None, strict_paths: bool) -> list[tuple[str, dict[str, Any], list[Path]]]:
    """(what to call it in an error, record, image files) of each sample in a file."""
    folder = image_folder or data.parent
    records = [(*named, _images(*named, folder, strict_paths)) for named in _conversations(data)]
    if not records:
        raise InputError(f"{data} has no samples; expected a list of id, image and conversations")
    # Unlike Path.is_file, os.path's is false of a name that is too long.
    missing = sorted({str(file) for _, _, files in records for file in files if not os.path.isfile(file)})
    if missing:
        told = ", ".join(map(printable, missing))
        raise InputError(f"{len(missing)} image files are missing: {told}; is image_folder right?")
    _check_images({file for _, _, files in records for file in files})
    return records


def _check_images(files: Collection[Path]) -> None:
    """Raise InputError if any image cannot be decoded, which otherwise would end a run that is under way."""
    with ThreadPoolExecutor(DECODERS) as pool:
        wrong = [told for told in pool.map(_fault, sorted(files)) if told]
    if wrong:
        raise InputError(f"{len(wrong)} images cannot be learned from: {'; '.join(wrong[:SHOWN_FAULTS])}")


def _fault(file: Path) -> str | None:
    """What is wrong with an image, if anything is."""
    try:
        read_image(file)
        return None
    except InputError as error:
        return str(error)


def _conversations(data: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what to call it in an error, record) of each sample in a file."""
    for n, (place, record) in enumerate(read_records(data), 1):
        if isinstance(record, InputError):
            raise InputError(f"{data}, {place}: {record}")
        if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
            raise InputError(f"{data}: sample {n} is not an object with a list of conversations")
        where = f"{data}: sample {n} ({printable(record.get('id', 'no id'), 80)})"
        yield where, {"id": f"sample {n}"} | record


def _images(where: str, record: dict[str, Any], folder: Path, strict_paths: bool) -> list[Path]:
    names = record.get("image") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(
            f"{where}: image is {printable(repr(record['image']))}, expected a file name or a list of them"
        )
    try:
        return [image_path(name, folder, strict_paths) for name in names]
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _message(where: str, turn: Any) -> dict[str, str]:
    if not isinstance(turn, dict) or turn.get("from") not in list(ROLES) or not isinstance(turn.get("value"), str):
        raise InputError(f"{where}: a turn is {printable(repr(turn))}, expected from human or gpt, and a value")
    text = turn["value"]
    placeholders = text.count(PLACEHOLDER)
    if placeholders and turn["from"] == "gpt":
        raise InputError(f"{where}: an answer has {PLACEHOLDER}; images are for questions")
    if turn["from"] == "gpt" and not text.strip():
        raise InputError(f"{where}: an answer is empty; write one, or leave the sample out")
    if placeholders:  # LLaVA moves images to the front of their message
        text = f"{PLACEHOLDER}\n" * placeholders + text.replace(PLACEHOLDER, "").strip()
        text = text.strip()
    return {"role": ROLES[turn["from"]], "content": text}
