"""OpenAI's chat completions: reading a request, and writing the answer whole or in chunks."""

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ..config import Config
from . import telling
from .asking import LARGE, Asked, Defaults, check_model, read_job
from .conversation import read_conversation
from .fields import Fields
from .jobs import MOST_LOGPROBS, Done, Piece, Routed
from .problems import Problem, bad_field

NO_TOOLS = "this model calls no tools"
NO_FORMS = "answers are not held to a form here"


def read(fields: Fields, defaults: Defaults, config: Config, served: str) -> Asked:
    """Read the body of a request. Raises Problem for what cannot be done, never leaving it aside in silence."""
    check_model(fields, served)
    _refuse(fields)
    options = fields.object("stream_options") or Fields({})
    conversation = read_conversation(fields.objects("messages"), defaults.looking.system_prompt)
    limits = [fields.whole(key, 1, LARGE) for key in ("max_completion_tokens", "max_tokens")]
    limit = next((limit for limit in limits if limit is not None), None)
    job = read_job(fields, conversation, defaults, config, limit)
    return Asked(
        job=replace(job, logprobs=_logprobs(fields)),
        images=conversation.images,
        stream=fields.flag("stream"),
        include_usage=options.flag("include_usage"),
    )


def read_route(fields: Fields, defaults: Defaults, config: Config, served: str) -> Asked:
    """Read a request to route: messages, how closely to look, and whether to explain.

    What is for answering is read and changes nothing.
    """
    check_model(fields, served)
    conversation = read_conversation(fields.objects("messages"), defaults.looking.system_prompt)
    job = read_job(fields, conversation, defaults, config, None)
    job = replace(job, route_only=True, explain=fields.flag("explain"))
    return Asked(job, conversation.images)


def _refuse(fields: Fields) -> None:
    """Refuse by name what would change the answer's form and is not done here."""
    if (n := fields.whole("n", 1, LARGE)) not in (None, 1):
        raise bad_field("n", f"is {n}; one answer is given to a request, ask {n} times", "unsupported_value")
    if fields.get("tool_choice") not in (None, "auto", "none"):
        raise bad_field("tool_choice", f"asks for a tool; {NO_TOOLS}", "unsupported_value")
    if fields.get("function_call") not in (None, "auto", "none"):
        raise bad_field("function_call", f"asks for a function; {NO_TOOLS}", "unsupported_value")
    if fields.get("modalities") not in (None, ["text"]):
        raise bad_field("modalities", "has more than text; this model writes text", "unsupported_value")
    fields.refuse("audio", "this model writes text")
    form = fields.object("response_format")
    if form and form.get("type") != "text":
        raise bad_field("response_format.type", f"is not text; {NO_FORMS}", "unsupported_value")


def _logprobs(fields: Fields) -> int | None:
    most = fields.whole("top_logprobs", 0, MOST_LOGPROBS)
    if fields.flag("logprobs"):
        return most or 0
    if most:
        raise bad_field("top_logprobs", "needs logprobs: true")
    return None


class Writer:
    """Writes one answer."""

    def __init__(self, asked: Asked, model: str, routed: Routed):
        self._asked, self._routed = asked, routed
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def begin(self) -> Iterator[str]:
        """The first chunk, with the routing."""
        yield self._chunk({"role": "assistant", "content": ""}, avg=telling.routing(self._routed))

    def piece(self, piece: Piece) -> Iterator[str]:
        """A chunk of text."""
        yield self._chunk({"content": piece.text}, logprobs=self._logprobs([piece]))

    def end(self, done: Done) -> Iterator[str]:
        """The last chunks: why the answer ends, and the usage if it was asked for."""
        avg = telling.complete(self._routed, done)
        yield self._chunk({}, done.answer.finish_reason, avg=avg)
        if self._asked.include_usage:
            counted = {"choices": [], "usage": self._usage(done)}
            yield telling.sse({**self._head, "object": "chat.completion.chunk", **counted})
        yield "data: [DONE]\n\n"

    def fail(self, problem: Problem) -> Iterator[str]:
        """An error where the rest of the answer would be."""
        yield telling.sse(problem.body)
        yield "data: [DONE]\n\n"

    def whole(self, pieces: Sequence[Piece], done: Done) -> dict[str, Any]:
        """The answer at once."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": done.answer.text, "refusal": None},
            "logprobs": self._logprobs(pieces),
            "finish_reason": done.answer.finish_reason,
        }
        told = {"usage": self._usage(done), "avg": telling.complete(self._routed, done)}
        return {**self._head, "object": "chat.completion", "choices": [choice], **told}

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None, logprobs: Any = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [choice], **more}
        return telling.sse(chunk | ({"usage": None} if self._asked.include_usage else {}))

    def _logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        if self._asked.job.logprobs is None:
            return None
        return {"content": telling.logprobs(telling.tokens_of(pieces)), "refusal": None}

    def _usage(self, done: Done) -> dict[str, Any]:
        used = telling.usage(self._routed, done)
        details = {"image_tokens": used["image"], "text_tokens": used["text"], "cached_tokens": used["cached"]}
        return {
            "prompt_tokens": used["prompt"],
            "completion_tokens": used["completion"],
            "total_tokens": used["total"],
            "prompt_tokens_details": details,
        }
