"""OpenAI's responses: reading a request, and writing the answer whole or as a sequence of events. Nothing is stored."""

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ..config import Config
from . import telling
from .asking import LARGE, Asked, Defaults, check_model, read_job
from .conversation import Conversation, read_conversation
from .fields import Fields
from .jobs import MOST_LOGPROBS, Done, Piece, Routed
from .problems import Problem, bad_field

LOGPROBS = "message.output_text.logprobs"
STATELESS = "nothing is stored here; send the whole conversation as input"
STORED = ("previous_response_id", "conversation", "prompt")
PLACE = {"output_index": 0, "content_index": 0}


def read(fields: Fields, defaults: Defaults, config: Config, served: str) -> Asked:
    """Read the body of a request. Raises Problem for what cannot be done, never leaving it aside in silence."""
    check_model(fields, served)
    _refuse(fields)
    limit = fields.whole("max_output_tokens", 1, LARGE)
    conversation = _conversation(fields, defaults.looking.system_prompt)
    job = read_job(fields, conversation, defaults, config, limit)
    echo = {
        "instructions": fields.text("instructions"),
        "max_output_tokens": limit,
        "temperature": job.sampling.temp,
        "top_p": job.sampling.top_p,
    }
    job = replace(job, logprobs=_logprobs(fields))
    return Asked(job, conversation.images, fields.flag("stream"), echo=echo)


def _refuse(fields: Fields) -> None:
    for key in STORED:
        fields.refuse(key, STATELESS)
    if fields.flag("background"):
        raise bad_field("background", f"is true; {STATELESS}", "unsupported_value")
    if fields.get("tool_choice") not in (None, "auto", "none"):
        raise bad_field("tool_choice", "asks for a tool; this model calls none", "unsupported_value")
    form = fields.object("text") or Fields({})
    if (form := form.object("format") or Fields({})).get("type") not in (None, "text"):
        raise bad_field("text.format.type", "is not text; answers are not held to a form here", "unsupported_value")


def _conversation(fields: Fields, system_prompt: str | None) -> Conversation:
    """Read the input, a text or messages; the instructions stand in front of it, as a system message."""
    given = fields.get("input")
    messages = [Fields({"role": "user", "content": given}, "input")] if isinstance(given, str) else None
    instructions = fields.text("instructions")
    first = [Fields({"role": "system", "content": instructions}, "instructions")] if instructions else []
    return read_conversation([*first, *(messages or fields.objects("input"))], system_prompt)


def _logprobs(fields: Fields) -> int | None:
    most = fields.whole("top_logprobs", 0, MOST_LOGPROBS)
    include = fields.get("include") or []
    if not isinstance(include, list):
        raise fields.wrong("include", "a list")
    return most or 0 if most is not None or LOGPROBS in include else None


class Writer:
    """Writes one answer. Events are numbered, and each names its type twice, as OpenAI's do."""

    def __init__(self, asked: Asked, model: str, routed: Routed):
        self._asked, self._model, self._routed = asked, model, routed
        self._created, self._text, self._tokens = int(time.time()), "", list[dict[str, Any]]()
        self._id, self._item = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self._number = 0

    def begin(self) -> Iterator[str]:
        """The events before the first text, the first with the routing."""
        response = self._response("in_progress", avg=telling.routing(self._routed))
        yield self._event("response.created", response=response)
        yield self._event("response.in_progress", response=response)
        yield self._event("response.output_item.added", output_index=0, item=self._message("in_progress"))
        yield self._event("response.content_part.added", item_id=self._item, **PLACE, part=self._part("", []))

    def piece(self, piece: Piece) -> Iterator[str]:
        """An event with text."""
        tokens = telling.logprobs(piece.tokens)
        self._text += piece.text
        self._tokens += tokens
        place = {"item_id": self._item, **PLACE}
        yield self._event("response.output_text.delta", **place, delta=piece.text, logprobs=tokens)

    def end(self, done: Done) -> Iterator[str]:
        """The events after the last text, the last with the whole response."""
        place = {"item_id": self._item, **PLACE}
        response, part = self._finished(done), self._part(self._text, self._tokens)
        yield self._event("response.output_text.done", **place, text=self._text, logprobs=self._tokens)
        yield self._event("response.content_part.done", **place, part=part)
        yield self._event("response.output_item.done", output_index=0, item=response["output"][0])
        yield self._event(f"response.{response['status']}", response=response)

    def fail(self, problem: Problem) -> Iterator[str]:
        """An error, and that the response failed."""
        told = problem.body["error"]
        yield self._event("error", **{key: told[key] for key in ("code", "message", "param")})
        error = {"code": "server_error", "message": told["message"]}
        yield self._event("response.failed", response=self._response("failed") | {"error": error})

    def whole(self, pieces: Sequence[Piece], done: Done) -> dict[str, Any]:
        """The response at once."""
        self._text = done.answer.text
        self._tokens = telling.logprobs(telling.tokens_of(pieces))
        return self._finished(done)

    def _finished(self, done: Done) -> dict[str, Any]:
        stopped = done.answer.finish_reason == "stop"
        status = "completed" if stopped else "incomplete"
        used = telling.usage(self._routed, done)
        input_details = {"cached_tokens": used["cached"], "cache_write_tokens": 0}
        input_details |= {"image_tokens": used["image"], "text_tokens": used["text"]}
        return self._response(status, avg=telling.complete(self._routed, done)) | {
            "output": [self._message(status, self._part(self._text, self._tokens))],
            "incomplete_details": None if stopped else {"reason": "max_output_tokens"},
            "usage": {
                "input_tokens": used["prompt"],
                "input_tokens_details": input_details,
                "output_tokens": used["completion"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": used["total"],
            },
        }

    def _response(self, status: str, **more: Any) -> dict[str, Any]:
        fixed = {"parallel_tool_calls": False, "tool_choice": "auto", "tools": [], "store": False, "background": False}
        head = {"id": self._id, "object": "response", "created_at": self._created, "status": status}
        empty: dict[str, Any] = {"error": None, "incomplete_details": None, "output": [], "usage": None}
        form = {"text": {"format": {"type": "text"}}, "truncation": "disabled", "previous_response_id": None}
        return {**head, "model": self._model, **empty, **self._asked.echo, **fixed, **form, "metadata": {}, **more}

    def _message(self, status: str, *content: dict[str, Any]) -> dict[str, Any]:
        return {"id": self._item, "type": "message", "role": "assistant", "status": status, "content": list(content)}

    def _part(self, text: str, tokens: list[dict[str, Any]]) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": tokens}

    def _event(self, kind: str, **content: Any) -> str:
        event = {"type": kind, "sequence_number": self._number, **content}
        self._number += 1
        return telling.sse(event, kind)
