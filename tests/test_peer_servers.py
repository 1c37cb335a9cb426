"""The comparison of the server with mlx-vlm's: its clients, its tables, and what both servers are given."""

import asyncio
import base64
import io
import json
import math
import sys
from dataclasses import asdict

import clients
import folders
import httpx
import pytest
import servers
from PIL import Image
from transformers import AutoTokenizer

ROLE = {"choices": [{"delta": {"role": "assistant", "content": ""}}], "avg": {"images": [{"granularity": 36}]}}
TEXT = {"choices": [{"delta": {"content": "red"}}]}
USAGE = {"choices": [], "usage": {"completion_tokens": 16}}


def ask(*answers: httpx.Response) -> clients.Figures:
    """What a client sees that gets these answers, one after the other."""
    figures, left = clients.Figures(), iter(answers)

    async def ask_each() -> None:
        transport = httpx.MockTransport(lambda request: next(left))
        async with httpx.AsyncClient(base_url="http://server", transport=transport) as http:
            for _ in answers:
                await clients.ask(http, {}, figures)

    asyncio.run(ask_each())
    return figures


def stream(*chunks: dict, done: bool = True) -> httpx.Response:
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks] + ["data: [DONE]\n\n"] * done
    return httpx.Response(200, text="".join(lines))


def test_an_answer_gives_its_time_tokens_and_granularity():
    figures = ask(stream(ROLE, TEXT, USAGE))
    assert (len(figures.firsts), figures.tokens, figures.granularities, figures.failed) == (1, [16], [36], 0)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (httpx.Response(503, text="full"), "503: full"),
        (stream(ROLE, TEXT, USAGE, done=False), "broke off"),
        (stream(ROLE, {"error": {"message": "no memory"}}), "no memory"),
        (stream(ROLE), "no text"),
    ],
)
def test_a_failed_request_is_counted_and_not_timed(answer, reason):
    figures = ask(answer, stream(ROLE, TEXT, USAGE))
    assert (len(figures.firsts), figures.failed) == (1, 1)
    assert reason in figures.reason


def test_each_request_has_an_image_of_its_own(tmp_path):
    Image.new("RGB", (3, 2), (250, 0, 9)).save(tmp_path / "image.jpg")
    (tmp_path / "question.txt").write_text("what?")

    def pixels(n: int) -> list[tuple[int, ...]]:
        image, _ = clients.body(tmp_path, "ours", n, "low")["messages"][0]["content"]
        file = io.BytesIO(base64.b64decode(image["image_url"]["url"].partition(",")[2]))
        return list(Image.open(file).getdata())

    plain = list(Image.open(tmp_path / "image.jpg").getdata())
    for n in range(6):
        assert [k for k, (a, b) in enumerate(zip(pixels(n), plain, strict=True)) if a != b] == [n]


def result(seconds: float, failed: int = 0, tokens: int = 16) -> dict:
    """Of two answers, one after the other."""
    figures = clients.Figures(2 * seconds, [seconds, seconds], [tokens] * 2, [], failed, "gone" if failed else "")
    return asdict(figures)


def test_tables_set_each_row_beside_mlx_vlms():
    results = {row: {1: [result(0.5)], 8: [result(0.25)]} for row in servers.DETAILS}
    results[servers.THEIRS] = {1: [result(2)], 8: [result(1, failed=3, tokens=9)]}
    results["avg-mlx, adaptive"][1][0]["granularities"] = [36, 576, 36]
    memory = dict.fromkeys(servers.DETAILS, 0.5) | {servers.THEIRS: 1.0}
    table = servers.table(results, memory).splitlines()
    assert table[-1] == "| mlx-vlm, llava_next | 8 | 1 (1–1) | 1 | 1 | 3 | 1.00 |"
    assert len(table) == 2 + 2 * len(servers.DETAILS)
    ratios = servers.ratios(results, memory).splitlines()
    assert ratios[2] == "| avg-mlx, coarsest | 1 | ×4.00 | ×4.00 |  |"
    assert ratios[3] == "| avg-mlx, coarsest | 8 | ×4.00 | ×4.00 | ×2.00 |"
    said = " ".join(servers.remarks(results))
    assert all(part in said for part in ("36 in 2, 576 in 1", "9 to 16 tokens", "failure was: gone"))


def test_a_row_without_any_answer_has_no_times():
    nothing = asdict(clients.Figures(elapsed=1.0, failed=2, reason="gone"))
    assert math.isnan(servers.first_tokens([nothing], 50))
    assert servers.ratio(1.0, servers.per_second([nothing])[0]) == "–"


def test_a_server_that_does_not_come_up_is_named_with_the_end_of_its_log(tmp_path):
    server = servers.Server(sys.executable, "avg-mlx, finest", tmp_path)  # the folder holds no model
    try:
        with pytest.raises(SystemExit, match=r"(?s)avg-mlx, finest did not come up.*avg-mlx serve: .*ours"):
            server.wait()
    finally:
        server.stop()


def test_a_question_in_parts_is_the_same_prompt_as_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["folders.py", "tiny", "float32", str(tmp_path)])
    folders.main()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "theirs")

    def prompt(content: object) -> str:
        return tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)

    assert "USER: <image> w1 w2" in prompt("<image> w1 w2")
    assert prompt([{"type": "text", "text": "w1 w2"}, {"type": "image"}]) == prompt("<image> w1 w2")
