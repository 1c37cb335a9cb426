"""From image to crops, with the reference's geometry and pixels."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from ..config import Config, VisionConfig
from ..geometry import Pair, fit_within


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
    if config.image_aspect_ratio == "pad":
        return Crops(_normalize([_pad_to_square(image, config.vision)], config.vision), image_size, (0, 0))
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
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(mean * 255) for mean in vision.image_mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((vision.image_size, vision.image_size), Image.Resampling.BICUBIC)


def _normalize(crops: list[Image.Image], vision: VisionConfig) -> np.ndarray:
    pixels = np.stack([np.asarray(crop, dtype=np.float32) for crop in crops]) / 255
    return (pixels - np.array(vision.image_mean, np.float32)) / np.array(vision.image_std, np.float32)
