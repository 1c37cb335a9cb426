"""The description of the endpoints in OpenAPI's words: what they take and what they give."""

from collections.abc import Sequence
from typing import Any

from ..version import VERSION
from .conversation import DETAILS, ROLES
from .jobs import MOST_LOGPROBS

Schema = dict[str, Any]

STATUSES = {
    400: "The request, an image or the length of the prompt is not what it should be.",
    401: "The API key is missing or wrong.",
    404: "There is no such model or path.",
    408: "The body took too long to arrive.",
    413: "The body is too large.",
    415: "The body is not sent as JSON.",
    422: "An image's address leads to nothing.",
    429: "Too many requests wait; Retry-After says when to try again.",
    500: "A fault of the server.",
    503: "The server stops; Retry-After says when to try again.",
}


def description(model: str, granularities: Sequence[int]) -> dict[str, Any]:
    """Return the OpenAPI document of a server that serves `model`; `granularities` are those that may be forced."""
    paths = {
        "/v1/chat/completions": _post("OpenAI's chat completions.", "ChatCompletionRequest", "Answer", stream=True),
        "/v1/responses": _post("OpenAI's responses; nothing is stored.", "ResponseRequest", "Answer", stream=True),
        "/v1/route": _post("How closely the images would be looked at, where, and why.", "RouteRequest", "Answer"),
        "/v1/models": {"get": _get("The one model that is served.")},
        "/v1/models/{model}": {"get": _get("The model by its name.") | {"parameters": [_path("model", model)]}},
        "/health": {"get": _get("Whether the engine works.", also=503) | {"security": []}},
        "/metrics": {"get": _get("Counters and gauges for Prometheus.", media="text/plain")},
        "/openapi.json": {"get": _get("This document.")},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "avg-mlx", "version": VERSION, "summary": f"{model}, which decides how closely to look"},
        "paths": paths,
        "security": [{}, {"key": []}],
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": _schemas(model, granularities),
            "responses": {"Problem": {"description": "An error.", "content": _json(_ref("Error"))}},
        },
    }


def _get(summary: str, media: str = "application/json", also: int | None = None) -> dict[str, Any]:
    content = {media: {"schema": {"type": "object"} if media == "application/json" else {"type": "string"}}}
    responses: dict[str, Any] = {"200": {"description": "It is there.", "content": content}}
    if also:
        responses[str(also)] = {"description": "It does not.", "content": content}
    return {"summary": summary, "responses": responses | _problems(400, 401, 404)}


def _post(summary: str, request: str, answer: str, stream: bool = False) -> dict[str, Any]:
    content = _json(_ref(answer)) | ({"text/event-stream": {"schema": {"type": "string"}}} if stream else {})
    told = {"description": "The answer.", "content": content}
    body = {"required": True, "content": _json(_ref(request))}
    return {"post": {"summary": summary, "requestBody": body, "responses": {"200": told} | _problems(*STATUSES)}}


def _problems(*statuses: int) -> dict[str, Any]:
    return {str(s): {"description": STATUSES[s], "content": _json(_ref("Error"))} for s in statuses}


def _path(name: str, example: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}, "example": example}


def _json(schema: Schema) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _nullable(kind: str, **more: Any) -> Schema:
    return {"type": [kind, "null"], **more}


def _object(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    return {"type": "object", "required": list(required), "properties": properties}


def _schemas(model: str, granularities: Sequence[int]) -> dict[str, Schema]:
    looking: dict[str, Schema] = {
        "model": {"enum": [model, None]},
        "granularity": {
            "description": "Visual tokens per crop, or auto: the router's choice.",
            "enum": ["auto", *granularities, None],
        },
        "max_visual_tokens": _nullable("integer", minimum=1, description="A budget for each image."),
        "token_cost": _nullable("number", minimum=0, description="The price of the finest visual tokens."),
    }
    drawing: dict[str, Schema] = {
        "temperature": _nullable("number", minimum=0, maximum=100),
        "top_p": _nullable("number", minimum=0, maximum=1),
        "top_k": _nullable("integer", minimum=0),
        "min_p": _nullable("number", minimum=0, maximum=1),
        "repetition_penalty": _nullable("number", minimum=0.001, maximum=1000),
        "presence_penalty": _nullable("number", minimum=-2, maximum=2),
        "frequency_penalty": _nullable("number", minimum=-2, maximum=2),
        "seed": _nullable("integer"),
        "stop": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]},
        "logit_bias": _nullable("object", additionalProperties={"type": "number", "minimum": -100, "maximum": 100}),
        "top_logprobs": _nullable("integer", minimum=0, maximum=MOST_LOGPROBS),
        "stream": _nullable("boolean"),
    }
    count = _nullable("integer", minimum=1)
    usage = _object(include_usage=_nullable("boolean"))
    messages: Schema = {"type": "array", "minItems": 1, "items": _ref("Message")}
    limits = {"max_completion_tokens": count, "max_tokens": count}
    told = {"logprobs": _nullable("boolean"), "stream_options": {"anyOf": [usage, {"type": "null"}]}}
    response = {"input": {"anyOf": [{"type": "string"}, messages]}, "instructions": _nullable("string")}
    explain = _nullable("boolean", description="Take the router's vote apart, for each image.")
    error = _object(("message", "type"), message={"type": "string"}, type={"type": "string"})
    return {
        "ChatCompletionRequest": _object(("messages",), messages=messages, **looking, **drawing, **limits, **told),
        "ResponseRequest": _object(("input",), **response, **looking, **drawing, max_output_tokens=count),
        "RouteRequest": _object(("messages",), messages=messages, **looking, explain=explain),
        "Message": _message(),
        "Answer": _object(("object", "model"), object={"type": "string"}, model={"type": "string"}),
        "Error": _object(("error",), error=error),
    }


def _message() -> Schema:
    detail = {"enum": [*DETAILS, None], "description": "auto: the router; low: the coarsest; high: the finest."}
    image = _object(("url",), url={"type": "string"}, detail=detail)
    parts = [
        _object(("type", "text"), type={"enum": ["text", "input_text", "output_text"]}, text={"type": "string"}),
        _object(("type", "image_url"), type={"const": "image_url"}, image_url=image),
        _object(("type", "image_url"), type={"const": "input_image"}, image_url={"type": "string"}, detail=detail),
    ]
    content = {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": {"anyOf": parts}}]}
    return _object(("role", "content"), role={"enum": list(ROLES)}, content=content)
