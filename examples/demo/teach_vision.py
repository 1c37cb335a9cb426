"""Teach a new vision tower what lies under each patch: characters, colours, shapes.

    python examples/demo/teach_vision.py build/demo/start build/demo/sighted

A cheap objective without the language model: linear heads on the tower's patches, one crop a picture. The pictures are
drawn as it goes, the loop is that of avg-mlx train, so it resumes and runs in several processes.
"""

import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from pictures import (
    COLORS,
    INKS,
    SHAPES,
    SIDE,
    TRAIN_PHOTOS,
    Thing,
    Writer,
    any_color,
    draw_shape,
    pale,
    photo_crop,
    photos,
)
from PIL import Image
from questions import ALPHABET, SEED, random_text, short_text
from words import LEARNED

from avg_mlx import load
from avg_mlx.cli.progress import Bar
from avg_mlx.inputs.image import make_crops
from avg_mlx.model.avg_llava import Model
from avg_mlx.model.inventory import tensors_of
from avg_mlx.training.loop import LoopSettings, MicroLoss, train
from avg_mlx.training.plan import Plan
from avg_mlx.training.run import Run
from avg_mlx.weights.adapters import AdapterConfig

NAMES = ["nothing", *ALPHABET, *SHAPES]
COVERS = ["nothing", *INKS]
HEADS = {"patch_names": NAMES, "patch_inks": COVERS, "patch_centers": NAMES}
PICTURES = 2**20  # to draw from; each has a number
STEPS = 3600
BATCH = 64


class Painter:
    """The picture of every number, and what is in it."""

    def __init__(self) -> None:
        self.writer, self.photos = Writer(), photos(TRAIN_PHOTOS)

    def draw(self, number: int) -> tuple[Image.Image, list[Thing]]:
        """A shape, a shape and a text, or up to four lines of text."""
        rng = Random(f"{SEED} {number}")
        kind = rng.random()
        if kind < 0.2:
            image = Image.new("RGB", (SIDE, SIDE), pale(rng))
            if kind < 0.08:
                return image, [self._shape(image, rng, 0, SIDE)]
            halves = [(0, SIDE // 2), (SIDE // 2, SIDE)]
            low = rng.random() < 0.5
            shape = self._shape(image, rng, *halves[low])
            return image, [shape, *self._text(image, rng, *halves[not low])]
        image, lines = self._background(rng), rng.choice([1, 2, 3, 4])
        edges = [line * SIDE // lines for line in range(lines + 1)]
        return image, [thing for place in pairwise(edges) for thing in self._text(image, rng, *place)]

    def _background(self, rng: Random) -> Image.Image:
        kind = rng.random()
        if kind < 0.5:
            return photo_crop(rng.choice(self.photos), rng, (SIDE, SIDE))
        return Image.new("RGB", (SIDE, SIDE), pale(rng) if kind < 0.8 else any_color(rng))

    def _shape(self, image: Image.Image, rng: Random, top: int, bottom: int) -> Thing:
        return draw_shape(image, rng, rng.choice(list(COLORS)), rng.choice(SHAPES), top, bottom)

    def _text(self, image: Image.Image, rng: Random, top: int, bottom: int) -> list[Thing]:
        text = random_text(rng, (3, 4, 5)) if rng.random() < 0.7 else short_text(rng, LEARNED)
        return self.writer.write(image, rng, text, top, bottom, margin=0)


def labels(things: Sequence[Thing], patches: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each patch: how much of it every name and every ink covers, and the name whose centre lies in it.

    (patches², names), (patches², inks), (patches², names); rows sum to 1.
    """
    edges = np.linspace(0, SIDE, patches + 1)
    names, inks = np.zeros((patches, patches, len(NAMES))), np.zeros((patches, patches, len(COVERS)))
    centers = np.zeros_like(names)
    for name, color, (left, top, right, bottom) in things:
        wide = np.clip(np.minimum(right, edges[1:]) - np.maximum(left, edges[:-1]), 0, None)
        high = np.clip(np.minimum(bottom, edges[1:]) - np.maximum(top, edges[:-1]), 0, None)
        covered = high[:, None] * wide[None, :] * (patches / SIDE) ** 2
        names[:, :, NAMES.index(name)] += covered
        inks[:, :, COVERS.index(color)] += covered
        row, column = (int((low + high) / 2 * patches / SIDE) for low, high in ((top, bottom), (left, right)))
        centers[min(row, patches - 1), min(column, patches - 1), NAMES.index(name)] += 1
    parts = names, inks, centers
    for x in parts:
        x[:, :, 0] = np.clip(1 - x.sum(axis=-1), 0, None)
        x /= x.sum(axis=-1, keepdims=True)
    names, inks, centers = (x.reshape(patches**2, -1).astype(np.float32) for x in parts)
    return names, inks, centers


def cross_entropy(scores: mx.array, shares: mx.array) -> mx.array:
    """Of each patch: (…, classes) → (…)."""
    return -(shares * (scores - mx.logsumexp(scores, axis=-1, keepdims=True))).sum(axis=-1)


@dataclass
class VisionTask:
    """Telling what each patch shows."""

    model: Model
    painter: Painter

    def micro_losses(self, samples: Sequence[int], batch: Sequence[int], step: int) -> Iterable[MicroLoss]:
        config = self.model.config
        drawn = [self.painter.draw(number) for number in samples]
        pixels = mx.array(np.stack([make_crops(image, config).pixels[0] for image, _ in drawn]))
        shown = [labels(things, config.vision.patch_grid[0]) for _, things in drawn]
        expected = [mx.array(np.stack(part)) for part in zip(*shown, strict=True)]

        heads = [getattr(self.model, name) for name in HEADS]

        def loss() -> mx.array:
            features = self.model.vision_tower(pixels)
            losses = [cross_entropy(head(features), y).mean() for head, y in zip(heads, expected, strict=True)]
            return sum(losses) * (len(samples) / len(batch))

        yield loss

    def validate(self) -> float | None:
        return None


def main(start: Path, output: Path) -> None:
    model, _ = load(start)
    D = model.config.vision.hidden_size
    mx.random.seed(SEED)
    for name, classes in HEADS.items():
        setattr(model, name, nn.Linear(D, len(classes)))
    model.freeze()
    for name in ("vision_tower", *HEADS):
        getattr(model, name).unfreeze()
    model.train()
    run = Run(output.with_name(f"{output.name}_run"), {"start": str(start), "steps": STEPS}, AdapterConfig("full", 0))
    first = mx.distributed.init().rank() == 0
    if first:
        run.open(resume=True)
    settings = LoopSettings(steps=STEPS, learning_rate=1.5e-3, warmup=0.05, save_every=500, seed=SEED)
    with Bar("Vision", "step", hidden=not first) as bar:
        plan = Plan([1] * PICTURES, BATCH, SEED)
        train(model, VisionTask(model, Painter()), plan, settings, run, lambda record: bar.step(record, STEPS))
    if first:
        partial = output.with_name(f"{output.name}.partial")
        shutil.copytree(start, partial, dirs_exist_ok=True)
        tensors = {name: array for name, array in tensors_of(model).items() if not name.startswith("patch_")}
        mx.save_safetensors(str(partial / "model.safetensors"), tensors, metadata={"format": "mlx"})
        partial.rename(output)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
