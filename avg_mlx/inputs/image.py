"""From image to crops, with the reference's geometry and pixels."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from ..config import Config, VisionConfig
from ..errors import InputError
from ..geometry import Pair, fill_square, fit_within

BAND = 1 << 24  # pixels that are padded at a time
MOST_PADDED = 1 << 29  # pixels of the rows that are padded, which takes about four seconds
MOST_CROPPED = 1 << 26  # pixels of a whole image that is resized, of which one crop is cut out


@dataclass(frozen=True)
class Crops:
    """One image as the vision tower sees it."""

    pixels: np.ndarray  # (crops, size, size, 3) float32, normalized; the base crop first
    image_size: Pair  # (height, width) of the original
    crop_grid: Pair  # (rows, columns) of local crops; (0, 0): only the base crop

    def __len__(self) -> int:
        return len(self.pixels)

    @cached_property
    def digest(self) -> str:
        """A hash of pixels, sizes and grid."""
        what = f"{self.pixels.shape} {self.pixels.dtype} {self.image_size} {self.crop_grid}"
        return hashlib.sha256(what.encode() + self.pixels.tobytes()).hexdigest()


def make_crops(image: Image.Image, config: Config) -> Crops:
    """Cut an RGB image into crops, as the config's `image_aspect_ratio` says."""
    image_size = image.height, image.width
    if config.image_aspect_ratio != "anyres":
        make = _pad_to_square if config.image_aspect_ratio == "pad" else _crop_middle
        return Crops(_normalize([make(image, config.vision)], config.vision), image_size, (0, 0))
    size = config.vision.image_size
    rows, columns = config.crop_grid(image_size)
    canvas = _fit_on_black(image, (rows * size, columns * size))
    boxes = [(c * size, r * size, (c + 1) * size, (r + 1) * size) for r in range(rows) for c in range(columns)]
    base = image.resize((size, size), Image.Resampling.BICUBIC)
    pixels = _normalize([base, *map(canvas.crop, boxes)], config.vision)
    return Crops(pixels, image_size, (rows, columns))


def _fit_on_black(image: Image.Image, resolution: Pair) -> Image.Image:
    height, width = fit_within((image.height, image.width), resolution)
    canvas = Image.new("RGB", resolution[::-1])
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    canvas.paste(resized, ((resolution[1] - width) // 2, (resolution[0] - height) // 2))
    return canvas


def _pad_to_square(image: Image.Image, vision: VisionConfig) -> Image.Image:
    """Pad an image with the mean colour to a square, and resize it to a crop.

    The square itself may be far larger than the image, so it is never made. Pillow resizes first the rows and then the
    columns; rows of padding alone keep their colour, and the others are padded and resized in bands. Raises InputError
    for an image so tall that this would take long.
    """
    side, size = max(image.size), vision.image_size
    if side * image.height > MOST_PADDED:
        raise InputError(
            f"an image of {image.width}×{image.height} is too tall for this model, which pads images to squares; cut it"
        )
    colour = tuple(int(mean * 255) for mean in vision.image_mean)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    narrow = Image.new("RGB", (size, side), colour)
    rows = max(1, BAND // side)
    for start in range(0, image.height, rows):
        band = Image.new("RGB", (side, min(rows, image.height - start)), colour)
        band.paste(image.crop((0, start, image.width, start + band.height)), (left, 0))
        narrow.paste(band.resize((size, band.height), Image.Resampling.BICUBIC), (0, top + start))
    return narrow.resize((size, size), Image.Resampling.BICUBIC)


def _crop_middle(image: Image.Image, vision: VisionConfig) -> Image.Image:
    """Resize an image's shorter side to a crop's, and cut out the middle. InputError for an image that is too long."""
    size = vision.image_size
    height, width = fill_square((image.height, image.width), size)
    if height * width > MOST_CROPPED:
        raise InputError(f"an image of {image.width}×{image.height} is too long for this model; cut it")
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def _normalize(crops: list[Image.Image], vision: VisionConfig) -> np.ndarray:
    pixels = np.stack([np.asarray(crop, dtype=np.float32) for crop in crops]) / 255
    return (pixels - np.array(vision.image_mean, np.float32)) / np.array(vision.image_std, np.float32)
