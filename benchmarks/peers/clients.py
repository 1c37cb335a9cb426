"""Clients of one server, each asking one question after the other about an image, streamed.

    python clients.py URL MODEL FOLDER CLIENTS REQUESTS FIRST DETAIL

FOLDER is that of folders.py. Request n has pixel n of the image inverted, so that no cache of images or of KV has seen
it; FIRST is the first n. Writes one JSON object: seconds in all and to each first token, tokens, the granularities that
were chosen, and how many requests failed, with the first reason.
"""

import asyncio
import base64
import json
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

MAX_TOKENS = 16
LONGEST = 3600.0  # seconds that any answer may take

Body = dict[str, Any]


@dataclass
class Figures:
    """What the clients saw, in seconds."""

    elapsed: float = 0.0
    firsts: list[float] = field(default_factory=list)  # to the first piece of text
    tokens: list[int] = field(default_factory=list)  # of each answer
    granularities: list[int] = field(default_factory=list)
    failed: int = 0
    reason: str = ""  # of the first failure


def main() -> None:
    url, model, home, clients, requests, first, detail = sys.argv[1:]
    numbers = range(int(first), int(first) + int(requests))
    bodies = [body(Path(home), model, n, detail) for n in numbers]
    print(json.dumps(asdict(asyncio.run(ask_all(url, bodies, int(clients))))))


def body(home: Path, model: str, n: int, detail: str) -> Body:
    """The question about the image, whose pixel n is another one."""
    url = f"data:image/png;base64,{base64.b64encode(changed(home / 'image.jpg', n)).decode()}"
    image = {"type": "image_url", "image_url": {"url": url, "detail": detail}}
    content = [image, {"type": "text", "text": (home / "question.txt").read_text()}]
    options = {"max_tokens": MAX_TOKENS, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    return {"model": model, "messages": [{"role": "user", "content": content}], **options}


def changed(file: Path, n: int) -> bytes:
    """The image with pixel n inverted, as PNG."""
    picture = Image.open(file).convert("RGB")
    place = (n % picture.width, n // picture.width)
    red, green, blue = picture.getpixel(place)  # type: ignore[misc]  # it depends on the mode
    picture.putpixel(place, (255 - red, 255 - green, 255 - blue))
    written = BytesIO()
    picture.save(written, "PNG")
    return written.getvalue()


async def ask_all(url: str, bodies: list[Body], clients: int) -> Figures:
    """Let so many clients share the requests."""
    figures, waiting = Figures(), iter(bodies)

    async def client() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=LONGEST) as http:
            for one in waiting:
                await ask(http, one, figures)

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    figures.elapsed = time.perf_counter() - start
    return figures


async def ask(http: httpx.AsyncClient, body: Body, figures: Figures) -> None:
    """Ask once. An answer without text, and one that breaks off, is a failure."""
    start, first, tokens = time.perf_counter(), None, 0
    chosen: list[int] = []
    try:
        async with http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise ValueError(f"status {response.status_code}: {(await response.aread()).decode()}")
            async for chunk in chunks(response):
                if first is None and any(choice["delta"].get("content") for choice in chunk["choices"]):
                    first = time.perf_counter() - start
                chosen = [image["granularity"] for image in (chunk.get("avg") or {}).get("images", [])] or chosen
                tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
        if first is None:
            raise ValueError("the answer has no text")
    except (httpx.HTTPError, ValueError) as error:
        figures.failed += 1
        figures.reason = figures.reason or (str(error) or type(error).__name__)[:300]
        return
    figures.firsts.append(first)
    figures.tokens.append(tokens)
    figures.granularities += chosen


async def chunks(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The stream's objects. Raises ValueError for an error among them, and where its end is missing."""
    async for line in response.aiter_lines():
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise ValueError(str(chunk["error"]))
            yield chunk
    raise ValueError("the stream broke off")


if __name__ == "__main__":
    main()
