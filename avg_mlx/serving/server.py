"""The server's life: listen, serve, and on SIGTERM finish what runs."""

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import uvicorn

from ..errors import InputError
from .app import build_app
from .service import Service

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
CLOSING_SECONDS = 5  # that connections may take to close once all requests have ended
BACKLOG = 256


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that has the address, but does not listen yet; port 0 takes a free one. Raises InputError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        taken = socket.socket(family, kind, protocol)  # asyncio turns Nagle's waiting off where the protocol is told
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
        return taken
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot listen at {host}, port {port} ({reason}); choose another host or port") from None


def address_of(taken: socket.socket) -> str:
    """The address of a server at a bound socket, as a URL."""
    host, port = taken.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """Uvicorn that tells when it listens, and leaves signals to us."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]):
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(service: Service, taken: socket.socket, grace_seconds: float, ready: Callable[[], None]) -> None:
    """Serve until a signal asks to end, and return when all requests have ended.

    The first SIGTERM, SIGINT or SIGHUP stops new requests, which are answered 503, and lets those that run go on for
    `grace_seconds`; what is left then gets an error. A second signal waits no longer. ready: is called when the server
    listens.
    """
    asyncio.run(_serve(service, taken, grace_seconds, ready))


def configure(service: Service) -> uvicorn.Config:
    """How uvicorn serves the application."""
    return uvicorn.Config(
        build_app(service),
        http="h11",
        ws="none",
        lifespan="off",
        access_log=False,  # the gate writes one
        log_config=None,
        log_level="critical",
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=CLOSING_SECONDS,
    )


async def _serve(service: Service, taken: socket.socket, grace_seconds: float, ready: Callable[[], None]) -> None:
    server = _Server(configure(service), ready)
    loop, ending, hurry = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()

    def end() -> None:
        (hurry if ending.is_set() else ending).set()

    handled = {number: handler for number in ENDING if (handler := signal.getsignal(number)) != signal.SIG_IGN}
    for number in handled:
        loop.add_signal_handler(number, end)
    serving = asyncio.create_task(server.serve([taken]))
    try:
        await asyncio.wait((serving, asyncio.create_task(ending.wait())), return_when=asyncio.FIRST_COMPLETED)
        await _drain(service, grace_seconds, hurry)
    finally:
        server.should_exit = True
        await serving
        for number, handler in handled.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


async def _drain(service: Service, grace_seconds: float, hurry: asyncio.Event) -> None:
    """Stop the engine; a second call, without grace, ends the first one's waiting."""
    loop, stop = asyncio.get_running_loop(), service.engine.stop
    with ThreadPoolExecutor(2, "stop") as threads:  # of its own: the loop's may wait for a resolver
        stopping = loop.run_in_executor(threads, stop, grace_seconds)
        hurrying = asyncio.create_task(hurry.wait())
        await asyncio.wait((stopping, hurrying), return_when=asyncio.FIRST_COMPLETED)
        if not stopping.done():
            await loop.run_in_executor(threads, stop, 0)
        hurrying.cancel()
        await stopping
