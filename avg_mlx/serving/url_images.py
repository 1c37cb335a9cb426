"""Images that a request names by their address: fetched from the public internet only, within limits.

A server that fetches whatever it is told could be made to reach what only its own network reaches. So a name is
resolved once, all its addresses are checked, and the connection goes to one of those that were checked; each redirect
goes the same way. Proxies that the environment names are not used, since they would resolve names themselves.
"""

import asyncio
import contextlib
import ipaddress
import re
import socket
import ssl
import string
import urllib.parse
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Any

import h11

from ..errors import InputError, printable
from ..files import too_large
from ..inputs.fetching import shown_url
from .addresses import is_public

PORTS = {"http": 80, "https": 443}
REDIRECTS = 3
REDIRECTING = (301, 302, 303, 307, 308)
HOST = re.compile(r"[a-z0-9._:-]+")
LONGEST_URL = 8192  # characters
READ = 1 << 16  # bytes at a time
REMEDY = "send the image as a data URI"

Resolve = Callable[[str, int], Awaitable[list[str]]]  # host, port → addresses
Connect = Callable[..., Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


class Unfetchable(InputError):
    """An address may be fetched, but there is no image to be had."""


@dataclass(frozen=True)
class Target:
    """Where an address leads."""

    scheme: str
    host: str  # in ASCII, without brackets
    path: str  # with the query

    @property
    def port(self) -> int:
        """The scheme's port; no other is allowed."""
        return PORTS[self.scheme]

    @property
    def authority(self) -> str:
        """The host as the Host header has it."""
        return f"[{self.host}]" if ":" in self.host else self.host


async def resolve(host: str, port: int) -> list[str]:
    """Return a host's addresses, as the system finds them."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(place[0]) for *_, place in found]


class UrlImages:
    """Fetches images from hosts of the public internet.

    hosts: those that may be asked, all if there are none. max_bytes: of an encoded image. seconds: for all of a
    download, redirects included. resolve and connect stand in for the network in tests.
    """

    def __init__(
        self,
        hosts: Collection[str],
        max_bytes: int,
        seconds: float,
        resolve: Resolve = resolve,
        connect: Connect = asyncio.open_connection,
    ):
        self.hosts = frozenset(host.lower().rstrip(".") for host in hosts)
        self.max_bytes, self.seconds = max_bytes, seconds
        self._resolve, self._connect = resolve, connect

    async def fetch(self, url: str) -> bytes:
        """Return the bytes at an address.

        Raises InputError for an address that may not be fetched, and Unfetchable if there is nothing there.
        """
        name = shown_url(url)
        try:
            async with asyncio.timeout(self.seconds):
                return await self._follow(url, name)
        except TimeoutError:
            raise Unfetchable(f"{name} did not arrive within {self.seconds:g} s; {REMEDY}") from None
        except (OSError, ValueError, h11.ProtocolError) as error:
            if isinstance(error, InputError):
                raise
            raise Unfetchable(f"{name} cannot be read ({printable(error, 120)}); {REMEDY}") from None

    async def _follow(self, url: str, name: str) -> bytes:
        for _ in range(1 + REDIRECTS):
            target = parse_target(url)
            addresses = await self._addresses(target)
            found = await self._get(target, addresses, name)
            if isinstance(found, bytes):
                return found
            url = urllib.parse.urljoin(url, found)
        raise Unfetchable(f"{name} redirects more than {REDIRECTS} times; {REMEDY}")

    async def _addresses(self, target: Target) -> list[str]:
        """Resolve a host. InputError if it is not one of those allowed, or if any of its addresses is not public."""
        if self.hosts and target.host.rstrip(".") not in self.hosts:
            raise InputError(f"images are not fetched from {printable(target.host, 80)} here; {REMEDY}")
        addresses = await self._resolve(target.host, target.port)
        if not addresses or not all(is_public(ipaddress.ip_address(address)) for address in addresses):
            raise InputError(f"{printable(target.host, 80)} is not on the public internet; {REMEDY}")
        return addresses

    async def _get(self, target: Target, addresses: list[str], name: str) -> bytes | str:
        """Return the body, or the location that the host redirects to."""
        reader, writer = await self._open(target, addresses)
        try:
            connection = h11.Connection(h11.CLIENT)
            writer.write(connection.send(_request(target)) or b"")
            writer.write(connection.send(h11.EndOfMessage()) or b"")
            return await self._receive(connection, reader, name)
        finally:
            writer.transport.abort()

    async def _open(self, target: Target, addresses: list[str]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect to the first of the checked addresses that answers."""
        secure: dict[str, Any] = {}
        if target.scheme == "https":  # the certificate must be the host's, though the connection goes to an address
            secure = {"ssl": ssl.create_default_context(), "server_hostname": target.host}
        for address in addresses[:-1]:
            with contextlib.suppress(OSError):
                return await self._connect(address, target.port, **secure)
        return await self._connect(addresses[-1], target.port, **secure)

    async def _receive(self, connection: h11.Connection, reader: asyncio.StreamReader, name: str) -> bytes | str:
        chunks, size = [], 0
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(READ))
            elif isinstance(event, h11.Response):
                if event.status_code in REDIRECTING:
                    return _location(event)
                if event.status_code != 200:
                    raise Unfetchable(f"{name} answered {event.status_code}; check the address")
            elif isinstance(event, h11.Data):
                chunks.append(bytes(event.data))
                size += len(event.data)
                if size > self.max_bytes:
                    raise Unfetchable(too_large(name, size, self.max_bytes, "make the image smaller"))
            elif isinstance(event, h11.EndOfMessage):
                return b"".join(chunks)
            elif not isinstance(event, h11.InformationalResponse):  # the connection was closed
                raise Unfetchable(f"{name} did not answer; {REMEDY}")


def parse_target(url: str) -> Target:
    """Read an address. InputError for anything but a plain http(s) address at the scheme's own port."""
    name = shown_url(url)
    if len(url) > LONGEST_URL or any(c <= " " or c in "\\\x7f" for c in url):
        raise InputError(f"{name} is not an address: it is too long, or has spaces or backslashes; {REMEDY}")
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = (parts.hostname or "").encode("idna").decode().lower(), parts.port
    except ValueError as error:  # a port that is no number, half a bracket, a label that is too long
        raise InputError(f"{name} is not an address ({printable(error, 80)}); {REMEDY}") from None
    if parts.scheme not in PORTS or not HOST.fullmatch(host):
        raise InputError(f"{name} is not an http(s) address; {REMEDY}")
    if "@" in parts.netloc:
        raise InputError(f"{name} has a user or a password in it, which are not sent; leave them out")
    if port not in (None, PORTS[parts.scheme]):
        raise InputError(f"{name} is at port {port}; images are fetched from {parts.scheme}'s own port only; {REMEDY}")
    path = urllib.parse.quote(parts.path or "/", safe=string.punctuation)
    query = urllib.parse.quote(parts.query, safe=string.punctuation)
    return Target(parts.scheme, host, f"{path}?{query}" if query else path)


def _request(target: Target) -> h11.Request:
    headers = [
        ("Host", target.authority),
        ("User-Agent", "avg-mlx"),
        ("Accept", "image/*"),
        ("Accept-Encoding", "identity"),
        ("Connection", "close"),
    ]
    return h11.Request(method="GET", target=target.path, headers=headers)


def _location(response: h11.Response) -> str:
    return next((value.decode("latin-1") for key, value in response.headers if key == b"location"), "")
