"""Where the server ends: who may ask, how much, and what bad requests get."""

import gzip
import itertools
import json
import socket
import threading
from dataclasses import replace

import httpx
import pytest
from serving import SMALL, WIDE, chat, data_uri, picture, question, serving, until

from avg_mlx import load
from avg_mlx.inference.options import Looking
from avg_mlx.serving.asking import Defaults
from avg_mlx.serving.images import ImageReader
from avg_mlx.serving.jobs import EngineOptions
from avg_mlx.serving.server import bind

PATHS = ("/v1/chat/completions", "/v1/responses", "/v1/route")


@pytest.fixture(scope="module")
def own(tiny_folder):
    model, tokenizer = load(tiny_folder)
    tokenizer.eos_token_ids = set()
    return model, tokenizer


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A folder whose files may be named, a file beside it, and links both ways."""
    home = tmp_path_factory.mktemp("media")
    (home / "open").mkdir()
    (home / "secret.png").write_bytes(SMALL)
    (home / "open" / "small image.png").write_bytes(SMALL)
    (home / "open" / "out.png").symlink_to(home / "secret.png")
    (home / "open" / "in.png").symlink_to(home / "open" / "small image.png")
    (home / "open" / "round.png").symlink_to(home / "open" / "round.png")
    return home


@pytest.fixture(scope="module")
def server(own, media):
    limits = {"max_body": 1 << 20, "max_images": 3, "max_image_bytes": 1 << 19, "body_seconds": 1.0}
    with serving(own, media_path=media / "open", defaults=Defaults(Looking(max_pixels=10_000)), **limits) as server:
        yield server


def refused(response: httpx.Response, status: int) -> dict:
    """The error of a response, after it is seen that it has OpenAI's shape."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    return error


def begun(server, length: int) -> socket.socket:
    """A connection on which the head of a request was sent."""
    client = socket.create_connection(server.url.removeprefix("http://").split(":"))
    head = "POST /v1/route HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    client.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode())
    return client


def image(source: str, **more) -> dict:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": source, **more}}]}]}


def test_without_the_key_only_health_is_answered(own):
    with serving(own, key="sesame") as server:
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
            assert refused(server.http.get(path), 401)["type"] == "authentication_error"
        for header in (
            "Bearer sesamE",
            "sesame",
            "Basic sesame",
            "Bearer",
            "Bearer sesame2",
            "Bearer \u00e4".encode("latin-1"),
        ):
            response = server.post(chat("Why?"), headers={"Authorization": header})
            assert refused(response, 401)["code"] == "invalid_api_key"
        assert server.http.get("/health").status_code == 200
        assert [model.id for model in server.openai.models.list()] == ["tiny"]


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "evil.example:80", "", "[::1", "a" * 300])
def test_a_page_that_gives_its_name_our_address_is_refused(server, host):
    assert refused(server.http.get("/v1/models", headers={"Host": host}), 400)["code"] == "unknown_host"


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8080", "127.0.0.1:1", "[::1]:80", "192.168.1.5", "localhost."]
)
def test_addresses_and_our_own_names_are_fine(server, host):
    assert server.http.get("/v1/models", headers={"Host": host}).status_code == 200


def test_pages_of_other_origins_may_not_ask_unless_they_are_allowed(server, own):
    origin = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    asked = origin | {"Access-Control-Request-Headers": "authorization,content-type"}
    assert "access-control-allow-origin" not in server.http.options("/v1/chat/completions", headers=asked).headers
    assert "access-control-allow-origin" not in server.post(chat("Why?"), headers=origin).headers
    with serving(own, origins=("https://app.example",), key="sesame") as allowing:
        openais = asked | {"Access-Control-Request-Headers": "authorization,content-type,x-stainless-os"}
        for headers in (asked, openais):
            preflight = allowing.http.options("/v1/chat/completions", headers=headers)
            assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://app.example"
        assert "access-control-allow-credentials" not in preflight.headers
        other = allowing.http.options("/v1/chat/completions", headers=asked | {"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_only_json_is_read(server, kind):
    response = server.post(json.dumps(chat("Why?")), headers={"Content-Type": kind})
    assert "application/json" in refused(response, 415)["message"]


def test_a_body_is_bounded_whether_its_length_is_told_or_not(server):
    large = json.dumps(chat("x" * (1 << 20)))
    assert refused(server.post(large, headers={"Content-Type": "application/json"}), 413)["code"] == "request_too_large"

    def pieces():
        yield from itertools.repeat(b" " * 65536, 20)

    response = server.http.post("/v1/responses", content=pieces(), headers={"Content-Type": "application/json"})
    refused(response, 413)


def test_a_body_that_does_not_come_is_given_up(server):
    with begun(server, 100) as client:
        client.sendall(b"{")
        assert client.recv(4096).startswith(b"HTTP/1.1 408")
    until(lambda: server.idle)


def test_all_requests_together_hold_no_more_than_they_may(own):
    with serving(own, max_body=1 << 20, total_bytes=1 << 20) as server:
        with begun(server, 1_000_000) as slow:
            slow.sendall(b" " * 900_000)
            until(lambda: server.service.intake.bytes >= 900_000)
            error = server.post(chat("Why? " + " " * 200_000))
            assert refused(error, 429)["code"] == "queue_full"
            assert error.headers["retry-after"] == "1"
        until(lambda: server.idle)
        assert server.post(chat("Why?")).status_code == 200


def test_images_are_counted_before_the_next_one_is_read(own, monkeypatch):
    read = []
    cut = ImageReader._cut
    monkeypatch.setattr(ImageReader, "_cut", lambda reader, source: read.append(source) or cut(reader, source))
    with serving(own, total_bytes=1 << 20, max_images=16) as server:
        error = server.post(chat("Why?", *[picture(112, 112, seed) for seed in range(16)]))
        assert refused(error, 429)["code"] == "queue_full"
        assert 0 < len(read) < 16
        until(lambda: server.idle)
        assert server.service.intake.bytes == 0


def test_a_full_server_says_when_to_come_again(own, monkeypatch):
    """The engine is in the middle of a step, one request waits, and there is no place for another."""
    options = EngineOptions(slots=1, queue=1, prefill_step_size=32, kv_bytes=1 << 24)
    with serving(own, options) as server:
        core, began, go_on = server.engine._core, threading.Event(), threading.Event()
        step = core.step

        def halting() -> None:
            began.set()
            assert go_on.wait(120)
            step()

        monkeypatch.setattr(core, "step", halting)
        statuses: list[int] = []
        waiting = threading.Thread(target=lambda: statuses.append(server.post(chat("Why?")).status_code))
        waiting.start()
        assert began.wait(120)
        assert server.engine.snapshot().waiting == 1
        response = server.post(chat("Why?"))
        assert refused(response, 429)["type"] == "rate_limit_error"
        assert int(response.headers["retry-after"]) >= 1
        go_on.set()
        waiting.join()
        assert statuses == [200]
        assert server.post(chat("Why?")).status_code == 200


def test_too_many_requests_at_a_time_are_refused_before_they_are_read(own):
    with serving(own, most=1, body_seconds=60.0) as server:
        head = (
            "POST /v1/route HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
        )
        with socket.create_connection(server.url.removeprefix("http://").split(":")) as slow:
            slow.sendall(head.encode())
            until(lambda: server.service.intake.requests == 1)
            refused(server.post(chat("Why?")), 429)
        until(lambda: server.idle)
        assert server.post(chat("Why?")).status_code == 200


OUTSIDE = [
    "file:///etc/passwd",
    "file://{media}/secret.png",
    "file://{media}/open/../secret.png",
    "file://{media}/open/%2e%2e/secret.png",
    "file://{media}/open/out.png",
    "file://{media}/open/round.png",
    "file://{media}/open/../../nowhere.png",
    "file://evil.example{media}/open/in.png",
    "file:////{media}/secret.png",
    "file://{media}/open/\0",
    "file://{media}/open/" + "a" * 5000,
    "file://{media}/open",
    "file:secret.png",
    "{media}/open/in.png",
    "/dev/zero",
    "open/in.png",
]


@pytest.mark.parametrize("source", OUTSIDE)
def test_files_outside_of_the_media_folder_are_not_read(server, media, source):
    error = refused(server.post(with_text(image(source.format(media=media))), "/v1/route"), 400)
    assert error["param"] == "messages[0].content[0].image_url.url"


@pytest.mark.parametrize("name", ["small%20image.png", "in.png", "../open/in.png"])
def test_files_inside_of_it_are_read(server, media, name):
    """The positive control."""
    body = image(f"file://{media}/open/{name}")
    body["messages"][0]["content"].append({"type": "text", "text": "Why?"})
    assert server.post(body, "/v1/route").status_code == 200, server.post(body, "/v1/route").text


def test_whether_a_file_is_there_is_not_told_outside_of_the_media_folder(server, media):
    told = [
        refused(server.post(with_text(image(f"file://{media}/{name}")), "/v1/route"), 400)["message"]
        for name in ("secret.png", "nowhere")
    ]
    assert told[0].replace("secret.png", "nowhere") == told[1]


def with_text(body: dict) -> dict:
    content = body["messages"][0]["content"]
    return {"messages": [{"role": "user", "content": [*content, {"type": "text", "text": "Why?"}]}]}


def test_addresses_are_not_fetched_unless_they_are_allowed(server, own):
    for url in ("http://127.0.0.1/x.png", "https://example.org/x.png"):
        assert "not fetched" in refused(server.post(with_text(image(url)), "/v1/route"), 400)["message"]
    with serving(own, url_hosts=()) as fetching:
        inside = with_text(image(f"{server.url.replace('127.0.0.1', 'localhost')}/health"))
        assert refused(fetching.post(inside, "/v1/route"), 400)["param"] == "messages[0].content[0].image_url.url"
        assert (
            "public" in refused(fetching.post(with_text(image("http://localhost/x.png")), "/v1/route"), 400)["message"]
        )
        nowhere = with_text(image("http://nowhere.invalid/x.png"))
        assert refused(fetching.post(nowhere, "/v1/route"), 422)["code"] == "failed_to_download_image"


def test_a_compressed_body_is_no_json(server):
    body = gzip.compress(json.dumps(chat("Why?")).encode())
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    refused(server.post(body, headers=headers), 400)


def test_paths_and_methods_that_are_not_served_say_so(server):
    assert "/openapi.json" in refused(server.http.get("/v1/nothing"), 404)["message"]
    refused(server.http.get("/v1/chat/completions"), 405)
    refused(server.http.post("/health", json={}), 405)
    refused(server.http.put("/v1/responses", json={}), 405)


VALUES = [0, -1, 1.5, 1e400, 2**80, True, "", "x", [], [1], {}, {"a": 1}, "\ud800", [[]], None]
WRONG = {
    "messages": VALUES,
    "model": [0, "x", [], {}, True],
    "granularity": [0, -1, 1.5, 3, "x", True, [], {}],
    "max_visual_tokens": [0, -1, 1.5, "x", True, [], 2**80, 1],
    "token_cost": [-1, "x", True, [], {}, 1e400],
    "max_tokens": [0, -1, 1.5, "x", True, [], 2**80],
    "max_completion_tokens": [0, -1, "x", {}],
    "temperature": [-1, "x", True, [], 1e400, 101],
    "top_p": [-1, 2, "x", []],
    "top_k": [-1, 1.5, "x", 10**6],
    "min_p": [-1, 2, "x"],
    "repetition_penalty": [0, -1, "x"],
    "presence_penalty": [-3, 3, "x"],
    "frequency_penalty": [-3, 3, "x", {}],
    "seed": ["x", 1.5, True, 2**80, -(2**80), []],
    "stop": [0, "", [""], [0], ["a"] * 17, {}, "a" * 2000],
    "logit_bias": [[], {"x": 1}, {"-1": 1}, {"1": 101}, {"1": "x"}, {"99999": 1}, {"9" * 30: 1}, "x"],
    "logprobs": ["x", 1, []],
    "top_logprobs": [1, -1, 21, "x"],
    "stream": ["x", 1, []],
    "stream_options": ["x", [], {"include_usage": "x"}],
    "n": [0, 2, "x", 1.5, True],
    "tool_choice": ["required", {"type": "function"}, 1],
    "function_call": [{"name": "f"}],
    "modalities": [["audio"], ["text", "audio"], "text"],
    "audio": [{"voice": "a"}],
    "response_format": [{"type": "json_object"}, {"type": "json_schema"}, "x", {}],
}
MESSAGES = [
    {},
    {"role": "user"},
    {"content": "Why?"},
    {"role": "tool", "content": "1"},
    {"role": "x", "content": "1"},
    {"role": 1, "content": "1"},
    {"role": "user", "content": None},
    {"role": "user", "content": ""},
    {"role": "user", "content": " \n"},
    {"role": "user", "content": []},
    {"role": "user", "content": ["x"]},
    {"role": "user", "content": [{}]},
    {"role": "user", "content": [{"type": "text"}]},
    {"role": "user", "content": [{"type": "text", "text": 1}]},
    {"role": "user", "content": [{"type": "text", "text": ""}]},
    {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]},
    {"role": "user", "content": [{"type": "file", "file": {}}]},
    {"role": "user", "content": [{"type": "image_url"}]},
    {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": 1}}]},
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_uri(WIDE)}}]},
    {"role": "assistant", "content": None, "tool_calls": []},
    {"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": data_uri(WIDE)}}]},
    {"role": "system", "content": "Only this."},
]
SOURCES = [
    "x",
    "data:",
    "data:,",
    "data:image/png;base64",
    "data:image/png;base64,",
    "data:image/png;base64,!!!",
    "data:image/png;base64,AAAA",
    "data:image/png," + "%",
    data_uri(WIDE)[:-40],
    data_uri(WIDE)[:80],
    data_uri(b"GIF89a" + bytes(20)),
    data_uri(b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    data_uri(bytes(1 << 19)),
    data_uri(picture(150, 100)),
    "ftp://example.org/x.png",
    "javascript:1",
    "HTTP://127.0.0.1/x.png",
]
BODIES = [b"", b"{", b"[]", b"1", b"null", b'"x"', b"\xff\xfe", b"{}", b'{"a":1,"a":2}', b"[" * 100_000, b'{"a":NaN}']
BODIES += [
    json.dumps(chat("Why?", WIDE)).replace('"max_tokens": 8', more).encode()
    for more in ('"token_cost": 1e400', '"seed": 1e400', f'"token_cost": {"9" * 290}e30')
]


def bad_bodies() -> list[bytes]:
    """More than two hundred requests that cannot be answered."""
    good = chat("Why?", WIDE)
    fields = [good | {name: value} for name, values in WRONG.items() for value in values]
    messages = [{"messages": [message]} for message in MESSAGES]
    later = [{"messages": [question("Why?"), message]} for message in MESSAGES]
    images = [with_text(image(source)) for source in SOURCES]
    details = [with_text(image(data_uri(WIDE), detail=detail)) for detail in ("x", 1, "LOW")]
    many = [{"messages": [question("Why?", *[SMALL] * 4)]}, chat("Why? " * 5000)]
    both = [good | {"granularity": 4, "max_visual_tokens": 9}, good | {"granularity": 4, "token_cost": 1}]
    made = [*fields, *messages, *later, *images, *details, *many, *both]
    return [json.dumps(body).encode() for body in made] + BODIES


def test_two_hundred_bad_requests_are_all_refused_and_the_next_good_one_is_served(server):
    bodies = bad_bodies()
    assert len(bodies) > 200
    headers = {"Content-Type": "application/json"}
    good = server.post(chat("Why?", WIDE)).json()["choices"]
    for body in bodies:
        response = server.post(body, headers=headers)
        assert 400 <= response.status_code < 500, (body[:200], response.text)
        refused(response, response.status_code)
    assert server.post(chat("Why?", WIDE)).json()["choices"] == good
    until(lambda: server.idle)


@pytest.mark.parametrize("path", PATHS)
def test_null_is_absent_and_unknown_keys_are_left_alone(server, path):
    body = chat("Why?", WIDE, stop=None, n=None, tools=None, seed=None, user="me", metadata={"a": 1}, store=True)
    body |= {"input": body["messages"], "prediction": {"type": "content"}, "unheard_of": [1], "tools": [{"type": "x"}]}
    assert server.post(body, path).status_code == 200


def test_clients_that_hang_up_leave_nothing_running(server):
    """While an answer is streamed, while one is not, and while the body comes."""
    body = chat("Tell me a long story.", WIDE, max_tokens=300)
    with server.http.stream("POST", PATHS[0], json=body | {"stream": True}) as response:
        next(response.iter_lines())
    until(lambda: server.idle)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}{PATHS[0]}", json=body, timeout=httpx.Timeout(60, read=0.05))
    until(lambda: server.idle)
    before = server.engine.snapshot().totals.outcomes.get("cancelled", 0)
    assert before >= 1
    with begun(server, 1000) as client:
        client.sendall(b"{")
        until(lambda: server.service.intake.bytes == 1)
    until(lambda: server.idle)


def test_what_is_written_is_sent_at_once():
    """asyncio turns Nagle's algorithm off for sockets that say they are TCP's; else each answer waits 40 ms."""
    with bind("127.0.0.1", 0) as taken:
        assert taken.proto == socket.IPPROTO_TCP


def test_work_that_stands_is_told_by_health(server, monkeypatch):
    status = server.engine.snapshot()
    assert server.http.get("/health").json() == {"status": "ok"}
    for change, told in (
        ({"standing": 1e4}, "standing"),
        ({"alive": False}, "dead"),
        ({"stopping": True}, "stopping"),
    ):
        monkeypatch.setattr(server.engine, "snapshot", lambda change=change: replace(status, **change))
        response = server.http.get("/health")
        assert (response.status_code, response.json()["status"]) == (503, told)


def test_metrics_count_what_was_done(own):
    with serving(own) as server:
        server.post(chat("Why?", WIDE, granularity=4))
        server.http.get("/v1/nothing/" + "x" * 50)
        lines = server.http.get("/metrics").text.splitlines()
        samples = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        assert samples['avg_mlx_images_total{granularity="4"}'] == "1"
        assert samples['avg_mlx_http_responses_total{path="other",status="404"}'] == "1"
        assert samples['avg_mlx_requests_total{outcome="done"}'] == "1"
        assert samples['avg_mlx_tokens_total{kind="generated"}'] == "8"
        assert float(samples['avg_mlx_stage_seconds_total{stage="vision"}']) > 0
        kinds = {line.split()[2] for line in lines if line.startswith("# TYPE")}
        assert {name.partition("{")[0] for name in samples} <= kinds


def test_the_log_tells_no_contents(own, caplog):
    caplog.set_level("INFO", "avg_mlx.access")
    with serving(own, key="sesame") as server:
        server.post(chat("A secret question", WIDE), headers={"Authorization": "Bearer sesame"})
        server.post(chat("A secret question"), "/v1/route?secret=1", headers={"Authorization": "Bearer wrong"})
        until(lambda: len(caplog.records) == 2)
    first, second = (json.loads(record.getMessage()) for record in caplog.records)
    assert (first["status"], first["completion_tokens"], len(first["granularities"])) == (200, 8, 1)
    assert (second["status"], second["path"]) == (401, "/v1/route")
    assert "secret" not in caplog.text
    assert "sesame" not in caplog.text
