"""Everyone can use the page: by keyboard, with a screen reader, on a phone, in the dark, over a slow line."""

import io
import os
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image
from playwright.sync_api import expect

from .test_asking import CHAT, QUESTION

pytestmark = pytest.mark.browser
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
DARK = {"color_scheme": "dark"}
MODULES = ROOT / "build" / "page" / "node_modules"
LIMIT = 100_000  # bytes


def empty(page) -> None:
    pass


def answered(page) -> None:
    page.give()
    page.ask(QUESTION)


def evidence(page) -> None:
    answered(page)
    page.page.locator("#layers label", has_text="Evidence").click()


def compared(page) -> None:
    page.give()
    page.page.check("#compare")
    page.ask(QUESTION, answers=2)


def broken(page) -> None:
    page.give(b"no picture", "broken.png")
    page.page.wait_for_selector("#picture-problem:not(:empty)")


STATES = (empty, answered, evidence, compared, broken)


@pytest.mark.parametrize("look", [{}, DARK, PHONE, PHONE | DARK], ids=["light", "dark", "phone", "dark phone"])
@pytest.mark.parametrize("state", STATES)
def test_a_checker_finds_nothing_that_keeps_people_out(visit, state, look):
    page = visit(**look)
    state(page)
    page.page.evaluate((MODULES / "axe-core" / "axe.min.js").read_text(encoding="utf-8"))
    found = page.page.evaluate("() => axe.run()")
    assert [(fault["id"], [node["html"] for node in fault["nodes"]]) for fault in found["violations"]] == []
    assert len(found["passes"]) > 10


def test_all_can_be_done_with_the_keyboard_alone(visit):
    page = visit()
    press = page.page.keyboard.press

    def reach(selector: str) -> None:
        """Go to an element with the tab key, and see where one is."""
        for _ in range(40):
            press("Tab")
            if page.page.evaluate("s => document.activeElement.matches(s)", selector):
                break
        expect(page.page.locator(f"{selector}:focus")).to_have_count(1)
        assert page.page.evaluate(OUTLINE) != "none"

    reach("#example")
    press("Enter")
    expect(page.page.locator("#question")).to_be_focused()
    page.page.keyboard.type(QUESTION)
    press("Enter")
    page.page.wait_for_selector(".answer.done")
    page.page.wait_for_selector("#layers:not([hidden])")
    expect(page.page.locator("#question")).to_be_focused()
    reach("#left input")
    press("ArrowRight")
    reach("#compare")
    press("Space")
    reach("#layers input")
    press("ArrowRight")
    reach("#over")
    press("ArrowDown")
    reach(".details")
    press("Enter")
    expect(page.page.locator(".details")).to_be_focused()
    reach("#question")
    page.page.keyboard.type("once")
    press("Shift+Enter")
    page.page.keyboard.type("more")
    assert page.page.input_value("#question") == "once\nmore"
    press("Enter")
    page.page.wait_for_selector(".two .answer.done + .answer.done")
    assert page.bodies(CHAT)[-2]["messages"][-1]["content"][0]["text"] == "once\nmore"


OUTLINE = """() => {
    const { activeElement: element } = document;
    const styles = [element, element.nextElementSibling].map((each) => each && getComputedStyle(each).outlineStyle);
    return styles.find((style) => style && style !== "none") ?? "none";
}"""


def test_what_stops_an_answer_and_asks_the_next_question_stays_in_sight(visit):
    page = visit()
    page.give()
    for _ in range(6):
        page.ask(QUESTION)
    assert page.page.locator("#ask").bounding_box()["y"] < 860
    assert page.page.evaluate("() => scrollY") == 0
    box = page.page.locator(".answer").last.bounding_box()
    assert box["y"] + box["height"] <= page.page.locator("#composer").bounding_box()["y"] + 1


def test_a_screen_reader_is_told_the_answer(visit):
    page = visit()
    answered(page)
    assert page.page.get_attribute("#announcer", "aria-live") == "polite"
    spoken = page.page.locator("#announcer").text_content()
    assert spoken.replace(" ", "") == page.text(".answer .text").replace(" ", "")
    assert page.page.locator("#transcript").get_attribute("aria-busy") == "false"


@pytest.mark.parametrize("state", STATES)
def test_a_phone_needs_no_scrolling_sideways_and_what_one_touches_is_large_enough(visit, state):
    page = visit(**PHONE)
    state(page)
    assert page.page.evaluate("() => document.documentElement.scrollWidth") <= 360
    for button in page.page.locator("button:visible").all():
        assert button.bounding_box()["height"] >= 24


def test_the_page_is_dark_where_people_want_it_dark_and_light_elsewhere(visit):
    for look, dark in (({}, False), (DARK, True)):
        page = visit(**look)
        shot = Image.open(io.BytesIO(page.page.screenshot())).convert("L")
        corner = shot.getpixel((shot.width - 2, shot.height - 2))
        assert (corner < 60) if dark else (corner > 220)


def test_nothing_moves_for_those_who_want_it_still(visit):
    page = visit(reduced_motion="reduce")
    answered(page)
    assert page.page.evaluate("() => document.getAnimations().length") == 0


def test_all_of_it_is_smaller_than_a_photo(browser, url):
    page = browser.new_page()
    sizes: list[int] = []

    def add(request) -> None:
        size = request.sizes()
        sizes.append(size["responseBodySize"] + size["responseHeadersSize"])

    page.on("requestfinished", add)
    page.goto(url)
    page.wait_for_selector("#model:not(:empty)")
    page.wait_for_load_state("networkidle")
    assert len(sizes) > 10
    assert sum(sizes) < LIMIT
    page.close()


def test_the_scripts_types_are_right():
    flags = "--allowJs --checkJs --noEmit --strict --target es2023 --module es2022 --lib es2023,dom,dom.iterable"
    files = sorted(str(file) for file in (ROOT / "avg_mlx" / "serving" / "page").glob("*.js"))
    command = [str(MODULES / ".bin" / "tsc"), *flags.split(), *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=MODULES.parent)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.skipif(
    not os.environ.get("SCREENSHOTS"), reason="draws docs/page-*.png, when SCREENSHOTS names the folder"
)
@pytest.mark.parametrize(("name", "look"), [("light", {}), ("dark", DARK), ("phone", PHONE)])
def test_screenshots(visit, name, look):
    page = visit(**{"viewport": {"width": 1280, "height": 800}} | look)
    {"light": answered, "dark": evidence, "phone": answered}[name](page)
    page.page.mouse.move(0, 0)
    page.page.evaluate("() => document.activeElement.blur()")
    file = Path(os.environ["SCREENSHOTS"]) / f"page-{name}.png"
    page.page.evaluate("() => scrollTo(0, 0)")
    shot = Image.open(io.BytesIO(page.page.screenshot())).convert("RGB")
    shot.quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)
    assert file.stat().st_size < LIMIT
