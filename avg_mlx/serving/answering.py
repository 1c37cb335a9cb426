"""The way of a request: read, look, answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from . import exchange, telling
from .asking import Asked
from .bodies import Place
from .exchange import EventStream, Exchange, unless_hung_up
from .gate import TOLD, problem_response
from .jobs import Done, Job, Piece, Routed
from .problems import HungUp, told_problem
from .service import Read, Service

OF_THE_WHOLE = ("context_length_exceeded", "too_many_images")  # problems of the conversation, not of one message


class Writer(exchange.Writer, Protocol):
    """How one of OpenAI's APIs writes an answer."""

    def whole(self, pieces: Sequence[Piece], done: Done) -> dict[str, Any]:
        """The answer at once."""


@dataclass(frozen=True)
class Endpoint:
    """Takes requests as `read` reads them, and answers in the words of `write`, or with the routing alone without it.

    An ASGI application, so that a request holds its place until the last byte is sent. Headers are sent when looking
    has succeeded, so that a request that cannot be answered has the status of its error.
    """

    service: Service
    read: Read
    write: Callable[[Asked, str, Routed], Writer] | None = None
    field: str = "messages"  # that holds the conversation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        request = Request(scope, receive)
        try:
            with self.service.intake.place() as place:
                body = await self.service.intake.read(request, place)
                asked = await self.service.read(body, self.read)
                response = await unless_hung_up(request, self._look(asked, place, scope[TOLD]))
                await response(scope, receive, send)
        except HungUp:
            pass  # nobody is there to be told
        except Exception as error:
            problem = told_problem(error)
            if problem.code in OF_THE_WHOLE:
                problem = problem.about(self.field)
            scope[TOLD]["error"] = problem.code
            await problem_response(problem)(scope, receive, send)

    async def _look(self, asked: Asked, place: Place, told: dict[str, Any]) -> Response:
        job = await self.service.job(asked, place)
        ticket = Exchange(self.service.engine, job)
        try:
            routed = await ticket.next()
            assert isinstance(routed, Routed)
            told |= {"prompt_tokens": routed.positions, "granularities": [view.granularity for view in routed.views]}
            if self.write is None:
                return await self.service.in_worker(lambda: JSONResponse(self._route(job, routed)))
            return await self._answer(asked, self.write(asked, self.service.options.name, routed), ticket, told)
        except BaseException:
            ticket.cancel()
            raise

    async def _answer(self, asked: Asked, writer: Writer, ticket: Exchange, told: dict[str, Any]) -> Response:
        if asked.stream:
            return EventStream(ticket, writer, told)
        pieces, done = await ticket.rest()
        told |= telling.ending(done)
        return JSONResponse(writer.whole(pieces, done))

    def _route(self, job: Job, routed: Routed) -> dict[str, Any]:
        """How closely the images are looked at, where their crops and tokens lie, and why, if that was asked."""
        told, config = telling.routing(routed), self.service.engine.config
        for image, crops, view in zip(told["images"], job.images, routed.views, strict=True):
            size = crops.image_size
            image["geometry"] = config.geometry(view.granularity, size).to_dict()
            image["visual_tokens_at"] = {str(g): config.visual_tokens(g, size) for g in sorted(config.granularities)}
        for image, explanation in zip(told["images"], routed.explanations, strict=False):
            image["explanation"] = explanation.to_dict()
        prompt = {"prompt_tokens": routed.positions, "text_tokens": routed.positions - routed.image_positions}
        return {"object": "route", "model": self.service.options.name, **prompt, **told}
