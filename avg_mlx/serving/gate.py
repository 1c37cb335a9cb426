"""What every request passes: the Host check, the key, and the access log."""

import json
import logging
import time
import uuid
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .problems import Problem
from .security import check_host, check_key, needs_key
from .service import Service

TOLD = "avg_mlx.told"  # in a request's scope: what the access log tells of it, beside path, status and seconds
PATHS = frozenset(
    ("/", "/v1/chat/completions", "/v1/responses", "/v1/route", "/v1/models", "/health", "/metrics", "/openapi.json")
)
PREFIXES = {"/v1/models/": "/v1/models/{id}", "/page/": "/page/{name}"}

access_log = logging.getLogger("avg_mlx.access")


class Gate:
    """Lets a request through, or answers with the problem; logs either, but nothing of what was asked or answered."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, id, status = time.perf_counter(), uuid.uuid4().hex, 499  # a client that hung up gets no status
        scope[TOLD] = told = dict[str, Any]()

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", id.encode())]
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, receive, sending)
        except Problem as problem:
            await problem_response(problem)(scope, receive, sending)
        finally:
            self.service.answered[_counted(scope["path"]), status] += 1
            self._log(scope, id, status, time.perf_counter() - start, told)

    def _check(self, scope: Scope) -> None:
        headers, options = Headers(scope=scope), self.service.options
        check_host(headers.get("host", ""), options.names)
        if options.key is not None and needs_key(scope["path"]):
            check_key(headers, options.key)

    def _log(self, scope: Scope, id: str, status: int, seconds: float, told: dict[str, Any]) -> None:
        when = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": when, "id": id, "method": scope["method"], "path": scope["path"][:100], "status": status}
        access_log.info("%s", json.dumps(line | {"seconds": round(seconds, 4)} | told))


def _counted(path: str) -> str:
    """A path as metrics count it: strangers must not be able to make more of them."""
    for prefix, counted in PREFIXES.items():
        if path.startswith(prefix):
            return counted
    return path if path in PATHS else "other"


def problem_response(problem: Problem) -> JSONResponse:
    """The response that tells a problem."""
    return JSONResponse(problem.body, problem.status, problem.headers)
