"""What lmms-eval asks, as a question that this package can answer."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..inputs.image_io import ImageSource
from ..inputs.prompt import PLACEHOLDER, literal

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance

MAX_NEW_TOKENS = 1024  # where a task sets no limit, as the authors evaluated


@dataclass(frozen=True)
class Question:
    """A question of a task; its images are read when its turn comes."""

    task: str
    doc_id: int
    text: str
    max_tokens: int
    images: Callable[[], list[ImageSource]]
    key: str  # a hash of all but the images

    @property
    def id(self) -> str:
        """Its name in messages."""
        return f"{self.doc_id} of {self.task}"


def question_of(instance: "Instance", docs: Mapping[str, Any], max_new_tokens: int = MAX_NEW_TOKENS) -> Question:
    """Read a request of lmms-eval, whose documents are `docs[task][split]`. `until` is ignored, as the authors do.

    Raises InputError for a task that wants answers drawn at random.
    """
    text, doc_to_messages, options, doc_id, task, split = instance.args
    if (options.get("temperature") or 0) > 0 and options.get("do_sample", True):
        raise InputError(f"{task} asks for a temperature of {options['temperature']}; only greedy answers are given")
    max_tokens = int(options.get("max_new_tokens") or max_new_tokens)

    def images() -> list[ImageSource]:
        from lmms_eval.protocol import ChatMessages

        pictures, *others = ChatMessages(messages=doc_to_messages(docs[task][split][doc_id])).extract_media()
        if any(others):
            raise InputError("it has a video or sound; choose a task with images")
        return list(pictures)

    content = json.dumps([task, split, doc_id, text, max_tokens])
    return Question(task, doc_id, text, max_tokens, images, hashlib.sha256(content.encode()).hexdigest()[:16])


def prompt_of(text: str, images: int) -> str:
    """Put images before a question, as the authors do for lmms-eval: on one line. `<image>` in the question is text."""
    places = " ".join([PLACEHOLDER] * images)
    return f"{places}\n{literal(text)}" if images else literal(text)
