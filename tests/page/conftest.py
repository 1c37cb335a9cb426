"""A browser, a server, and the page between them. Whatever it does, it asks no other host and breaks no policy."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from conftest import ROOT
from playwright.sync_api import Browser, BrowserContext, expect, sync_playwright
from serving import Server

SECONDS = 300  # that anything may take: nothing is timed here
expect.set_options(timeout=1000 * SECONDS)

SIGN = ROOT / "avg_mlx" / "demo_model" / "sign.png"


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Debian's chromium, or Google Chrome."""
    found = shutil.which("chromium")
    which = {"executable_path": found} if found else {"channel": "chrome"}
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(args=["--no-sandbox", "--disable-background-networking"], **which)
        yield launched
        launched.close()


@contextmanager
def running(*options: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """The address of `avg-mlx serve --model demo`, and its process."""
    command = [sys.executable, "-m", "avg_mlx", "serve", "--model", "demo", "--quiet", "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = next(line for line in process.stderr if "http://" in line)
        yield line.split(" at ")[1].split(";")[0], process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """Where the demo model is served."""
    with running() as (address, _):
        yield address


class Visit:
    """The page as someone sees it who has opened it, and what it has asked for."""

    def __init__(self, context: BrowserContext, url: str, keyed: bool):
        self.url, self.context, self.page = url, context, context.new_page()
        self.asked: list[tuple[str, dict]] = []  # (path, body) of each request that has one
        self.faults: list[str] = []
        self.page.set_default_timeout(1000 * SECONDS)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", self._heard)
        self.page.on("request", self._sent)
        self.page.goto(url)
        self.page.wait_for_selector("#key-dialog[open]" if keyed else "#model:not(:empty)")

    def _heard(self, message) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.faults.append(message.text)  # a violated policy, above all

    def _sent(self, request) -> None:
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.faults.append(request.url)
        if request.post_data:
            self.asked.append((request.url.removeprefix(self.url), json.loads(request.post_data)))

    def give(self, picture=SIGN, name: str = "picture.png") -> None:
        """Choose a picture: a file, or its bytes."""
        data = picture if isinstance(picture, bytes) else picture.read_bytes()
        self.page.set_input_files("#file", files=[{"name": name, "mimeType": "image/png", "buffer": data}])

    def ask(self, question: str, answers: int = 1) -> None:
        """Ask, and wait for the answers and for what belongs to the last one."""
        before = self.page.locator(".answer").count()
        self.page.fill("#question", question)
        self.page.click("#ask")
        done = self.page.locator(".answer:is(.done, .stopped, .failed)")
        done.nth(before + answers - 1).wait_for()
        self.page.wait_for_selector("#layers:not([hidden])")

    def text(self, selector: str) -> str:
        """What is written in the only element of this kind."""
        return self.page.locator(selector).inner_text()

    def bodies(self, path: str) -> list[dict]:
        """What was sent to a path."""
        return [body for where, body in self.asked if where == path]

    def api(self, path: str, body: dict) -> dict:
        """What the server says to the same without the page."""
        body = {key: value for key, value in body.items() if key not in ("stream", "stream_options")}
        answer = httpx.post(f"{self.url}{path}", json=body, timeout=SECONDS)
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest.fixture
def visit(browser, url):
    """`visit(server, keyed, **how)` opens the page in a browser of its own.

    keyed: whether the server asks for a key first. how: what playwright's contexts take.
    """
    opened: list[Visit] = []

    def visit(server: Server | str = url, keyed: bool = False, **how) -> Visit:
        address = server if isinstance(server, str) else server.url
        context = browser.new_context(**{"viewport": {"width": 1440, "height": 900}} | how)
        opened.append(Visit(context, address, keyed))
        return opened[-1]

    yield visit
    faults = [fault for each in opened for fault in each.faults]
    for each in opened:
        each.context.close()
    assert faults == []
