"""Messages of a request: texts, and the images that they name, in the forms of both of OpenAI's APIs."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, cast

from ..inputs.prompt import PLACEHOLDER, Message, build_messages, literal
from .fields import Fields
from .problems import Problem, bad_field

Detail = Literal["auto", "low", "high", "original"]

DETAILS = ("auto", "low", "high", "original")
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
TEXTS = ("text", "input_text", "output_text")
IMAGES = ("image_url", "input_image")
PARTS = "text and images (image_url in chat completions, input_image in responses)"


@dataclass(frozen=True)
class NamedImage:
    """An image that a message names, and where in the request it does."""

    source: str  # a data URI, an http(s) address, or a file:// address
    detail: Detail
    path: str


@dataclass(frozen=True)
class Conversation:
    """Messages with a placeholder for each image, and the images."""

    messages: tuple[Message, ...]
    images: tuple[NamedImage, ...]


def read_conversation(given: Iterable[Fields], system_prompt: str | None) -> Conversation:
    """Read the messages of a request; `system_prompt` is for those that have none.

    System and developer messages that come first are joined; empty ones are left out. Raises Problem for anything that
    is not a message of text and images.
    """
    messages: list[Message] = []
    images: list[NamedImage] = []
    for fields in given:
        role, (content, named) = _role(fields), _content(fields)
        images += named
        if role != "user" and named:
            raise bad_field(fields.name("content"), "has an image; images are in messages of the user")
        empty = not content.replace(PLACEHOLDER, "").strip()
        if role == "system" and empty:
            continue
        if role == "system" and [message["role"] for message in messages] == ["system"]:
            messages[0]["content"] += f"\n\n{content}"
        elif role == "system" and messages:
            raise bad_field(fields.name("role"), "is a system message's; those come before all others")
        else:
            messages.append({"role": role, "content": content})
        if role == "user" and empty:
            raise bad_field(fields.name("content"), "has no text; ask something")
    if system_prompt is not None and [message["role"] for message in messages[:1]] != ["system"]:
        messages.insert(0, {"role": "system", "content": literal(system_prompt)})
    return Conversation(tuple(build_messages(messages, len(images))), tuple(images))


def _role(fields: Fields) -> str:
    kind = fields.text("type", "message")
    if kind != "message":
        raise bad_field(fields.name("type"), f"is {kind!r}; only messages are read here", "unsupported_value")
    role = fields.text("role", "")
    if role in ("tool", "function"):
        raise bad_field(fields.name("role"), "is a tool's; this model calls no tools", "unsupported_value")
    if role not in ROLES:
        raise fields.wrong("role", ", ".join(ROLES))
    return ROLES[role]


def _content(fields: Fields) -> tuple[str, list[NamedImage]]:
    """A message's text with placeholders, and its images.

    A client that names its images after all of the text knows no better place; they go in front, where the model was
    trained to see them. Those among the text stay where they are.
    """
    content = fields.get("content")
    if isinstance(content, str):
        return literal(content), []
    if not isinstance(content, list):
        raise fields.wrong("content", "a text, or a list of parts")
    parts = list(_parts(fields))
    images = [part for part in parts if isinstance(part, NamedImage)]
    texts = [part for part in parts if isinstance(part, str)]
    if parts == [*texts, *images]:
        parts = [*images, *texts]
    written = [literal(part) if isinstance(part, str) else PLACEHOLDER for part in parts]
    return "\n".join(written), images


def _parts(fields: Fields) -> Iterator[str | NamedImage]:
    for part in fields.objects("content"):
        kind = part.text("type", "")
        if kind in TEXTS:
            text = part.text("text")
            if text is None:
                raise part.wrong("text", "a text")
            if text:
                yield text
        elif kind in IMAGES:
            yield _image(part)
        else:
            raise _unsupported(part, str(kind))


def _image(part: Fields) -> NamedImage:
    """Read an image: chat completions have an object with url and detail, responses have both in the part."""
    part.refuse("file_id", "there are no uploaded files; send the image as a data URI")
    inner = part
    key = "image_url"
    if isinstance(part.get("image_url"), dict):
        inner, key = cast(Fields, part.object("image_url")), "url"
    source = inner.text(key)
    if not source:
        raise inner.wrong(key, "a data URI, or an address")
    detail = inner.choice("detail", DETAILS) or part.choice("detail", DETAILS) or "auto"
    return NamedImage(source, cast(Detail, detail), inner.name(key))


def _unsupported(part: Fields, kind: str) -> Problem:
    return bad_field(part.name("type"), f"is {kind!r}; this model reads {PARTS}", "unsupported_value")
