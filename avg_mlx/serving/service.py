"""What the endpoints share: the engine, what is served and how, and the way of a request through them."""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from .asking import Asked, Defaults
from .bodies import Intake, Place, read_object
from .fields import Fields
from .images import ImageReader
from .jobs import Engine, Job
from .problems import Problem
from .url_images import UrlImages

MEBIBYTE = 1 << 20
WORKERS = min(4, os.cpu_count() or 1)

Read = Callable[[Fields], Asked]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Options:
    """How the server behaves; what it answers with is in `defaults`.

    name: what the model is called in requests and answers. key: the API key, if one is needed. names: under which
    the server may be asked for, beside addresses. origins: whose pages may ask, in a browser. media_path: the folder
    whose files requests may name. url_hosts: whose images are fetched; none of them means all of the public internet,
    and None that addresses are refused. most: requests at a time. The others are limits, for one request but for
    total_bytes, and seconds.
    """

    name: str
    defaults: Defaults = field(default_factory=Defaults)
    key: str | None = None
    names: frozenset[str] = frozenset()
    origins: tuple[str, ...] = ()
    media_path: Path | None = None
    url_hosts: tuple[str, ...] | None = None
    most: int = 64
    max_body: int = 32 * MEBIBYTE
    total_bytes: int = 1024 * MEBIBYTE
    max_images: int = 16
    max_image_bytes: int = 20 * MEBIBYTE
    body_seconds: float = 30.0
    url_seconds: float = 10.0
    stall_seconds: float = 60.0


class Service:
    """Everything that an endpoint needs."""

    def __init__(self, engine: Engine, options: Options):
        self.engine, self.options = engine, options
        self.created = int(time.time())
        self.answered: Counter[tuple[str, int]] = Counter()  # (path, status) → responses
        self.intake = Intake(options.most, options.max_body, options.total_bytes, options.body_seconds)
        self.workers: Executor = ThreadPoolExecutor(WORKERS, "request")
        urls = None
        if options.url_hosts is not None:
            urls = UrlImages(options.url_hosts, options.max_image_bytes, options.url_seconds)
        max_pixels = options.defaults.looking.max_pixels
        self.images = ImageReader(
            engine.config, self.workers, options.max_image_bytes, max_pixels, options.media_path, urls
        )

    async def read(self, body: bytes, read: Read) -> Asked:
        """Read a request in a worker thread; a body of many megabytes takes a while."""
        return await self.in_worker(lambda: read(read_object(body)))

    async def in_worker(self, work: Callable[[], Result]) -> Result:
        """Do in a worker thread what would stop all other requests for a while."""
        return await asyncio.get_running_loop().run_in_executor(self.workers, work)

    async def job(self, asked: Asked, place: Place) -> Job:
        """Get the images of a request, which holds them in its place. Raises Problem for one that cannot be used."""
        if len(asked.images) > self.options.max_images:
            message = f"there are {len(asked.images)} images; send {self.options.max_images} at most"
            raise Problem(400, message, code="too_many_images")
        for looking in asked.job.looking:  # before an image is decoded for nothing
            looking.check(self.engine.config)
        start = time.perf_counter()
        images = await self.images.read(asked.images, place.hold)
        return replace(asked.job, images=images, preprocess_seconds=time.perf_counter() - start)

    def standing(self) -> dict[str, Any]:
        """Whether the engine works, and why not."""
        status = self.engine.snapshot()
        if not status.alive:
            return {"status": "dead"}
        if status.stopping:
            return {"status": "stopping"}
        if status.standing > self.options.stall_seconds:
            return {"status": "standing", "seconds": round(status.standing, 1)}
        return {"status": "ok"}
