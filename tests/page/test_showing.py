"""What lies over the picture lies where the server says, and the numbers are the server's."""

import io
import itertools
import json
import re

import pytest
from PIL import Image, ImageChops

from .test_asking import CHAT, QUESTION, ROUTE

pytestmark = pytest.mark.browser
GREY = 140
ODD = (230, 150)  # (width, height) of a picture of whose tokens some are cut away
BLUE = (28, 127, 208)  # of crops' borders


@pytest.fixture
def grey(visit):
    """A page that was asked about a grey picture, on which every line can be seen."""
    file = io.BytesIO()
    Image.new("RGB", ODD, (GREY, GREY, GREY)).save(file, "PNG")
    page = visit()
    page.give(file.getvalue())
    page.page.locator("#left label", has_text="25").click()
    page.ask(QUESTION)
    return page


def geometry_of(page) -> dict:
    """The geometry that the server tells of the page's last question."""
    return page.api(ROUTE, page.bodies(ROUTE)[-1])["images"][-1]["geometry"]


def drawn(page) -> Image.Image:
    """What is on the screen where the picture is, without rounded corners."""
    return Image.open(io.BytesIO(page.page.locator("#stage").screenshot())).convert("RGB")


def frame_of(geometry: dict) -> tuple[float, float, float, float]:
    """(top, left, bottom, right) of the image and of what its crops show around it, in pixels of the image."""
    boxes = [[0, 0, *geometry["image_size"]], *(crop["box"] for crop in geometry["crops"])]
    tops, lefts, bottoms, rights = zip(*boxes, strict=True)
    return min(tops), min(lefts), max(bottoms), max(rights)


def near(color, other, most: int = 60) -> bool:
    return all(abs(a - b) <= most for a, b in zip(color, other, strict=True))


def test_borders_of_crops_and_tokens_are_drawn_where_the_geometry_says(grey):
    geometry, picture = geometry_of(grey), drawn(grey)
    top, left, bottom, right = frame_of(geometry)

    def column(x: float) -> int:
        return min(picture.width - 1, max(0, round((x - left) / (right - left) * picture.width)))

    def row(y: float) -> int:
        return min(picture.height - 1, max(0, round((y - top) / (bottom - top) * picture.height)))

    assert len(geometry["crops"]) > 2
    for crop in geometry["crops"][1:]:
        rows, columns = crop["row_edges"], crop["column_edges"]
        middle = [(a + b) / 2 for a, b in itertools.pairwise(rows)]
        for edge in columns:  # a vertical line is seen from the middle of each row of tokens
            for y in middle:
                x = column(edge)
                seen = [picture.getpixel((n, row(y))) for n in range(max(0, x - 2), min(picture.width, x + 3))]
                border = edge in (columns[0], columns[-1])
                assert any(near(color, BLUE) if border else not near(color, (GREY,) * 3, 12) for color in seen)


def test_tokens_that_are_kept_show_the_picture_and_those_that_are_cut_are_hatched(grey):
    geometry, picture = geometry_of(grey), drawn(grey)
    top, left, bottom, right = frame_of(geometry)
    kept = cut = 0
    for crop in geometry["crops"][1:]:
        rows, columns = crop["row_edges"], crop["column_edges"]
        for r in range(len(rows) - 1):
            for c in range(len(columns) - 1):
                box = (columns[c] - left, rows[r] - top, columns[c + 1] - left, rows[r + 1] - top)
                scale = picture.width / (right - left), picture.height / (bottom - top)
                cell = [round(side * scale[n % 2]) + (5 if n < 2 else -5) for n, side in enumerate(box)]
                inside = picture.crop(cell)
                plain = ImageChops.difference(inside, Image.new("RGB", inside.size, (GREY,) * 3)).getbbox() is None
                belongs = crop["kept_rows"][0] <= r < crop["kept_rows"][1]
                belongs = belongs and crop["kept_columns"][0] <= c < crop["kept_columns"][1]
                kept, cut = kept + belongs, cut + (not belongs)
                if not belongs:
                    assert len(inside.getcolors(inside.width * inside.height)) > 1
                elif rows[r] >= 0 and rows[r + 1] <= ODD[1] and columns[c] >= 0 and columns[c + 1] <= ODD[0]:
                    assert plain, (r, c)
    assert kept
    assert cut
    assert f"{cut} tokens that are cut away" in grey.text("#caption")


def test_evidence_has_the_servers_signs_and_strengths_for_each_granularity(visit):
    page = visit()
    page.give()
    page.ask(QUESTION)
    (image,) = page.api(ROUTE, page.bodies(ROUTE)[-1])["images"]
    page.page.locator("#layers label", has_text="Evidence").click()
    compared = image["explanation"]["evidence"]
    assert {each["over"] for each in compared} == set(map(int, image["visual_tokens_at"])) - {image["granularity"]}
    for evidence in compared:
        page.page.select_option("#over", str(evidence["over"]))
        pixels = page.page.evaluate(PIXELS)
        heat = evidence["heat"]
        assert (pixels["height"], pixels["width"]) == (len(heat), len(heat[0]))
        numbers = [number for row in heat for number in row]
        colors = list(zip(*[iter(pixels["data"])] * 4, strict=True))
        strongest = max(range(len(numbers)), key=lambda n: abs(numbers[n]))
        assert colors[strongest][3] == max(color[3] for color in colors)
        for number, (red, _, blue, alpha) in zip(numbers, colors, strict=True):
            assert alpha < 30 or (blue > red) == (number > 0)  # purple for, orange against
        assert page.text("#for") == f"for {image['granularity']}"
        assert page.text("#against") == f"for {evidence['over']}"
        together = page.page.locator("tr.sum td").last.inner_text()
        assert float(together.replace("−", "-")) == pytest.approx(evidence["total"], abs=0.006)


PIXELS = """() => {
    const { width, height } = document.getElementById("heat");
    const image = document.getElementById("heat").getContext("2d").getImageData(0, 0, width, height);
    return { width, height, data: [...image.data] };
}"""


def test_numbers_are_those_of_the_answer(visit):
    page = visit()
    page.give()
    page.ask(QUESTION)
    body = page.bodies(CHAT)[0]
    (image,) = page.api(CHAT, body)["avg"]["images"]
    rows = {row[0]: row[1:] for row in (row.inner_text().split("\t") for row in page.page.locator("tbody tr").all())}
    for granularity, probability in image["probabilities"].items():
        assert f"{100 * probability:.1f} %" in rows[granularity]
    for stage in ("Preprocess", "Vision tower", "Router", "Prefill", "Answer"):
        (cells,) = (cells for name, cells in rows.items() if name.startswith(stage))
        assert re.fullmatch(r"[\d.]+ s", cells[-1].strip())
    page.ask(QUESTION)
    assert "Reused: The picture was seen before." in page.text("#numbers")


def test_every_picture_is_shown_whole_and_in_its_own_shape(visit):
    for width, height in ((300, 60), (60, 300), (8, 8)):
        file = io.BytesIO()
        Image.new("RGB", (width, height), "red").save(file, "PNG")
        page = visit(viewport={"width": 360, "height": 740})
        page.give(file.getvalue())
        page.page.wait_for_selector("#budget:enabled")
        before = page.page.locator("#picture").bounding_box()
        page.ask(QUESTION)
        after = page.page.locator("#picture").bounding_box()
        for box in (before, after):
            assert box["width"] / box["height"] == pytest.approx(width / height, rel=0.05)
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 361


def test_a_picture_that_the_browser_cannot_show_is_still_looked_at(visit):
    file = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(file, "TIFF")
    page = visit()
    page.give(file.getvalue(), "scan.tiff")
    page.page.wait_for_selector("#unseen:visible")
    page.ask(QUESTION)
    assert json.dumps(geometry_of(page))
    assert page.page.locator("#overlay .crop").count()
