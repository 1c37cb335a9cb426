"""`avg-mlx serve`: a server's life as a command."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
from serving import WIDE, chat

from avg_mlx import generate
from avg_mlx.cli import serve
from avg_mlx.cli.serve import main


class Running:
    """The command in a process of its own."""

    def __init__(self, folder, *options: str, **environment: str):
        command = [sys.executable, "-m", "avg_mlx", "serve", "--model", str(folder), "--port", "0", *options]
        env = os.environ | {"PYTHONUNBUFFERED": "1"} | environment
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.lines: list[str] = []
        self.url = ""
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            if found := re.search(r"Serving (\S+) at (http://\S+);", line):
                self.name, self.url = found.groups()
                break
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stderr:
            self.lines.append(line.rstrip())

    def end(self, number: int = signal.SIGTERM) -> int:
        """Signal, and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(120)


@contextmanager
def running(folder, *options: str, **environment: str):
    server = Running(folder, *options, **environment)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()


def test_it_says_where_it_listens_what_it_serves_and_how_to_stop(tiny_folder, tiny):
    with running(tiny_folder, "--max-tokens", "5", "--granularity", "4", "--api-key", "sesame") as server:
        assert server.name == tiny_folder.name == "model"
        assert "Ctrl-C" in server.lines[-1]
        body = {"messages": chat("Why?", WIDE)["messages"]}
        headers = {"Authorization": "Bearer sesame"}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=120).json()
        expected = generate(*tiny, "Why?", WIDE, granularity=4, max_tokens=5)
        assert answer["choices"][0]["message"]["content"] == expected.text
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        assert server.end(signal.SIGINT) == 0
        assert server.process.stdout.read() == ""
        logged = [json.loads(line) for line in server.lines if line.startswith("{")]
        assert [(line["path"], line["status"]) for line in logged] == [
            ("/v1/chat/completions", 200),
            ("/v1/models", 401),
        ]
        assert "sesame" not in "".join(server.lines)


def stream(url: str, tokens: int, results: list) -> None:
    """Ask for a long answer, and keep the events of its stream, or what came instead."""
    try:
        body = chat("Tell me a story.", max_tokens=tokens, stream=True)
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=120) as response:
            lines = [line for line in response.iter_lines() if line]
        results.append((response.status_code, [line.removeprefix("data: ") for line in lines]))
    except httpx.HTTPError as error:
        results.append((None, [repr(error)]))


@pytest.mark.parametrize(("grace", "signals"), [("60", 1), ("0", 1), ("60", 2)])
def test_a_server_that_is_asked_to_end_leaves_no_stream_without_its_end(tiny_folder, grace, signals):
    """Under load: those that run finish, or are told that they do not, and the exit status is 0."""
    with running(tiny_folder, "--grace", grace, "--slots", "3", "--quiet", "--extra-eos-token", "7") as server:
        results: list = []
        threads = [threading.Thread(target=stream, args=(server.url, 450, results)) for _ in range(6)]
        for thread in threads:
            thread.start()
        metric = re.compile(r'avg_mlx_requests\{stage="decoding"\} ([1-9])')
        while not metric.search(httpx.get(f"{server.url}/metrics", timeout=60).text) and len(results) != 6:
            time.sleep(0.01)
        if signals == 2:  # the second one waits no longer
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.05)
        assert server.end() == 0
        for thread in threads:
            thread.join(60)
        assert len(results) == 6
        for status, lines in results:
            if status == 200:
                assert lines[-1] == "[DONE]"
                last = json.loads(lines[-2])
                assert "error" in last or last["choices"][0]["finish_reason"]
            else:
                assert (status, json.loads(lines[-1])["error"]["code"]) == (503, "stopping")
        finished = [lines for status, lines in results if status == 200 and "error" not in json.loads(lines[-2])]
        assert finished or grace == "0" or signals == 2
        assert not any(line.startswith("{") for line in server.lines)
        assert "Traceback" not in "".join(server.lines)


def test_a_key_can_come_from_the_environment(tiny_folder):
    with running(tiny_folder, "--name", "mine", AVG_MLX_API_KEY="sesame") as server:
        assert server.name == "mine"
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        answer = httpx.get(f"{server.url}/v1/models", headers={"Authorization": "Bearer sesame"})
        assert answer.json()["data"][0]["id"] == "mine"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_a_host_that_others_can_reach_needs_a_key(refused, tiny_folder, monkeypatch, host):
    monkeypatch.delenv(serve.KEY, raising=False)
    line = refused(main, "--model", tiny_folder, "--host", host)
    assert host in line
    assert "--api-key" in line


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(refused, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        line = refused(main, "--model", tmp_path / "nowhere", "--port", port)
    assert str(port) in line
    assert "choose another" in line


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--media-path", "nowhere"], "nowhere"),
        (["--port", "70000"], "70000"),
        (["--slots", "0"], "0"),
        (["--kv-bits", "4"], "--kv-bits"),
        (["--host", "no such host"], "no such host"),
    ],
)
def test_options_that_cannot_be_used_are_one_line(refused, tiny_folder, options, told, monkeypatch):
    monkeypatch.setenv(serve.KEY, "sesame")
    assert told in refused(main, "--model", tiny_folder, "--port", "0", *options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--granularity", "3"], "1, 2, 4, 8, 16"),
        (["--granularity", "4", "--max-visual-tokens", "9"], "--max-visual-tokens"),
        (["--top-k", "100000"], "--top-k"),
    ],
)
def test_options_that_this_model_does_not_have_end_it_after_loading(failing, tiny_folder, options, told):
    status, line = failing("--model", tiny_folder, *options)
    assert status == 2
    assert told in line


def test_a_model_that_cannot_be_loaded_is_one_line(failing, tmp_path):
    status, line = failing("--model", tmp_path / "nowhere")
    assert status != 0
    assert "nowhere" in line


@pytest.fixture
def failing(capfd):
    """`failing(*options)` runs the command, which says that it loads and then one line more."""

    def run(*options) -> tuple[int, str]:
        status = main(["--port", "0", *map(str, options)])
        loading, line = capfd.readouterr().err.splitlines()
        assert loading.startswith("Loading")
        return status, line

    return run


def test_without_the_extra_it_says_what_to_install(refused, tiny_folder, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("avg_mlx.serving.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'avg-mlx[serve]'" in refused(main, "--model", tiny_folder)


def test_it_serves_from_one_process_and_says_so(failing, tiny_folder, monkeypatch):
    import mlx.core as mx

    class Two:
        def size(self) -> int:
            return 2

    monkeypatch.setattr(mx.distributed, "init", Two)
    status, line = failing("--model", tiny_folder)
    assert status == 2
    assert "mlx.launch" in line
