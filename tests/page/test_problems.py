"""Problems are told where they belong, nothing is lost, and one can try again."""

import random
import subprocess
import sys
import time

import httpx
import pytest
from playwright.sync_api import expect
from serving import serving

from avg_mlx import load
from avg_mlx.serving.engine.work import Work
from avg_mlx.serving.jobs import Piece

from .conftest import running
from .test_asking import CHAT, QUESTION

pytestmark = pytest.mark.browser


def test_a_broken_picture_is_told_beside_the_picture_and_the_question_stays(visit):
    page = visit()
    page.page.fill("#question", QUESTION)
    page.give(b"no picture", "broken.png")
    page.page.wait_for_selector("#picture-problem:not(:empty)")
    assert "broken.png" in page.text("#picture-problem")
    assert page.page.is_visible("#empty")
    assert page.page.input_value("#question") == QUESTION
    page.give()
    page.ask(QUESTION)
    assert page.page.locator(".problem:visible").count() == 0


def test_a_file_that_is_no_picture_is_not_sent(visit):
    page = visit()
    page.page.set_input_files("#file", files=[{"name": "a.txt", "mimeType": "text/plain", "buffer": b"words"}])
    page.page.wait_for_selector("#picture-problem:not(:empty)")
    assert "a.txt" in page.text("#picture-problem")
    assert page.asked == []


@pytest.mark.parametrize("megabytes", [22, 30])
def test_a_picture_that_is_too_large_is_told_beside_the_picture(visit, megabytes):
    page = visit()
    page.give(random.Random(0).randbytes(megabytes << 20), "huge.png")
    page.page.wait_for_selector("#picture-problem:not(:empty)")
    assert "MB" in page.text("#picture-problem")
    assert page.page.is_visible("#empty")


def test_what_is_missing_is_told_beside_it(visit):
    page = visit()
    page.page.click("#ask")
    assert "Choose a picture" in page.text("#picture-problem")
    page.give()
    page.page.click("#ask")
    assert "Write a question" in page.text("#question-problem")
    expect(page.page.locator("#question")).to_be_focused()
    assert page.bodies(CHAT) == []


def test_a_question_that_is_too_long_is_told_beside_the_question(visit):
    page = visit()
    page.give()
    long = "what is written? " * 3000
    page.page.fill("#question", long)
    page.page.click("#ask")
    page.page.wait_for_selector("#question-problem:not(:empty)")
    assert page.page.input_value("#question") == long.strip()
    page.ask(QUESTION)


def test_a_server_that_has_stopped_is_told_and_the_question_can_be_asked_again(visit):
    with running() as (url, process):
        page = visit(url)
        page.give()
        page.page.wait_for_selector("#budget:enabled")
        process.kill()
        process.wait()
        page.page.fill("#question", QUESTION)
        page.page.click("#ask")
        page.page.wait_for_selector("#problem:not(:empty)")
        assert "does not answer" in page.text("#problem")
        assert page.page.input_value("#question") == QUESTION
        assert page.page.is_visible("#picture")
        command = [sys.executable, "-m", "avg_mlx", "serve", "--model", "demo", "--port", url.rpartition(":")[2]]
        again = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            next(line for line in again.stderr if "http://" in line)
            page.ask(QUESTION)
            assert page.page.locator(".problem:visible").count() == 0
        finally:
            again.kill()
            again.wait()


def test_the_key_is_asked_for_once_and_kept_in_the_tab_only(visit):
    with running("--api-key", "open sesame") as (url, _):
        assert httpx.get(f"{url}/").status_code == 200
        page = visit(url, keyed=True)
        page.page.fill("#key", "wrong")
        page.page.keyboard.press("Enter")
        page.page.wait_for_selector("#key-problem:not(:empty)")
        page.page.fill("#key", "open sesame")
        page.page.keyboard.press("Enter")
        page.page.wait_for_selector("#model:not(:empty)")
        page.give()
        page.ask(QUESTION)
        page.page.reload()
        page.page.wait_for_selector("#model:not(:empty)")
        kept = page.page.evaluate("() => [JSON.stringify(localStorage), document.cookie, location.href]")
        assert "sesame" not in "".join(kept)
        other = page.context.new_page()
        other.goto(url)
        other.wait_for_selector("#key-dialog[open]")
        other.click("#key-cancel")
        other.wait_for_selector("#problem:not(:empty)")
        assert "key" in other.inner_text("#problem")


@pytest.fixture
def endless(monkeypatch):
    """A server whose answers take their time, and do not end by themselves."""
    model, tokenizer = load("demo")
    tokenizer.eos_token_ids = set()
    tell = Work.tell

    def slowly(work, event):
        if isinstance(event, Piece):
            time.sleep(0.1)
        tell(work, event)

    monkeypatch.setattr(Work, "tell", slowly)
    with serving((model, tokenizer), name="endless") as server:
        yield server


def begin(page, n: int = -1) -> None:
    """Ask, and wait for the first words of the n-th answer."""
    page.page.fill("#question", QUESTION)
    page.page.click("#ask")
    expect(page.page.locator(".answer .text").nth(n)).not_to_be_empty()


def test_an_answer_comes_bit_by_bit_while_the_page_stays_responsive(visit, endless):
    page = visit(endless)
    page.give()
    begin(page)
    lengths, frames = page.page.evaluate(WATCH)
    assert len(set(lengths)) >= 3
    assert lengths == sorted(lengths)
    assert frames >= 2 * len(set(lengths))  # the page was drawn between pieces, and not only for them


WATCH = """() => new Promise((resolve) => {
    const text = document.querySelector(".answer .text");
    const lengths = [];
    let frames = 0;
    const look = () => {
        frames += 1;
        lengths.push(text.textContent.length);
        if (new Set(lengths).size < 5) requestAnimationFrame(look);
        else resolve([lengths, frames]);
    };
    look();
})"""


def left_and_loaded_again(visit, server):
    """A page on which an answer was cut off."""
    page = visit(server)
    page.give()
    begin(page)
    page.page.reload()
    page.page.wait_for_selector(".answer.failed")
    return page


def test_a_page_that_is_left_while_it_answers_has_the_question_when_it_is_loaded_again(visit, endless):
    page = left_and_loaded_again(visit, endless)
    page.page.click(".again")
    expect(page.page.locator(".answer.running .text")).not_to_be_empty()
    first, again = page.bodies(CHAT)
    assert again == first
    page.page.keyboard.press("Escape")
    page.page.wait_for_selector(".answer.stopped")


def test_what_is_written_meanwhile_is_not_asked_again(visit, endless):
    page = left_and_loaded_again(visit, endless)
    page.page.fill("#question", "And the shape?")
    page.page.click(".again")
    expect(page.page.locator(".answer.running .text")).not_to_be_empty()
    first, again = page.bodies(CHAT)
    assert again == first
    assert page.page.input_value("#question") == "And the shape?"
    page.page.keyboard.press("Escape")
    page.page.wait_for_selector(".answer.stopped")


def test_a_new_conversation_forgets_the_answer_that_is_coming(visit, endless):
    page = visit(endless)
    page.give()
    begin(page)
    page.page.click("#anew")
    page.page.wait_for_selector("#ask:visible")
    while not endless.idle:
        page.page.wait_for_timeout(50)
    assert page.page.locator(".answer").count() == page.page.locator(".problem:visible").count() == 0
    assert page.page.input_value("#question") == ""
    assert not page.page.is_visible("#picture")


@pytest.mark.parametrize("typed", ["a\N{HORIZONTAL ELLIPSIS}b", " "])
def test_what_cannot_be_a_key_is_told_at_once(visit, typed):
    with running("--api-key", "sesame") as (url, _):
        page = visit(url, keyed=True)
        page.page.fill("#key", typed)
        page.page.keyboard.press("Enter")
        page.page.wait_for_selector("#key-problem:not(:empty)")
        page.page.click("#key-cancel")
        page.page.wait_for_selector("#problem:not(:empty)")
        assert not page.page.is_visible("#key-dialog")


def test_stopping_keeps_what_has_come_and_frees_the_server(visit, endless):
    page = visit(endless)
    page.give()
    begin(page)
    page.page.click("#stop")
    page.page.wait_for_selector(".answer.stopped")
    expect(page.page.locator("#question")).to_be_focused()
    said = page.text(".answer .text")
    assert said
    begin(page)
    assert page.bodies(CHAT)[-1]["messages"][1] == {"role": "assistant", "content": said.strip()}
    page.page.keyboard.press("Escape")
    page.page.wait_for_selector("#ask:visible")
    while not endless.idle:
        page.page.wait_for_timeout(50)


def test_a_comparison_that_is_stopped_keeps_the_answer_that_had_begun(visit, endless):
    page = visit(endless)
    page.give()
    page.page.check("#compare")
    begin(page, n=0)
    page.page.click("#stop")
    page.page.wait_for_selector("#ask:visible")
    expect(page.page.locator(".answer")).to_have_count(1)
    assert page.page.is_visible("#numbers")
    assert len(page.bodies(CHAT)) == 1


def test_an_answer_that_breaks_off_says_so_and_can_be_asked_for_again(visit, endless):
    page = visit(endless)
    page.give()
    begin(page)
    endless.engine.stop(0)
    page.page.wait_for_selector(".answer.failed")
    assert page.text(".answer .text")
    assert page.text(".answer .problem")
    page.page.click(".again")
    page.page.wait_for_selector("#problem:not(:empty)")
    assert page.page.input_value("#question") == QUESTION
    assert page.page.locator(".answer").count() == 0
    assert page.page.is_visible("#picture")
