"""What is wrong with a request, in the shape and with the status that OpenAI's clients expect."""

import logging
from dataclasses import dataclass, replace
from typing import Any

from ..errors import AvgMlxError, InputError, origin, printable
from ..inputs.prompt import TooLong
from .jobs import Failed, Full, Stopping
from .url_images import Unfetchable

logger = logging.getLogger(__name__)

LONGEST_MESSAGE = 1000  # characters
RETRY_STOPPING = 10  # seconds until another server may be there
FAULT = "something went wrong in the server; its log says what"
KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class HungUp(Exception):
    """The client closed the connection; nobody reads an answer."""


@dataclass(eq=False)
class Problem(Exception):
    """An error of HTTP status `status`: what was found, what was expected, what to do.

    param: the field it is about. code: a word for programs. retry_after: in how many seconds to try again.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after: int | None = None

    @property
    def body(self) -> dict[str, Any]:
        """The error as OpenAI writes it."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        message = printable(self.message, LONGEST_MESSAGE)
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """The headers that go with the status."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    def about(self, param: str) -> "Problem":
        """The same problem, with a field that it is about unless there is one."""
        return self if self.param else replace(self, param=param)


def bad_field(param: str, message: str, code: str | None = None) -> Problem:
    """A field that is not what it should be."""
    return Problem(400, f"{param} {message}", param, code)


def as_problem(error: Exception) -> Problem:
    """Return any error as a problem. Only those that are not the client's fault have a status from 500."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, Full):
        return Problem(429, str(error), code="queue_full", retry_after=error.retry_after)
    if isinstance(error, Stopping):
        return Problem(503, str(error), code="stopping", retry_after=RETRY_STOPPING)
    if isinstance(error, Unfetchable):
        return Problem(422, str(error), code="failed_to_download_image")
    if isinstance(error, TooLong):
        return Problem(400, str(error), code="context_length_exceeded")
    if isinstance(error, InputError):
        return Problem(400, str(error))
    if isinstance(error, AvgMlxError):
        return Problem(500, str(error), code="internal_error")
    return Problem(500, FAULT, code="internal_error")


def told_problem(error: Exception) -> Problem:
    """The same for whoever tells it to the client last: a fault of ours is logged."""
    problem = as_problem(error)
    if problem.code == "internal_error" and not isinstance(error, Problem):
        logger.error(origin(error))
    return problem


def of_failure(event: Failed) -> Problem:
    """The problem of a request that the engine could not answer."""
    if event.kind == "stopping":
        return as_problem(Stopping(str(event.error)))
    if event.kind == "fault":
        return Problem(500, FAULT, code="internal_error")
    return as_problem(event.error)
