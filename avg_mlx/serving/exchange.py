"""A request in the engine as the event loop sees it; whoever hangs up takes the request along."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from . import telling
from .jobs import Done, Engine, Event, Failed, Job, Piece, Routed
from .problems import HungUp, Problem, of_failure, told_problem

Result = TypeVar("Result")


class Exchange:
    """Submits a job, and receives its events. Raises what `Engine.submit` raises."""

    def __init__(self, engine: Engine, job: Job):
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._ticket = engine.submit(job, self._deliver)

    def _deliver(self, event: Event) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server has ended
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def next(self) -> Routed | Piece | Done:
        """The next event. Raises Problem if the engine could not answer."""
        event = await self._events.get()
        if isinstance(event, Failed):
            raise of_failure(event)
        return event

    async def rest(self) -> tuple[list[Piece], Done]:
        """All that comes after the first event."""
        pieces: list[Piece] = []
        while not isinstance(event := await self.next(), Done):
            if isinstance(event, Piece):
                pieces.append(event)
        return pieces, event

    def cancel(self) -> None:
        """Give the request up; one that has ended stays as it is."""
        self._ticket.cancel()


class Writer(Protocol):
    """How one of OpenAI's APIs writes a stream."""

    def begin(self) -> Iterator[str]:
        """What comes first."""

    def piece(self, piece: Piece) -> Iterator[str]:
        """A piece of text."""

    def end(self, done: Done) -> Iterator[str]:
        """What comes last."""

    def fail(self, problem: Problem) -> Iterator[str]:
        """An error in place of the rest."""


class EventStream(StreamingResponse):
    """Server-sent events of one exchange, which is given up when the client hangs up."""

    media_type = "text/event-stream"

    def __init__(self, exchange: Exchange, writer: Writer, told: dict[str, Any]):
        self._exchange, self._writer, self._told = exchange, writer, told
        # Proxies must pass events on as they come.
        super().__init__(self._write(), headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events. Starlette cancels this when the client has gone."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._exchange.cancel()

    async def _write(self) -> AsyncIterator[str]:
        try:
            yield "".join(self._writer.begin())
            while not isinstance(event := await self._exchange.next(), Done):
                if isinstance(event, Piece):
                    yield "".join(self._writer.piece(event))
            self._told |= telling.ending(event)
            yield "".join(self._writer.end(event))
        except Exception as error:  # the status has been sent, so the problem is told where the answer would go on
            problem = told_problem(error)
            self._told["error"] = problem.code
            yield "".join(self._writer.fail(problem))


async def unless_hung_up(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Return what `work` returns, and cancel it when the client hangs up. The body must have been read.

    Raises HungUp then.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise HungUp
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
