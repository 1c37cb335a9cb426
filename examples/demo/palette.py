"""Colours: their names, what of each is painted, and what can be told from what lies behind it."""

from random import Random

import numpy as np
from PIL import Image

Color = tuple[int, int, int]

# easy-VQA's own eight come first with the values that it paints them in; then other colours that people call so.
PAINTS: dict[str, tuple[Color, ...]] = {
    "red": ((255, 0, 0), (220, 20, 20), (200, 0, 10), (240, 50, 40)),
    "green": ((0, 255, 0), (0, 128, 0), (34, 160, 34), (60, 205, 60)),
    "blue": ((0, 0, 255), (0, 0, 170), (30, 80, 230), (60, 110, 240)),
    "black": ((0, 0, 0), (0, 0, 0), (20, 20, 20)),
    "gray": ((128, 128, 128), (150, 150, 150), (105, 105, 105)),
    "teal": ((0, 128, 128), (0, 145, 140), (10, 110, 115)),
    "brown": ((165, 42, 42), (139, 69, 19), (120, 70, 30), (100, 60, 40)),
    "yellow": ((255, 255, 0), (255, 230, 0), (240, 220, 50)),
    "orange": ((255, 165, 0), (255, 140, 0), (240, 125, 20)),
    "purple": ((128, 0, 128), (110, 30, 160), (150, 50, 200)),
    "pink": ((255, 192, 203), (255, 105, 180), (255, 150, 190)),
    "white": ((255, 255, 255), (255, 255, 255), (245, 245, 245)),
}
# What the tests paint: none of it is among the above.
TEST_PAINTS: dict[str, tuple[Color, ...]] = {
    "red": ((230, 15, 30), (250, 25, 15)),
    "green": ((20, 145, 40), (30, 220, 30)),
    "blue": ((15, 40, 215), (45, 60, 250)),
    "black": ((8, 8, 8),),
    "gray": ((138, 138, 138), (118, 118, 118)),
    "teal": ((5, 136, 132),),
    "brown": ((150, 75, 30), (130, 55, 35)),
    "yellow": ((250, 240, 20),),
    "orange": ((250, 150, 10),),
    "purple": ((120, 15, 145), (140, 35, 170)),
    "pink": ((255, 130, 185), (250, 170, 200)),
    "white": ((250, 250, 250),),
}
NAMES = tuple(PAINTS)
LUMINANCE = np.array((0.299, 0.587, 0.114), np.float32)
CONTRAST = 90.0  # least distance in RGB, of 442, from what lies behind


def paint(rng: Random, name: str, paints: dict[str, tuple[Color, ...]]) -> Color:
    """One of the values of a colour, or one close to it."""
    near = 0 if rng.random() < 0.4 else 10
    red, green, blue = (min(255, max(0, level + rng.randint(-near, near))) for level in rng.choice(paints[name]))
    return red, green, blue


def visible(
    rng: Random, behind: Image.Image, paints: dict[str, tuple[Color, ...]], brightness: float = 0.0
) -> tuple[str, Color] | None:
    """A colour (its name, its value) that stands out from nearly all of `behind`, or None.

    It has a distance of CONTRAST at least, and differs in brightness by so much of 255, but for four of 64 places.
    """
    tones = np.asarray(behind.resize((8, 8), Image.Resampling.BOX), np.float32).reshape(-1, 3)
    for name in rng.sample(NAMES, len(NAMES)):
        color = paint(rng, name, paints)
        difference = tones - np.array(color, np.float32)
        distances, brighter = np.linalg.norm(difference, axis=1), np.abs(difference @ LUMINANCE)
        if np.partition(distances, 4)[4] >= CONTRAST and np.partition(brighter, 4)[4] >= brightness:
            return name, color
    return None
