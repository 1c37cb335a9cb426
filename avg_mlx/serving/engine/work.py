"""A request on its way through the engine."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from ...errors import InputError, failure, origin
from ..jobs import Deliver, Event, Failed, Job, Stopping

log = logging.getLogger(__name__)


class Work:
    """A job, whoever waits for it, and since when. It is the ticket that the client holds."""

    def __init__(self, job: Job, deliver: Deliver, wake: Callable[[], None]):
        self.job = job
        self.cancelled = False
        self.under_load = False  # whether a full queue made its visual tokens dearer
        self.submitted = time.perf_counter()
        self._deliver, self._wake = deliver, wake

    def cancel(self) -> None:
        """Give the request up, from any thread."""
        self.cancelled = True
        self._wake()

    def tell(self, event: Event) -> None:
        """Deliver an event, unless the request was given up. Who cannot take it has given up."""
        if self.cancelled:
            return
        try:
            self._deliver(event)
        except Exception as error:
            log.error("an event could not be delivered, so the request is given up: %s", origin(error))
            self.cancelled = True

    def fail(self, error: Exception) -> Literal["input", "stopping", "fault"]:
        """Deliver the failure that ends the request, and return its kind."""
        kind: Literal["input", "stopping", "fault"] = "fault"
        if isinstance(error, InputError):
            kind = "input"
        elif isinstance(error, Stopping):
            kind = "stopping"
        self.tell(Failed(failure(error), kind))
        self.cancelled = True  # so that nothing comes after it
        return kind

    def drop_images(self) -> None:
        """Forget the crops, of which nothing is needed once they were seen."""
        self.job = replace(self.job, images=(), looking=())

    def waited(self, worked: float) -> float:
        """Seconds since it was submitted, without those in which the engine `worked` for it."""
        return max(0.0, time.perf_counter() - self.submitted - worked)
