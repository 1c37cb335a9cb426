"""Requests that wait, in the order they came."""

import threading
from collections import deque

from .work import Work


class Queue:
    """At most `limit` requests; any thread may offer one."""

    def __init__(self, limit: int):
        self.limit = limit
        self._lock = threading.Lock()
        self._waiting: deque[Work] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def offer(self, work: Work) -> bool:
        """Put a request at the end, if there is room."""
        with self._lock:
            if len(self._waiting) >= self.limit:
                return False
            self._waiting.append(work)
            return True

    def take(self) -> Work | None:
        """Take the first request, or None if there is none."""
        with self._lock:
            return self._waiting.popleft() if self._waiting else None

    def take_cancelled(self) -> list[Work]:
        """Take those that were given up."""
        with self._lock:
            given_up = [work for work in self._waiting if work.cancelled]
            for work in given_up:
                self._waiting.remove(work)
            return given_up
