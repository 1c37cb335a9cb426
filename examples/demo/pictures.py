"""Pictures that are drawn: shapes like easy-VQA's, and short texts over plain colours and photographs."""

from pathlib import Path
from random import Random
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps

SIDE = 64  # pixels, easy-VQA's
COLORS = {  # easy-VQA's
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
    "yellow": (255, 255, 0),
}
INKS = COLORS | {"white": (255, 255, 255)}
SHAPES = ("circle", "rectangle", "triangle")
FONTS = ("DejaVuSans-Bold",)
SIZES = (14, 16, 18, 20)  # pixels, in a picture of SIDE
SMALLEST = 12  # for what is too long for these
CONTRAST = 80  # least difference in luminance, of 255, between a text and what lies behind it
PLACES = 10  # tried, until a text has that
# scikit-image's, which come with its package.
TRAIN_PHOTOS = (
    *("astronaut.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "brick.png", "ihc.png"),
    *("camera.png", "coins.png", "grass.png", "moon.png", "cell.png"),
)
TEST_PHOTOS = ("chelsea.png", "hubble_deep_field.jpg", "retina.jpg", "gravel.png")

Color = tuple[int, int, int]


class Thing(NamedTuple):
    """A shape or a character, and where it is."""

    name: str
    color: str
    box: tuple[float, float, float, float]  # left, top, right, bottom


def package_folder(name: str) -> Path:
    """Where an installed package lies, without importing it."""
    from importlib.util import find_spec

    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the demo's recipe needs {name}: pip install -e '.[demo]'")
    return Path(spec.origin).parent


def photos(names: tuple[str, ...]) -> list[Image.Image]:
    return [Image.open(package_folder("skimage") / "data" / name).convert("RGB") for name in names]


def pale(rng: Random) -> Color:
    """A background as easy-VQA has them."""
    return rng.randint(228, 255), rng.randint(228, 255), rng.randint(228, 255)


def any_color(rng: Random) -> Color:
    return rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255)


def photo_crop(photo: Image.Image, rng: Random, size: tuple[int, int]) -> Image.Image:
    """A part of a photograph, scaled to `size` (width, height), perhaps mirrored, its color channels in any order."""
    scale = rng.uniform(1.0, min(photo.width / size[0], photo.height / size[1], 6))
    w, h = int(size[0] * scale), int(size[1] * scale)
    x, y = rng.randint(0, photo.width - w), rng.randint(0, photo.height - h)
    part = photo.crop((x, y, x + w, y + h)).resize(size, Image.Resampling.BOX)
    if rng.random() < 0.5:
        part = ImageOps.mirror(part)
    return Image.merge("RGB", rng.sample(part.split(), 3))


def draw_shape(image: Image.Image, rng: Random, color: str, shape: str, top: int, bottom: int, scale: int = 1) -> Thing:
    """A shape of `color` between two heights, with hard edges as easy-VQA's have."""
    draw = ImageDraw.Draw(image)
    room = min(bottom - top, image.width, 30 * scale)
    w = rng.randint(8 * scale, room - 1)
    low = max(6, w * 2 // 3)
    tall = rng.randint(low, max(low, min(room - 1, w * 3 // 2)))
    h = {"rectangle": tall, "circle": w, "triangle": round(w * 0.87)}[shape]
    if shape == "rectangle" and rng.random() < 0.3:
        w = max(6, w // 2)
    x, y = rng.randint(0, image.width - w - 1), rng.randint(top, bottom - h - 1)
    box = x, y, x + w, y + h
    if shape == "triangle":
        draw.polygon([(x, y + h), (x + w, y + h), (x + w // 2, y)], COLORS[color])
    elif shape == "circle":
        draw.ellipse(box, COLORS[color])
    else:
        draw.rectangle(box, COLORS[color])
    return Thing(shape, color, box)


class Writer:
    """Writes texts in several sizes, colours and places."""

    def __init__(self) -> None:
        self.folder = package_folder("matplotlib") / "mpl-data" / "fonts" / "ttf"
        self.fonts: dict[tuple[str, int], ImageFont.FreeTypeFont] = {}

    def font(self, name: str, size: int) -> ImageFont.FreeTypeFont:
        if (name, size) not in self.fonts:
            self.fonts[name, size] = ImageFont.truetype(str(self.folder / f"{name}.ttf"), size)
        return self.fonts[name, size]

    def write(
        self, image: Image.Image, rng: Random, text: str, top: int, bottom: int, scale: int = 1, margin: int = 1
    ) -> list[Thing]:
        """Write `text` between two heights, where a colour can be seen; returns its characters."""
        room = image.width - 2 * margin, bottom - top
        fonts = [self.font(name, size * scale) for name in FONTS for size in SIZES]
        fitting = [font for font in fonts if _fits(font.getbbox(text), room)]
        font = rng.choice(fitting or [self.font(FONTS[0], SMALLEST * scale)])
        left, above, right, below = font.getbbox(text)
        w, h = right - left, below - above
        for _ in range(PLACES):
            x, y = rng.randint(0, int(max(0, image.width - w - margin))), rng.randint(top, int(max(top, bottom - h)))
            contrast = _contrast(image.crop((x, y, int(x + w), int(y + h))))
            visible = [name for name in INKS if contrast[name] >= CONTRAST]
            if visible:
                break
        color = rng.choice(visible or [max(contrast, key=contrast.__getitem__)])
        ImageDraw.Draw(image).text((x - left, y - above), text, INKS[color], font=font)
        ends = [x - left + font.getlength(text[:i]) for i in range(len(text) + 1)]
        return [Thing(text[i], color, (ends[i], y, ends[i + 1], y + h)) for i in range(len(text))]


def _fits(box: tuple[float, float, float, float], room: tuple[int, int]) -> bool:
    return box[2] - box[0] <= room[0] and box[3] - box[1] <= room[1]


def _contrast(behind: Image.Image) -> dict[str, float]:
    """How well every ink can be told from a background where it can be told least."""
    patches = behind.resize((8, 2), Image.Resampling.BOX)
    tones = [_luminance(patches.getpixel((i, j))) for i in range(8) for j in range(2)]
    return {name: min(abs(_luminance(ink) - tone) for tone in tones) for name, ink in INKS.items()}


def _luminance(color: Color) -> float:
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
