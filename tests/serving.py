"""A server in this process: a real engine, a real uvicorn on a free port, and clients that ask it."""

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import uvicorn
from PIL import Image

from avg_mlx.serving.engine.thread import Engine
from avg_mlx.serving.jobs import EngineOptions
from avg_mlx.serving.security import own_names
from avg_mlx.serving.server import bind, configure
from avg_mlx.serving.service import Options, Service


def picture(width: int, height: int, seed: int = 0) -> bytes:
    """A PNG file."""
    image = Image.effect_mandelbrot((width, height), (-2, -1, 1 + seed / 10, 1), 50).convert("RGB")
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


WIDE, TALL, SMALL = picture(100, 50), picture(40, 90), picture(30, 30, 1)


def data_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def question(text: str, *images: bytes, detail: str | None = None) -> dict[str, Any]:
    """A user's message, as OpenAI's examples write it: the text before the images."""
    more = {} if detail is None else {"detail": detail}
    parts = [{"type": "image_url", "image_url": {"url": data_uri(image), **more}} for image in images]
    return {"role": "user", "content": [{"type": "text", "text": text}, *parts]}


def chat(text: str, *images: bytes, **options: Any) -> dict[str, Any]:
    """The body of a chat completion."""
    return {"messages": [question(text, *images)], "max_tokens": 8, **options}


class Server:
    """Where it listens, what it is made of, and clients of it."""

    def __init__(self, service: Service, url: str):
        self.service, self.engine, self.url = service, service.engine, url
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key=service.options.key or "none", max_retries=0)
        self.http = httpx.Client(base_url=url, timeout=300)

    def post(self, body: Any, path: str = "/v1/chat/completions", **how: Any) -> httpx.Response:
        return self.http.post(path, **({"content": body} if isinstance(body, bytes | str) else {"json": body}), **how)

    def events(self, body: dict[str, Any], path: str = "/v1/chat/completions") -> list[str]:
        """The data of each event of a stream."""
        with self.http.stream("POST", path, json=body | {"stream": True}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            return [line[6:] for line in response.iter_lines() if line.startswith("data: ")]

    def chunks(self, body: dict[str, Any], path: str = "/v1/chat/completions") -> list[dict[str, Any]]:
        """The objects of a stream."""
        return [json.loads(data) for data in self.events(body, path) if data != "[DONE]"]

    @property
    def idle(self) -> bool:
        """Whether nothing waits or runs, on both sides, and no KV is held but the cache's."""
        status = self.engine.snapshot()
        held = (status.waiting, status.preparing, status.decoding, status.kv_bytes)
        return held == (0, 0, 0, 0) and self.service.intake.requests == self.service.intake.bytes == 0


@contextmanager
def serving(loaded, engine: EngineOptions | None = None, **options: Any) -> Iterator[Server]:
    """Serve a model in threads of this process until the block ends."""
    worker = Engine(lambda: loaded, engine or EngineOptions(slots=4, prefill_step_size=32, kv_bytes=1 << 24))
    worker.start()
    service = Service(worker, Options(**{"name": "tiny", "names": own_names()} | options))
    taken = bind("127.0.0.1", 0)
    server = uvicorn.Server(configure(service))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([taken])), daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield Server(service, f"http://127.0.0.1:{taken.getsockname()[1]}")
    finally:
        worker.stop(0)
        server.should_exit = True
        thread.join(60)


def until(condition, seconds: float = 120) -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
