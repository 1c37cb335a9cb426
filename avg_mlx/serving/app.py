"""The endpoints, as an ASGI application."""

from collections.abc import Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from . import chat_completions, responses
from .answering import Endpoint
from .asking import Asked
from .gate import Gate, problem_response
from .page_files import PageFiles
from .pages import Pages
from .problems import Problem
from .service import Read, Service

EXPOSED = ("Retry-After", "X-Request-Id")  # headers that a page's script may read


def build_app(service: Service) -> Starlette:
    """Return the application that serves all endpoints."""

    def reading(read: Callable[..., Asked]) -> Read:
        options, config = service.options, service.engine.config
        return lambda fields: read(fields, options.defaults, config, options.name)

    pages, page_file = Pages(service), PageFiles()
    chat = Endpoint(service, reading(chat_completions.read), chat_completions.Writer)
    response = Endpoint(service, reading(responses.read), responses.Writer, "input")
    middleware = [Middleware(Gate, service=service)]
    if service.options.origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=service.options.origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),  # OpenAI's client sends many of its own
            expose_headers=EXPOSED,
        )
        middleware.insert(0, cors)
    return Starlette(
        routes=[
            Route("/", page_file.send),
            Route("/page/{name}", page_file.send),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/responses", response, methods=["POST"]),
            Route("/v1/route", Endpoint(service, reading(chat_completions.read_route)), methods=["POST"]),
            Route("/v1/models", pages.models),
            Route("/v1/models/{name:path}", pages.model),
            Route("/health", pages.health),
            Route("/metrics", pages.metrics),
            Route("/openapi.json", pages.openapi),
        ],
        middleware=middleware,
        exception_handlers={HTTPException: _no_route},
    )


async def _no_route(request: Request, error: Exception) -> Response:
    """Say in OpenAI's shape that there is no such path (404), or not for this method (405)."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    what = f"{request.method} {request.url.path[:100]}"
    response = problem_response(Problem(status, f"{what} is not served here; /openapi.json lists what is"))
    if isinstance(error, HTTPException):
        response.headers.update(error.headers or {})
    return response
