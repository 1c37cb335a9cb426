"""What clients of the server get together, and how soon /health answers meanwhile: a Markdown table.

    python benchmarks/serving_http.py --model demo --clients 1 8 32

Each client asks one question after the other about an image, streamed. The server is a process of its own, and so is
the one that asks for /health.
"""

import argparse
import asyncio
import base64
import json
import math
import multiprocessing
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import httpx
import numpy as np

from avg_mlx.bench.measure import synthetic_image
from avg_mlx.markdown import table

PAUSE = 0.02  # seconds between two questions for /health
LONGEST = 600.0  # seconds that any answer may take
SIZES = ((800, 600), (336, 336), (600, 800), (1000, 300), (640, 480))


@dataclass
class Figures:
    """What the clients of one round saw, in seconds."""

    elapsed: float = 0.0
    firsts: list[float] = field(default_factory=list)  # to the first piece of text
    wholes: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    tokens: int = 0
    failed: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the server under load.")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=200, help="in each round (default: 200)")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--prompt", default="What is written?")
    args = parser.parse_args()
    with serving(args.model) as server:
        url = address(server)
        try:
            ask_all(url, args, clients=2, requests=10)  # warms up
            rows = [row(clients, ask_all(url, args, clients, args.requests)) for clients in args.clients]
        finally:
            server.terminate()
    header = ["clients", "requests/s", "tokens/s", "first token, s: p50", "p95", "whole, s: p50", "p95"]
    print(table([*header, "/health, ms: p50", "p99", "most", "failed"], rows))


def serving(model: str) -> "subprocess.Popen[str]":
    """Start the server."""
    command = [sys.executable, "-m", "avg_mlx", "serve", "--model", model, "--port", "0", "--quiet", "--queue", "256"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def address(server: "subprocess.Popen[str]") -> str:
    """Wait until the server says where it listens."""
    assert server.stderr is not None
    for line in server.stderr:
        if found := re.search(r"http://[^;]+", line):
            return found[0]
    raise SystemExit("the server did not start")


def ask_all(url: str, args: argparse.Namespace, clients: int, requests: int) -> Figures:
    """Let so many clients ask so many questions together, while another process asks for /health."""
    bodies = [body(args, n) for n in range(len(SIZES))]
    ours, theirs = multiprocessing.Pipe()
    asking = multiprocessing.get_context("spawn").Process(target=ask_for_health, args=(url, theirs))
    asking.start()
    ours.recv()
    figures = Figures()
    start = time.perf_counter()
    asyncio.run(_ask_all(url, bodies, clients, requests, figures))
    figures.elapsed = time.perf_counter() - start
    ours.send("enough")
    figures.health = ours.recv()
    asking.join()
    return figures


def body(args: argparse.Namespace, n: int) -> dict[str, Any]:
    """A question about an image of one of the sizes."""
    image = base64.b64encode(synthetic_image(*SIZES[n])).decode()
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}}
    content = [part, {"type": "text", "text": args.prompt}]
    options = {"max_tokens": args.max_tokens, "stream": True, "stream_options": {"include_usage": True}}
    return {"messages": [{"role": "user", "content": content}], **options}


async def _ask_all(url: str, bodies: Sequence[dict[str, Any]], clients: int, requests: int, figures: Figures) -> None:
    numbers = iter(range(requests))

    async def client() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=LONGEST) as http:
            for n in numbers:
                await _ask(http, bodies[n % len(bodies)], figures)

    await asyncio.gather(*(client() for _ in range(clients)))


async def _ask(http: httpx.AsyncClient, body: dict[str, Any], figures: Figures) -> None:
    start, first = time.perf_counter(), 0.0
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            figures.failed += 1
            return
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if not first and any(choice["delta"].get("content") for choice in chunk["choices"]):
                first = time.perf_counter() - start
            figures.tokens += (chunk.get("usage") or {}).get("completion_tokens", 0)
    figures.wholes.append(time.perf_counter() - start)
    figures.firsts.append(first or figures.wholes[-1])


def ask_for_health(url: str, pipe: Connection) -> None:
    """Ask for /health until told that it is enough, and send how long each answer took."""
    seconds = []
    with httpx.Client(base_url=url, timeout=LONGEST) as http:
        http.get("/health")
        pipe.send("ready")
        while not pipe.poll(PAUSE):
            start = time.perf_counter()
            http.get("/health").raise_for_status()
            seconds.append(time.perf_counter() - start)
    pipe.send(seconds)


def row(clients: int, figures: Figures) -> list[object]:
    """A round's figures as a row."""
    answered = len(figures.wholes)
    return [
        clients,
        f"{answered / figures.elapsed:.1f}",
        f"{figures.tokens / figures.elapsed:.0f}",
        *(f"{share(figures.firsts, percent):.3f}" for percent in (50, 95)),
        *(f"{share(figures.wholes, percent):.3f}" for percent in (50, 95)),
        *(f"{1000 * share(figures.health, percent):.1f}" for percent in (50, 99)),
        f"{1000 * share(figures.health, 100):.1f}",
        figures.failed,
    ]


def share(values: Sequence[float], percent: int) -> float:
    """The value that so many per cent do not exceed; NaN of none."""
    return float(np.percentile(values, percent)) if values else math.nan


if __name__ == "__main__":
    main()
