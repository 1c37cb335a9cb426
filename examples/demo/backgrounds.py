"""What lies behind shapes and texts: plain colours, gradients, patterns and photographs."""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from random import Random

import numpy as np
from palette import Color
from PIL import Image, ImageDraw, ImageOps

Size = tuple[int, int]  # (width, height)
Maker = Callable[[Random, Size, tuple[str, ...]], Image.Image]

# scikit-image's and matplotlib's, which come with these packages. What shows discs or text is left out.
TRAIN_PHOTOS = (
    *("astronaut.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "motorcycle_right.png", "brick.png"),
    *("ihc.png", "camera.png", "grass.png", "moon.png", "cell.png"),
)
TEST_PHOTOS = ("chelsea.png", "hubble_deep_field.jpg", "gravel.png", "grace_hopper.jpg")


def package_folder(name: str) -> Path:
    """Where an installed package lies, without importing it."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the demo's recipe needs {name}: pip install -e '.[demo]'")
    return Path(spec.origin).parent


@cache
def photo(name: str) -> Image.Image:
    if name == "grace_hopper.jpg":
        folder = package_folder("matplotlib") / "mpl-data" / "sample_data"
    else:
        folder = package_folder("skimage") / "data"
    return Image.open(folder / name).convert("RGB")


def pale(rng: Random) -> Color:
    """As easy-VQA has them."""
    return rng.randint(228, 255), rng.randint(228, 255), rng.randint(228, 255)


def any_color(rng: Random) -> Color:
    return rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255)


def background(rng: Random, size: Size, photos: tuple[str, ...]) -> Image.Image:
    """One of any kind."""
    kind = rng.random()
    if kind < 0.25:
        return photo_part(rng, size, photos)
    if kind < 0.33:
        return pattern(rng, size)
    if kind < 0.5:
        return gradient(rng, size)
    return plain(rng, size)


def plain(rng: Random, size: Size) -> Image.Image:
    kind = rng.random()
    color = (255, 255, 255) if kind < 0.2 else (0, 0, 0) if kind < 0.27 else pale(rng)
    return Image.new("RGB", size, color if kind < 0.65 else any_color(rng))


def nothing_to_see(rng: Random, size: Size, photos: tuple[str, ...]) -> Image.Image:
    """A picture without shapes or text, which is mostly no plain one."""
    kind = rng.random()
    if kind < 0.6:
        return photo_part(rng, size, photos)
    return pattern(rng, size) if kind < 0.8 else background(rng, size, photos)


def blended(rng: Random, size: Size, photos: tuple[str, ...]) -> Image.Image:
    """What may be a photograph that nobody has seen: a part of one, turned, into a part of another."""
    width, height = size
    turned = photo_part(rng, (width * 2, height * 2), photos).rotate(rng.uniform(0, 360))
    middle = turned.crop((width // 2, height // 2, width // 2 + width, height // 2 + height))
    return Image.blend(middle, photo_part(rng, size, photos), rng.uniform(0.2, 0.8))


def scribbled(rng: Random, size: Size, photos: tuple[str, ...]) -> Image.Image:
    """Long lines and bows, which are no shapes and no letters."""
    image = background(rng, size, photos)
    draw, (width, height) = ImageDraw.Draw(image), size
    for _ in range(rng.randint(1, 9)):
        x, y = (sorted((rng.uniform(-0.5, 1.5), rng.uniform(-0.5, 1.5))) for _ in range(2))
        box = [x[0] * width, y[0] * height, (x[1] + 0.3) * width, (y[1] + 0.3) * height]
        thick = max(1, round(min(size) * rng.uniform(0.003, 0.03)))
        if rng.random() < 0.5:
            draw.line(box if rng.random() < 0.5 else [box[0], box[3], box[2], box[1]], any_color(rng), thick)
        else:
            start = rng.uniform(0, 360)
            draw.arc(box, start, start + rng.uniform(30, 200), any_color(rng), thick)
    return image


def varied(rng: Random, size: Size, photos: tuple[str, ...]) -> Image.Image:
    """A background of any kind, more often a photograph."""
    return blended(rng, size, photos) if rng.random() < 0.2 else background(rng, size, photos)


def varied_nothing(rng: Random, size: Size, photos: tuple[str, ...]) -> Image.Image:
    """A picture without shapes or text, of more kinds."""
    kind = rng.random()
    if kind < 0.35:
        return blended(rng, size, photos)
    return scribbled(rng, size, photos) if kind < 0.5 else nothing_to_see(rng, size, photos)


def strange(rng: Random, size: Size, photos: tuple[str, ...]) -> Image.Image:
    """Photographs as nobody takes them: from very near, inverted, overexposed, with specks all over."""
    image = close_up(rng, size, photos) if rng.random() < 0.4 else blended(rng, size, photos)
    if rng.random() < 0.35:
        image = ImageOps.invert(image)
    if rng.random() < 0.25:
        image = ImageOps.equalize(image)
    return specked(rng, image) if rng.random() < 0.4 else image


def close_up(rng: Random, size: Size, photos: tuple[str, ...]) -> Image.Image:
    """A small piece of a photograph, enlarged."""
    whole, nearer = photo_part(rng, size, photos), rng.uniform(2, 8)
    w, h = max(4, int(size[0] / nearer)), max(4, int(size[1] / nearer))
    x, y = rng.randint(0, size[0] - w), rng.randint(0, size[1] - h)
    return whole.resize(size, Image.Resampling.BICUBIC, (x, y, x + w, y + h))


def specked(rng: Random, image: Image.Image) -> Image.Image:
    """With dots that are too small for shapes."""
    draw, side = ImageDraw.Draw(image), min(image.size)
    for _ in range(rng.randint(10, 150)):
        x, y = rng.uniform(0, image.width), rng.uniform(0, image.height)
        w, h = (side * rng.uniform(0.002, 0.03) for _ in range(2))
        draw.ellipse([x - w, y - h, x + w, y + h], any_color(rng))
    return image


def varied_or_strange(rng: Random, size: Size, photos: tuple[str, ...]) -> Image.Image:
    """A background of any kind, and now and then a strange one."""
    return strange(rng, size, photos) if rng.random() < 0.1 else varied(rng, size, photos)


def nothing_or_strange(rng: Random, size: Size, photos: tuple[str, ...]) -> Image.Image:
    """A picture without shapes or text, as often as not a strange one."""
    return strange(rng, size, photos) if rng.random() < 0.5 else varied_nothing(rng, size, photos)


def swirled(rng: Random, size: Size, photos: tuple[str, ...]) -> Image.Image:
    """A photograph turned about a point, the more the nearer to it: rings and bows, as wheels and flowers have."""
    from skimage.transform import swirl

    pixels, side = np.asarray(photo_part(rng, size, photos)), min(size)
    for _ in range(rng.randint(1, 3)):
        center = rng.uniform(0, size[0]), rng.uniform(0, size[1])
        strength, radius = rng.choice([-1, 1]) * rng.uniform(1, 12), side * rng.uniform(0.3, 1.2)
        pixels = swirl(pixels, center, strength, radius, order=1, mode="reflect", preserve_range=True)
    return Image.fromarray(pixels.astype(np.uint8))


def with_swirls(rng: Random, size: Size, photos: tuple[str, ...]) -> Image.Image:
    """A background of any kind, now and then a strange or a swirled one."""
    return swirled(rng, size, photos) if rng.random() < 0.06 else varied_or_strange(rng, size, photos)


def nothing_with_swirls(rng: Random, size: Size, photos: tuple[str, ...]) -> Image.Image:
    """A picture without shapes or text, in three cases of ten a swirled photograph."""
    return swirled(rng, size, photos) if rng.random() < 0.3 else nothing_or_strange(rng, size, photos)


def gradient(rng: Random, size: Size) -> Image.Image:
    """From one colour to another in some direction."""
    ramp = Image.linear_gradient("L").rotate(rng.uniform(0, 360), Image.Resampling.BILINEAR)
    ramp = ramp.crop((40, 40, 216, 216)).resize(size, Image.Resampling.BILINEAR)
    near = pale(rng) if rng.random() < 0.5 else any_color(rng)
    far = pale(rng) if rng.random() < 0.5 else any_color(rng)
    return ImageOps.colorize(ramp, near, far)


def pattern(rng: Random, size: Size) -> Image.Image:
    """Random cells, sharp or blurred, or stripes, between two colours or in all."""
    columns, rows = rng.choice([3, 5, 8, 16, 40, 100]), rng.choice([3, 5, 8, 16, 40, 100])
    if rng.random() < 0.3:
        columns, rows = rng.choice([(columns, 1), (1, rows)])
    scaling = rng.choice([Image.Resampling.NEAREST, Image.Resampling.BICUBIC, Image.Resampling.BICUBIC])
    if rng.random() < 0.5:
        return Image.frombytes("RGB", (columns, rows), rng.randbytes(3 * columns * rows)).resize(size, scaling)
    cells = Image.frombytes("L", (columns, rows), rng.randbytes(columns * rows)).resize(size, scaling)
    return ImageOps.colorize(cells, any_color(rng), any_color(rng))


def photo_part(rng: Random, size: Size, names: tuple[str, ...]) -> Image.Image:
    """A part of a photograph, perhaps mirrored, brightened or darkened, its colour channels in any order."""
    whole = photo(rng.choice(names))
    largest = min(whole.width / size[0], whole.height / size[1])
    scale = largest * rng.uniform(0.25, 1.0)
    w, h = max(1, int(size[0] * scale)), max(1, int(size[1] * scale))
    x, y = rng.randint(0, whole.width - w), rng.randint(0, whole.height - h)
    part = whole.crop((x, y, x + w, y + h)).resize(size, Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        part = ImageOps.mirror(part)
    if rng.random() < 0.5:
        low, high = rng.uniform(0, 90), rng.uniform(165, 255)
        part = part.point([int(low + level * (high - low) / 255) for level in range(256)] * 3)
    if rng.random() < 0.6:
        part = Image.merge("RGB", rng.sample(part.split(), 3))
    return part


PLAIN: tuple[Maker, Maker] = background, nothing_to_see  # behind something, and where nothing is
VARIED: tuple[Maker, Maker] = varied, varied_nothing
STRANGE: tuple[Maker, Maker] = varied_or_strange, nothing_or_strange
SWIRLED: tuple[Maker, Maker] = with_swirls, nothing_with_swirls
