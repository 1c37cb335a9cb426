"""How a vision tower begins: its patches as cosine transforms, its first heads looking at their patch's neighbours.

Both are weights like any other, and everything is learned further from there. But random filters see little more than
a patch's mean colour, and a character is spread over a few patches, which random attention has to find to lie beside
each other. From these weights the tower knows as many characters after a quarter of the pictures.
"""

import math

import mlx.core as mx
import numpy as np

WAVES = 4  # along rows and along columns, each a cosine and a sine
DIMS = 4 * WAVES  # the last ones of the tower's width
AMPLITUDE = 1.5  # about that of patches
SHARPNESS = 3.0  # of queries and keys
LAYERS = 2  # that look at neighbours
BRIGHT = 80  # of a patch's other dimensions are of its brightness, the rest of two differences of colour
GAIN = 0.25  # of the lowest wave of a patch; higher ones, which are weaker in pictures, have more
OFFSETS = ((0, -1), (0, 1), (-1, 0), (1, 0))  # (rows, columns), one for each head


def places(array: mx.array) -> mx.array:
    """Position embeddings, (1 + side², D), the class token's first."""
    side = math.isqrt(len(array) - 1)
    waves = np.zeros(array.shape, np.float32)
    waves[1:, :-DIMS] = np.random.default_rng(0).normal(size=array.shape[1] - DIMS)  # so that blank patches have a norm
    for patch in range(side**2):
        angles = [turn(n) * place for place in divmod(patch, side) for n in range(WAVES)]
        waves[1 + patch, -DIMS:] = [AMPLITUDE * f(angle) for angle in angles for f in (math.cos, math.sin)]
    return mx.array(waves)


def turn(wave: int) -> float:
    """The angle from one patch to the next. The slowest wave is half round after ten patches."""
    return math.pi * (wave + 1) / 10


def adapted(name: str, weights: mx.array) -> mx.array:
    """A tensor of random weights as the tower begins with it."""
    if name == "vision_tower.patch_embedding.weight":
        return cosine_transform(weights)
    layers = [f"vision_tower.layers.{n}.attention" for n in range(LAYERS)]
    if name in [f"{layer}.key_proj.weight" for layer in layers]:
        return looking(weights, [(0, 0)] * len(OFFSETS))
    if name in [f"{layer}.query_proj.weight" for layer in layers]:
        return looking(weights, OFFSETS)
    return weights


def cosine_transform(weights: mx.array) -> mx.array:
    """A patch embedding, (D, side, side, 3): the lowest waves of brightness and of colour, mixed."""
    D, side = len(weights) - DIMS, weights.shape[1]
    bright = np.array((0.299, 0.587, 0.114)) / np.linalg.norm((0.299, 0.587, 0.114))
    red_green = np.array((1, -1, 0)) / math.sqrt(2)
    counts = ((bright, BRIGHT), (red_green, (D - BRIGHT) // 2), (np.cross(bright, red_green), (D - BRIGHT) // 2))
    centers = (np.arange(side) + 0.5) * math.pi / side
    pairs = sorted(np.ndindex(side, side), key=lambda pair: (math.hypot(*pair), pair))
    waves = np.zeros((len(weights), *weights.shape[1:]))
    filters = [
        np.einsum("i,j,c->ijc", np.cos(down * centers), np.cos(right * centers), color)
        * (math.sqrt((2 if down else 1) * (2 if right else 1)) / side * GAIN * (1 + math.hypot(down, right)))
        for color, count in counts
        for down, right in pairs[:count]
    ]
    waves[: len(filters)] = filters
    mixed = np.linalg.qr(np.random.default_rng(0).normal(size=(D, D)))[0] @ waves[:D].reshape(D, -1)
    waves[:D] = mixed.reshape(waves[:D].shape)
    return mx.array(waves.astype(np.float32))


def looking(weights: mx.array, offsets) -> mx.array:
    """Queries or keys, (D, D), whose heads' first dimensions are the waves of the patch at an offset."""
    rows, width = np.array(weights) * 0.1, len(weights) // len(offsets)
    for head, offset in enumerate(offsets):
        part = slice(head * width, head * width + DIMS)
        rows[part] = 0.0
        for n in range(2 * WAVES):
            angle = turn(n % WAVES) * offset[n // WAVES]
            turned = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
            first, at = head * width + 2 * n, rows.shape[1] - DIMS + 2 * n
            rows[first : first + 2, at : at + 2] = SHARPNESS * turned
    return mx.array(rows)
