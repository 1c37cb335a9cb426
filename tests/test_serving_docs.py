"""What docs/serving.md shows is run: every request, and the Python example."""

import base64
import json
import re
import shlex

import pytest
from conftest import ROOT
from serving import serving

from avg_mlx import generate, load
from avg_mlx.serving.openapi import description
from avg_mlx.weights.demo import DEMO, demo_model

PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8080"
PICTURE = demo_model() / "sign.png"


def commands() -> list[list[str]]:
    """The words of each curl command."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    return [shlex.split(command) for block in blocks for command in re.split(r"\n(?=curl )", block)]


@pytest.fixture(scope="module")
def demo():
    return load(DEMO)


@pytest.fixture(scope="module")
def server(demo):
    with serving(demo, name=DEMO) as server:
        yield server


@pytest.mark.parametrize("words", commands(), ids=lambda words: words[1].removeprefix(ADDRESS))
def test_a_request_is_answered(server, demo, words):
    curl, address, *options = words
    assert curl == "curl"
    given = dict(zip(options[::2], options[1::2], strict=True))
    headers = dict([given["-H"].split(": ")]) if "-H" in given else {}
    body = given.get("-d", "").replace("IMAGE", base64.b64encode(PICTURE.read_bytes()).decode())
    path = address.removeprefix(ADDRESS)
    response = server.post(body, path, headers=headers) if body else server.http.get(path)
    assert response.status_code == 200, response.text
    if path == "/v1/chat/completions":
        expected = generate(*demo, "what is written?", PICTURE, max_tokens=20)
        assert response.json()["choices"][0]["message"]["content"] == expected.text
    if path == "/v1/responses":
        expected = generate(*demo, "what shape is in the image?", PICTURE, max_tokens=20)
        assert response.json()["output"][0]["content"][0]["text"] == expected.text


def test_every_endpoint_has_a_request():
    shown = {words[1].removeprefix(ADDRESS).replace(f"/{DEMO}", "/{model}") for words in commands()}
    assert shown == set(description(DEMO, ())["paths"])


def test_the_python_example_runs(server, demo, capsys):
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    code = code.replace(ADDRESS, server.url).replace('"photo.png"', repr(str(PICTURE)))
    names: dict = {}
    exec(compile(code, "docs/serving.md", "exec"), names)
    answer = generate(*demo, "what is written?", PICTURE)
    assert names["answer"].choices[0].message.content == answer.text
    assert capsys.readouterr().out.count(answer.text) >= 2
    assert names["budget"].avg["visual_tokens"] <= 50


def test_the_description_is_one_that_clients_can_read(server):
    told = server.http.get("/openapi.json").json()
    references = re.findall(r'"#/components/schemas/(\w+)"', json.dumps(told))
    assert set(references) == set(told["components"]["schemas"])
