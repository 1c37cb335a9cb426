"""Pictures that are drawn: shapes and short texts of many kinds, and what is where in them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from random import Random
from typing import NamedTuple

from backgrounds import PLAIN, Maker, Size, package_folder
from palette import PAINTS, Color, visible
from PIL import Image, ImageDraw, ImageFont

SHAPES = ("circle", "rectangle", "triangle")
TESTED_FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono")
OTHER_FONTS = (
    *("DejaVuSerif-Bold", "DejaVuSansMono-Bold", "DejaVuSans-Oblique", "DejaVuSerif-Italic"),
    *("STIXGeneral", "STIXGeneralBol", "cmr10", "cmb10", "cmss10", "cmtt10"),
)
SMALLEST = 0.12  # of the shorter side, a font's size
READABLE = 50.0  # of 255, by how much a text is brighter or darker than what is behind it
PLACES = 12  # tried, until there is room and a colour can be seen

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


class Thing(NamedTuple):
    """A shape or a character, and where it is."""

    name: str
    color: str
    box: Box
    place: int = 0  # of a character in its text, from 1


class Text(NamedTuple):
    """A text and its characters."""

    text: str
    color: str
    box: Box
    letters: tuple[Thing, ...]


@dataclass
class Scene:
    """A picture and what it shows."""

    image: Image.Image
    paints: dict[str, tuple[Color, ...]] = field(default_factory=lambda: PAINTS)
    fonts: tuple[str, ...] = TESTED_FONTS
    shapes: list[Thing] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)

    @property
    def things(self) -> list[Thing]:
        """All shapes and characters."""
        return [*self.shapes, *(letter for text in self.texts for letter in text.letters)]

    def is_free(self, box: Box) -> bool:
        """Whether a box is within the picture, and clear of what is there already."""
        gap = 0.02 * min(self.image.size)
        left, top, right, bottom = box
        if left < 0 or top < 0 or right > self.image.width or bottom > self.image.height:
            return False
        taken = [thing.box for thing in (*self.shapes, *self.texts)]
        return not any(
            left < x1 + gap and x0 < right + gap and top < y1 + gap and y0 < bottom + gap for x0, y0, x1, y1 in taken
        )

    def sort(self) -> None:
        """Shapes from left to right, texts from top to bottom, as they are told."""
        self.shapes.sort(key=lambda thing: (thing.box[0] + thing.box[2], thing.box[1]))
        self.texts.sort(key=lambda text: text.box[1] + text.box[3])


def some_size(rng: Random, largest: int = 1024) -> Size:
    """Of any proportion up to three to one, more often small."""
    ratio = rng.choice([1, 1, 1, 4 / 3, 3 / 2, rng.uniform(1, 2), 2, rng.uniform(1, 3)])
    short = math.exp(rng.uniform(math.log(64), math.log(min(320, largest / ratio))))
    if rng.random() < 0.05:
        short = rng.uniform(64, largest / ratio)
    width, height = round(short * ratio), round(short)
    lies = rng.random() < (0.6 if ratio < 1.6 else 0.8)
    return (width, height) if lies else (height, width)


def draw_shape(scene: Scene, rng: Random, kind: str) -> bool:
    """Add a shape; False if there was no room for it or no colour for its place."""
    side = min(scene.image.size)
    for _ in range(PLACES):
        crowd = 1 + len(scene.shapes) + len(scene.texts)
        extent = max(10.0, side * rng.uniform(0.16, 0.85 if crowd == 1 else 0.5))
        corners = _corners(rng, kind, extent)
        xs, ys = zip(*corners, strict=True)
        w, h = max(xs), max(ys)
        if w >= scene.image.width or h >= scene.image.height:
            continue
        x, y = rng.randint(0, int(scene.image.width - w - 1)), rng.randint(0, int(scene.image.height - h - 1))
        box = x, y, x + w, y + h
        if not scene.is_free(box):
            continue
        found = visible(rng, scene.image.crop((x, y, int(x + w) + 1, int(y + h) + 1)), scene.paints)
        if found is None:
            continue
        _fill(scene.image, rng, [(x + i, y + j) for i, j in corners], found[1])
        scene.shapes.append(Thing(kind, found[0], box))
        return True
    return False


def _corners(rng: Random, kind: str, extent: float) -> list[tuple[float, float]]:
    """A shape's outline, within a box at (0, 0)."""
    if kind == "circle":
        points = [(math.cos(a), math.sin(a)) for a in (2 * math.pi * i / 64 for i in range(64))]
    elif kind == "rectangle":
        ratio = rng.uniform(0.35, 1.0)
        w, h = (1, ratio) if rng.random() < 0.5 else (ratio, 1)
        points = [(-w, -h), (w, -h), (w, h), (-w, h)]
    else:
        base = rng.uniform(0.75, 1.1)
        points = [(-base, 0.87), (base, 0.87), (rng.uniform(-0.3, 0.3) if rng.random() < 0.4 else 0.0, -0.87)]
    turned = kind != "circle" and rng.random() < 0.25
    angle = rng.uniform(0, 2 * math.pi) if turned else 0.0
    points = [(x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)) for x, y in points]
    left, top = min(x for x, _ in points), min(y for _, y in points)
    scale = extent / max(max(x for x, _ in points) - left, max(y for _, y in points) - top)
    return [((x - left) * scale, (y - top) * scale) for x, y in points]


def _fill(image: Image.Image, rng: Random, corners: list[tuple[float, float]], color: Color) -> None:
    """Paint a shape with hard edges, as easy-VQA's have, or soft ones."""
    left, top = (int(min(c[axis] for c in corners)) - 1 for axis in (0, 1))
    right, bottom = (int(max(c[axis] for c in corners)) + 2 for axis in (0, 1))
    sharp = 1 if rng.random() < 0.4 else 4
    mask = Image.new("L", ((right - left) * sharp, (bottom - top) * sharp))
    ImageDraw.Draw(mask).polygon([((x - left) * sharp, (y - top) * sharp) for x, y in corners], 255)
    if sharp > 1:
        mask = mask.reduce(sharp)
    image.paste(color, (left, top), mask)


@cache
def font_of(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(package_folder("matplotlib") / "mpl-data" / "fonts" / "ttf" / f"{name}.ttf"), size)


def draw_text(
    scene: Scene,
    rng: Random,
    text: str,
    shares: tuple[float, float] = (0.15, 0.45),
    rows: tuple[int, int] | None = None,
) -> bool:
    """Add a text, its font's size so much of the picture's height; False if there was no room or no colour for it.

    `rows` are the pixels between which it is to stand, by default anywhere.
    """
    width, height = scene.image.size
    first, last = rows or (0, height)
    name = rng.choice(scene.fonts)
    size = max(round(rng.uniform(*shares) * height), 9)
    smallest = max(9, round(SMALLEST * min(width, height)))
    for _ in range(PLACES):
        font = font_of(name, size)
        left, above, right, below = font.getbbox(text)
        w, h = right - left, below - above
        if w > 0.98 * width or h > 0.98 * (last - first):
            size = int(min(size * 0.97 * width / w, size * 0.9))
            if size < smallest:
                return False
            continue
        x, y = rng.randint(0, int(width - w)), rng.randint(first, int(last - h))
        box = x, y, x + w, y + h
        if not scene.is_free(box):
            size = max(smallest, round(size * 0.95))
            continue
        found = visible(rng, scene.image.crop((x, y, int(x + w), int(y + h))), scene.paints, READABLE)
        if found is None:
            continue
        ImageDraw.Draw(scene.image).text((x - left, y - above), text, found[1], font=font)
        ends = [x - left + font.getlength(text[:i]) for i in range(len(text) + 1)]
        letters = [Thing(text[i], found[0], (ends[i], y, ends[i + 1], y + h), i + 1) for i in range(len(text))]
        scene.texts.append(Text(text, found[0], box, tuple(letters)))
        return True
    return False


def draw_scene(
    rng: Random,
    size: Size,
    shapes: Sequence[str],
    texts: Sequence[str],
    photos: tuple[str, ...],
    *,
    paints: dict[str, tuple[Color, ...]] = PAINTS,
    fonts: tuple[str, ...] = TESTED_FONTS,
    shares: tuple[float, float] = (0.15, 0.45),
    behind: tuple[Maker, Maker] = PLAIN,
) -> Scene:
    """A picture with these shapes and texts, as far as there is room; `behind` makes its background."""
    make = behind[0] if shapes or texts else behind[1]
    scene = Scene(make(rng, size, photos), paints, fonts)
    for text in texts:
        draw_text(scene, rng, text, shares)
    for kind in shapes:
        draw_shape(scene, rng, kind)
    scene.sort()
    return scene
