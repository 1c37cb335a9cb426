"""The server's page without a browser: its files, their headers, who gets them, and that they fit together."""

import re

import httpx
import pytest
from conftest import ROOT
from serving import WIDE, question, serving

PAGE = ROOT / "avg_mlx" / "serving" / "page"
SCRIPTS = sorted(PAGE.glob("*.js"))
HTML = (PAGE / "index.html").read_text(encoding="utf-8")
KEY = {"Authorization": "Bearer open sesame"}


@pytest.fixture(scope="module")
def server(tiny):
    with serving(tiny, key="open sesame") as server:
        server.http.headers.update(KEY)
        yield server


def names() -> list[str]:
    return ["", *(f"page/{file.name}" for file in PAGE.iterdir()), "page/example.png"]


def test_the_page_needs_no_key_and_gives_no_more_than_itself(server):
    for name in names():
        assert httpx.get(f"{server.url}/{name}").status_code == 200
    for path in ("/v1/models", "/metrics", "/openapi.json", "/pages", "/page"):
        assert httpx.get(f"{server.url}{path}").status_code == 401
    for path in ("/page/../page.py", "/page/..%2f..%2fconfig.py", "/page/none.js", "/page/"):
        assert httpx.get(f"{server.url}{path}").status_code in (401, 404)


def test_files_are_what_they_say_and_bring_nothing_from_elsewhere(server):
    kinds = {"": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml", "png": "image/png"}
    kinds["html"] = kinds[""]
    for name in names():
        answer = httpx.get(f"{server.url}/{name}")
        assert answer.headers["content-type"].partition(";")[0] == kinds[name.rpartition(".")[2]]
        assert answer.headers["x-content-type-options"] == "nosniff"
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
        assert policy.pop("img-src") == "'self' blob: data:"
        assert set(policy.values()) == {"'none'", "'self'"}
        closed = ("default-src", "form-action", "frame-ancestors", "base-uri")
        assert [policy[key] for key in closed] == ["'none'"] * 4


def test_what_a_browser_keeps_is_asked_for_and_not_sent_again(server):
    for name in names():
        first = httpx.get(f"{server.url}/{name}")
        tag = first.headers["etag"]
        again = httpx.get(f"{server.url}/{name}", headers={"If-None-Match": tag})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
        assert httpx.get(f"{server.url}/{name}", headers={"If-None-Match": '"other"'}).content == first.content
        assert first.headers["cache-control"] == "no-cache"


def test_other_hosts_names_do_not_get_the_page(server):
    assert httpx.get(server.url, headers={"Host": "evil.example"}).status_code == 400


def test_metrics_count_the_pages_files_under_one_name(server):
    for name in ("page/page.js", "page/page.css", "page/none"):
        httpx.get(f"{server.url}/{name}")
    text = server.http.get("/metrics").text
    assert 'path="/page/{name}",status="200"' in text
    assert "page.js" not in text


def test_every_id_that_the_scripts_ask_for_is_in_the_page():
    ids = set(re.findall(r'\bid="([\w-]+)"', HTML))
    asked = {name for file in SCRIPTS for name in re.findall(r'\$\("([\w-]+)"\)', file.read_text(encoding="utf-8"))}
    assert len(asked) > 30
    assert asked - ids == set()


def test_what_the_page_refers_to_is_in_the_page():
    ids = re.findall(r'\bid="([\w-]+)"', HTML)
    assert len(ids) == len(set(ids))
    referred = re.findall(r'\b(?:for|aria-describedby|aria-labelledby)="([\w-]+)"', HTML)
    assert set(referred) <= set(ids)
    files = re.findall(r'\b(?:href|src)="([^"]+)"', HTML)
    assert {file.removeprefix("page/") for file in files} <= {file.name for file in PAGE.iterdir()}
    for file in SCRIPTS:
        for name in re.findall(r'from "\./([\w.]+)"', file.read_text(encoding="utf-8")):
            assert (PAGE / name).exists()
            assert f"page/{name}" in files  # so that the browser asks for all of them at once


def test_the_page_asks_nobody_else_and_its_files_stay_small():
    for file in PAGE.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//\w+\.\w", text)
        assert not re.search(r"\bstyle=|\bon\w+=\"|<script>|<style|innerHTML|\beval\(", text)
        assert file.suffix != ".js" or len(text.splitlines()) <= 200


def test_a_route_can_be_explained(server):
    body = {"messages": [question("What is this?", WIDE)]}
    plain, explained = (server.post(body | more, "/v1/route").json() for more in ({}, {"explain": True}))
    (image,), (before,) = explained["images"], plain["images"]
    explanation = image.pop("explanation")
    assert image == before
    assert explanation["geometry"] == image["geometry"]
    assert {each["over"] for each in explanation["evidence"]} | {image["granularity"]} == {1, 2, 4, 8, 16}
    counts = image["visual_tokens_at"]
    assert counts[str(image["granularity"])] == image["visual_tokens"]
    assert max(counts.values()) == image["visual_tokens_finest"]


def test_where_the_router_was_not_asked_there_is_nothing_to_explain_but_where_tokens_lie(server):
    body = {"messages": [question("What is this?", WIDE)], "granularity": 4, "explain": True}
    (image,) = server.post(body, "/v1/route").json()["images"]
    assert (image["explanation"]["votes"], image["explanation"]["evidence"]) == (None, [])
    assert image["explanation"]["geometry"]["granularity"] == 4


def test_explain_is_true_or_false(server):
    refused = server.post({"messages": [question("What?", WIDE)], "explain": "yes"}, "/v1/route")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "explain")
