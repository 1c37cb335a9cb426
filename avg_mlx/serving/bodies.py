"""Reading what clients send: JSON only, within limits of size and time, and not too much for all of them together."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import ClientDisconnect, Request

from ..errors import InputError
from ..files import parse_json
from .fields import Fields
from .problems import HungUp, Problem

RETRY = 1  # seconds until there may be room for another request
MEBIBYTE = 1 << 20


class Intake:
    """The requests that are being read, looked at or answered, and the bytes that they hold.

    most: requests at a time. max_bytes: of one body. total_bytes: of all bodies and crops. seconds: that a body may
    take to arrive.
    """

    def __init__(self, most: int, max_bytes: int, total_bytes: int, seconds: float):
        self.most, self.max_bytes, self.total_bytes, self.seconds = most, max_bytes, total_bytes, seconds
        self.requests = self.bytes = 0

    @contextmanager
    def place(self) -> Iterator["Place"]:
        """Give a request its place. Raises Problem if there is none."""
        if self.requests >= self.most:
            raise _full(f"{self.requests} requests are being answered or wait")
        self.requests += 1
        place = Place(self)
        try:
            yield place
        finally:
            self.requests -= 1
            place.hold(-place.bytes)

    async def read(self, request: Request, place: "Place") -> bytes:
        """Return a request's body. Raises Problem for one that is no JSON, too large or too slow, and HungUp."""
        _check_kind(request.headers.get("content-type", ""))
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self.max_bytes:
            raise self._too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(self.seconds):
                async for chunk in request.stream():
                    place.hold(len(chunk))
                    body += chunk
                    if len(body) > self.max_bytes:
                        raise self._too_large()
        except TimeoutError:
            raise Problem(408, f"the body did not arrive within {self.seconds:g} s", code="timeout") from None
        except ClientDisconnect:
            raise HungUp from None
        return bytes(body)

    def _too_large(self) -> Problem:
        message = f"the body is larger than {self.max_bytes / MEBIBYTE:g} MB; make the images smaller"
        return Problem(413, message, code="request_too_large")


class Place:
    """One request's share of the intake, in bytes."""

    def __init__(self, intake: Intake):
        self.intake, self.bytes = intake, 0

    def hold(self, count: int) -> None:
        """Hold more bytes, or fewer if `count` is negative. Raises Problem if all requests together hold too many."""
        self.bytes += count
        self.intake.bytes += count
        if count > 0 and self.intake.bytes > self.intake.total_bytes:
            raise _full("the requests that are being read hold all the memory that they may")


def _full(why: str) -> Problem:
    return Problem(429, f"{why}; try again later", code="queue_full", retry_after=RETRY)


def _check_kind(content_type: str) -> None:
    kind = content_type.partition(";")[0].strip().lower()
    if kind != "application/json":
        message = f"the content type is {kind or 'missing'}; send JSON, with Content-Type: application/json"
        raise Problem(415, message, code="unsupported_media_type")


def read_object(body: bytes) -> Fields:
    """Return the JSON object that a body is. Raises Problem if it is none."""
    try:
        content = parse_json(body)
    except InputError as error:
        raise Problem(400, f"the body is {error}", code="invalid_json") from None
    if not isinstance(content, dict):
        raise Problem(400, "the body is JSON, but no object", code="invalid_json")
    return Fields(content)
