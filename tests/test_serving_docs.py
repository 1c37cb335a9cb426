"""What docs/serving.md shows is run: every request, and the Python example."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from serving import serving

from avg_mlx import generate, load
from avg_mlx.serving.openapi import description
from avg_mlx.weights.demo import DEMO, demo_model

PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8080"
PICTURE = demo_model() / "sign.png"


# Stands for curl: its words, each ended by a NUL, and then what it reads.
CURL = r"""curl() { printf '%s\0' "$@"; case " $* " in *" @- "*) cat;; esac; }"""


def commands() -> list[str]:
    """The curl commands, as they are typed."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    return [command for block in blocks for command in re.split(r"\n(?=curl )", block)]


def path_of(command: str) -> str:
    return command.split()[1].removeprefix(ADDRESS)


def said(command: str, folder: Path) -> tuple[dict[str, str], str]:
    """What the shell makes of a command: its options, and the body."""
    shutil.copy(PICTURE, folder / "picture.png")
    told = subprocess.run(["bash", "-c", f"{CURL}\n{command}"], cwd=folder, capture_output=True, check=True, text=True)
    address, *options, body = told.stdout.split("\0")
    assert address == ADDRESS + path_of(command)
    return dict(zip(options[::2], options[1::2], strict=True)), body


@pytest.fixture(scope="module")
def demo():
    return load(DEMO)


@pytest.fixture(scope="module")
def server(demo):
    with serving(demo, name=DEMO) as server:
        yield server


@pytest.mark.parametrize("command", commands(), ids=path_of)
def test_a_request_is_answered(server, demo, command, tmp_path):
    options, body = said(command, tmp_path)
    headers = dict([options["-H"].split(": ")]) if "-H" in options else {}
    path = path_of(command)
    response = server.post(body, path, headers=headers) if body else server.http.get(path)
    assert response.status_code == 200, response.text
    if path == "/v1/chat/completions":
        expected = generate(*demo, "What is written?", PICTURE, max_tokens=20)
        assert response.json()["choices"][0]["message"]["content"] == expected.text
    if path == "/v1/responses":
        expected = generate(*demo, "What shape is this?", PICTURE, max_tokens=20)
        assert response.json()["output"][0]["content"][0]["text"] == expected.text


def test_every_endpoint_has_a_request():
    shown = {path_of(command).replace(f"/{DEMO}", "/{model}") for command in commands()}
    assert shown == set(description(DEMO, ())["paths"])


def test_the_python_example_runs(server, demo, capsys):
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    code = code.replace(ADDRESS, server.url).replace('"photo.png"', repr(str(PICTURE)))
    names: dict = {}
    exec(compile(code, "docs/serving.md", "exec"), names)
    answer = generate(*demo, "What is written?", PICTURE)
    assert names["answer"].choices[0].message.content == answer.text
    assert capsys.readouterr().out.count(answer.text) >= 2
    assert names["budget"].avg["visual_tokens"] <= 50


def test_the_description_is_one_that_clients_can_read(server):
    told = server.http.get("/openapi.json").json()
    references = re.findall(r'"#/components/schemas/(\w+)"', json.dumps(told))
    assert set(references) == set(told["components"]["schemas"])
