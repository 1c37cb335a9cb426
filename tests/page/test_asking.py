"""Asking on the page gives what the server gives to anyone."""

import pytest
from playwright.sync_api import expect

from .conftest import SIGN

pytestmark = pytest.mark.browser
CHAT, ROUTE = "/v1/chat/completions", "/v1/route"
QUESTION = "What is written?"


def answer_of(visit, n: int = -1) -> dict:
    """What the server answers to a question that the page has asked."""
    return visit.api(CHAT, visit.bodies(CHAT)[n])


def test_a_picture_and_a_question_get_the_servers_answer(visit):
    page = visit()
    page.give()
    page.ask(QUESTION)
    right = answer_of(page)
    assert page.text(".answer .text") == right["choices"][0]["message"]["content"].strip()
    assert f"{right['avg']['visual_tokens']} of {right['avg']['visual_tokens_finest']}" in page.text(".details")
    assert page.page.input_value("#question") == ""


def test_the_example_and_pasted_and_dropped_pictures_are_taken(visit):
    for give in ("example", "paste", "drop"):
        page = visit()
        if give == "example":
            page.page.click("#example")
        else:
            page.page.evaluate(GIVING, [give, list(SIGN.read_bytes())])
        page.ask(QUESTION)
        image = page.bodies(CHAT)[0]["messages"][0]["content"][0]["image_url"]["url"]
        assert image.startswith("data:image/png;base64,")
        assert page.text(".answer .text") == answer_of(page)["choices"][0]["message"]["content"].strip()


GIVING = """([kind, bytes]) => {
    const files = new DataTransfer();
    files.items.add(new File([new Uint8Array(bytes)], "picture.png", { type: "image/png" }));
    const more = kind === "paste" ? { clipboardData: files } : { dataTransfer: files };
    const Kind = kind === "paste" ? ClipboardEvent : DragEvent;
    document.body.dispatchEvent(new Kind(kind, { bubbles: true, cancelable: true, ...more }));
}"""


def test_a_photo_can_be_taken_where_there_is_a_touch_screen(visit):
    assert not visit().page.is_visible("#photograph")
    phone = visit(has_touch=True, is_mobile=True).page
    with phone.expect_file_chooser() as chosen:
        phone.click("#photograph")
    assert chosen.value.element.get_attribute("capture") == "environment"
    chosen.value.set_files(SIGN)
    phone.wait_for_selector("#picture:visible")


def test_a_picture_is_seen_while_the_question_is_written_and_can_be_removed(visit):
    page = visit()
    page.give()
    page.page.wait_for_selector("#budget:enabled")
    assert len(page.bodies(ROUTE)) == 1
    page.page.click("#remove")
    assert page.page.is_visible("#empty")
    assert page.page.is_hidden("#figure")


def test_the_second_question_goes_with_all_that_was_said_and_shown(visit):
    page = visit()
    page.give()
    page.ask(QUESTION)
    page.ask("What shape is this?")
    first, second = (body["messages"] for body in page.bodies(CHAT))
    said = {"role": "assistant", "content": page.page.locator(".answer .text").nth(0).inner_text()}
    asked = {"role": "user", "content": [{"type": "text", "text": "What shape is this?"}]}
    assert second == [*first, said, asked]
    assert page.page.locator(".answer .text").nth(1).inner_text() == (
        answer_of(page)["choices"][0]["message"]["content"].strip()
    )


def test_two_pictures_of_a_conversation_can_each_be_shown(visit, request):
    page = visit()
    page.give()
    page.ask(QUESTION)
    page.give((request.config.rootpath / "tests" / "photos" / "chelsea.jpg").read_bytes(), "cat.jpg")
    page.ask("What shape is this?")
    images = page.api(ROUTE, page.bodies(ROUTE)[-1])["images"]
    for n in (1, 0):
        page.page.locator("#which label").nth(n).click()
        assert page.text("#numbers .total").startswith(f"{images[n]['visual_tokens']} of ")


def test_a_budget_is_kept_and_its_stops_are_what_the_picture_can_take(visit):
    page = visit()
    page.give()
    page.page.wait_for_selector("#budget:enabled")
    counts = sorted(page.api(ROUTE, page.bodies(ROUTE)[0])["images"][0]["visual_tokens_at"].values())
    page.page.focus("#budget")
    for count in reversed(counts[:-1]):
        page.page.keyboard.press("ArrowLeft")
        assert page.text("#budget-text") == f"{count} visual tokens"
        assert page.page.get_attribute("#budget", "aria-valuetext") == f"{count} visual tokens"
    page.ask(QUESTION)
    assert page.bodies(CHAT)[0]["max_visual_tokens"] == counts[0]
    assert page.text("#numbers .total").startswith(f"{counts[0]} of ")


def test_a_granularity_can_be_forced_and_then_the_budget_is_off(visit):
    page = visit()
    page.give()
    page.page.locator("#left label", has_text="50").click()
    expect(page.page.locator("#budget")).to_be_disabled()
    page.ask(QUESTION)
    assert page.bodies(CHAT)[0]["granularity"] == 50
    assert "Granularity 50, as you chose" in page.text("#numbers")
    page.page.locator("#layers label", has_text="Evidence").click()
    assert "no evidence" in page.text("#caption")


def test_two_granularities_stand_side_by_side_with_their_tokens_and_seconds(visit):
    page = visit()
    page.give()
    page.page.check("#compare")
    page.page.locator("#left label", has_text="4").first.click()
    page.page.locator("#right label", has_text="100").click()
    page.ask(QUESTION, answers=2)
    boxes = page.page.locator(".answers.two .answer")
    for n, granularity in enumerate((4, 100)):
        right = answer_of(page, n)
        words = boxes.nth(n).inner_text()
        assert page.bodies(CHAT)[n]["granularity"] == granularity
        assert right["choices"][0]["message"]["content"].strip() in words
        assert f"{right['avg']['visual_tokens']} of " in words
        assert " s after seeing" in words
    left, right = (boxes.nth(n).bounding_box() for n in (0, 1))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]
    boxes.nth(0).locator(".details").click()
    assert "Granularity 4," in page.text("#numbers")


def test_after_reloading_all_is_there_again(visit):
    page = visit()
    page.give()
    page.ask(QUESTION)
    said, numbers = page.text("#transcript"), page.text("#numbers .total")
    page.page.fill("#question", "not asked yet")
    page.page.locator("#left label", has_text="25").click()
    page.page.reload()
    page.page.wait_for_selector("#layers:not([hidden])")
    assert page.text("#transcript") == said
    assert page.text("#numbers .total") == numbers
    assert page.page.input_value("#question") == "not asked yet"
    assert page.page.is_checked("#left input[value='25']")
    page.page.click("#anew")
    page.page.reload()
    page.page.wait_for_selector("#empty:visible")
