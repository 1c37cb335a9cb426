"""Crops against the reference's recipe written down anew, in its (width, height)."""

import dataclasses
import json
import math

import numpy as np
import pytest
from conftest import CHECKPOINT
from PIL import Image

from avg_mlx import InputError
from avg_mlx.config import Config
from avg_mlx.inputs.image import make_crops

KEYS = json.loads((CHECKPOINT / "config.json").read_text())
TOWER = json.loads((CHECKPOINT / "clip" / "config.json").read_text())
CONFIG = Config.from_dict(KEYS | {"vision_config": TOWER})
PINPOINTS = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]  # (width, height)
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)

SIZES = [
    (336, 336), (333, 335), (337, 1009), (1000, 31), (50, 40), (1, 1), (1, 20_000), (20_000, 1), (2, 3), (1023, 767),
]  # fmt: skip


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def normalized(crops: list[Image.Image]) -> np.ndarray:
    return np.stack([(np.asarray(crop) / 255 - MEAN) / STD for crop in crops])


def specified_crops(image: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
    """Section 2 of the reference, steps 2 to 6: pixels, and (rows, columns) of local crops."""
    w, h = image.size

    def waste(pinpoint):
        W, H = pinpoint
        scale = min(W / w, H / h)
        effective = min(int(w * scale) * int(h * scale), w * h)
        return -effective, W * H - effective

    W, H = sorted(PINPOINTS, key=waste)[0]
    scale_w, scale_h = W / w, H / h
    size = (W, min(math.ceil(h * scale_w), H)) if scale_w < scale_h else (min(math.ceil(w * scale_h), W), H)
    canvas = np.zeros((H, W, 3), np.uint8)
    left, top = (W - size[0]) // 2, (H - size[1]) // 2
    canvas[top : top + size[1], left : left + size[0]] = np.asarray(image.resize(size))
    crops = [image.resize((336, 336))]
    for row in range(H // 336):
        for column in range(W // 336):
            crops.append(Image.fromarray(canvas[336 * row : 336 * (row + 1), 336 * column : 336 * (column + 1)]))
    return normalized(crops), (H // 336, W // 336)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_crops_are_the_specified_ones(size):
    image = noise(*size)
    crops = make_crops(image, CONFIG)
    pixels, crop_grid = specified_crops(image)
    assert crops.image_size == size[::-1]
    assert crops.crop_grid == crop_grid
    assert len(crops) == 1 + crop_grid[0] * crop_grid[1]
    assert crops.pixels.dtype == np.float32
    assert crops.pixels.shape == pixels.shape
    assert np.abs(crops.pixels - pixels).max() < 1e-5


def colours_of(pixels: np.ndarray) -> list[tuple[int, ...]]:
    """The one colour of each crop."""
    middle = np.rint((pixels[:, 168, 168] * STD + MEAN) * 255).astype(int)
    assert np.abs(pixels - pixels[:, 168:169, 168:169]).max() < 1e-5
    return [tuple(colour.tolist()) for colour in middle]


@pytest.mark.parametrize(
    ("rows", "columns", "colours"),
    [
        (2, 2, [RED, GREEN, BLUE, WHITE]),
        (1, 3, [RED, GREEN, BLUE]),
        (3, 1, [RED, GREEN, BLUE]),
        (1, 2, [RED, GREEN]),
        (2, 1, [RED, GREEN]),
    ],
)
def test_local_crops_come_row_by_row(rows, columns, colours):
    cells = np.array(colours, np.uint8).reshape(rows, columns, 3)
    image = Image.fromarray(cells.repeat(336, axis=0).repeat(336, axis=1))
    crops = make_crops(image, CONFIG)
    assert crops.crop_grid == (rows, columns)
    assert colours_of(crops.pixels[1:]) == colours


def test_the_base_crop_is_the_whole_image_squashed():
    image = Image.new("RGB", (1000, 10), RED)
    image.paste(BLUE, (500, 0, 1000, 10))
    base = make_crops(image, CONFIG).pixels[:1]
    assert colours_of(np.repeat(base[:, :, 84:85], 336, axis=2)) == [RED]
    assert colours_of(np.repeat(base[:, :, 252:253], 336, axis=2)) == [BLUE]


def test_a_wide_image_lies_centred_on_black():
    crops = make_crops(Image.new("RGB", (1000, 10), WHITE), CONFIG)
    assert crops.crop_grid == (1, 3)
    black, white = ((np.array(colour) / 255 - MEAN) / STD for colour in ((0, 0, 0), WHITE))
    rows = crops.pixels[2, :, 168]
    height = math.ceil(10 * 1008 / 1000)
    top = (336 - height) // 2
    assert np.allclose(rows[:top], black, atol=1e-5)
    assert np.allclose(rows[top : top + height], white, atol=1e-5)
    assert np.allclose(rows[top + height :], black, atol=1e-5)


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (31, 32), (7, 7), (1, 999)], ids=str)
def test_pad_makes_one_crop_of_a_square_in_the_mean_colour(size):
    image = noise(*size)
    crops = make_crops(image, dataclasses.replace(CONFIG, image_aspect_ratio="pad", grid_pinpoints=()))
    side = max(size)
    square = np.full((side, side, 3), (122, 116, 104), np.uint8)  # the mean, truncated
    left, top = (side - size[0]) // 2, (side - size[1]) // 2
    square[top : top + size[1], left : left + size[0]] = np.asarray(image)
    assert crops.image_size == size[::-1]
    assert crops.crop_grid == (0, 0)
    assert crops.pixels.shape == (1, 336, 336, 3)
    assert np.abs(crops.pixels - normalized([Image.fromarray(square).resize((336, 336))])).max() < 1e-5


def test_statistics_and_size_of_another_tower():
    tower = TOWER | {"image_size": 28, "image_mean": [0.5, 0.25, 0.0], "image_std": [0.5, 0.25, 1.0]}
    config = Config.from_dict(
        KEYS | {"vision_config": tower, "image_grid_pinpoints": [[28, 28]]} | {"vis_token_granularity": [4]}
    )
    crops = make_crops(Image.new("RGB", (28, 28), (255, 0, 51)), config)
    assert crops.pixels.shape == (2, 28, 28, 3)
    assert np.allclose(crops.pixels, [1.0, -1.0, 0.2], atol=1e-6)


@pytest.mark.parametrize("size", [(900, 20), (20, 900), (333, 332), (1, 1)])
@pytest.mark.parametrize("band", [1, 1000])
def test_padding_in_bands_gives_the_same_pixels(size, band, monkeypatch):
    image, config = noise(*size), dataclasses.replace(CONFIG, image_aspect_ratio="pad")
    whole = make_crops(image, config).pixels
    monkeypatch.setattr("avg_mlx.inputs.image.BAND", band)
    assert np.array_equal(make_crops(image, config).pixels, whole)


def test_an_image_too_tall_to_be_padded_is_refused():
    config = dataclasses.replace(CONFIG, image_aspect_ratio="pad")
    assert len(make_crops(Image.new("RGB", (60_000, 100)), config)) == 1
    with pytest.raises(InputError, match=r"100×60000 is too tall for this model.*; cut it"):
        make_crops(Image.new("RGB", (100, 60_000)), config)
