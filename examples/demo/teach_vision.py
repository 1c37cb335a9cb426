"""Teach a new vision tower what lies under each patch: characters, colours, shapes.

    python examples/demo/teach_vision.py sighted build/demo/start build/demo/sighted
    python examples/demo/teach_vision.py ordered build/demo/instructed build/demo/ordered

Later, also how many characters stand before each one: a language model that knows this reads by counting. A cheap
objective without the language model: linear heads on the tower's patches. The pictures are drawn as it goes, the loop
is that of avg-mlx train, so it resumes and runs in several processes.
"""

import quick  # before MLX: it brings a fast BLAS

# isort: split

import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from backgrounds import TRAIN_PHOTOS, background, pale
from palette import NAMES as COLORS
from pictures import OTHER_FONTS, SHAPES, TESTED_FONTS, Scene, Thing, draw_scene, draw_text, some_size
from PIL import Image
from start import SEED
from words import ALPHABET, LONGEST, some_text

from avg_mlx import load
from avg_mlx.cli.progress import Bar
from avg_mlx.geometry import fit_within
from avg_mlx.inputs.image import make_crops
from avg_mlx.model.avg_llava import Model
from avg_mlx.model.inventory import tensors_of
from avg_mlx.training.loop import LoopSettings, MicroLoss, train
from avg_mlx.training.plan import Plan
from avg_mlx.training.run import Run
from avg_mlx.weights.adapters import AdapterConfig

NAMES = ["nothing", *ALPHABET, *SHAPES]
COVERS = ["nothing", *COLORS]
PLACES = range(LONGEST + 2)  # 0 is nowhere; the last one, beyond the longest text
HEADS = {
    **{"patch_names": NAMES, "patch_colors": COVERS, "patch_left": NAMES, "patch_right": NAMES},
    **{"patch_left_place": PLACES, "patch_right_place": PLACES},
}
PICTURES = 2**22  # to draw from; each has a number
BATCH = 20  # pictures; of most, two crops are shown


class Stage(NamedTuple):
    """What is learned, for how long."""

    heads: int  # of HEADS, the first
    steps: int
    easy: int  # of these steps, the first
    learning_rate: float
    seed: int  # of the pictures' order


STAGES = {"sighted": Stage(4, 5000, 600, 3e-3, SEED), "ordered": Stage(6, 2500, 0, 1.5e-3, SEED + 1)}


def draw(number: int, easy: bool = False) -> Scene:
    """Mostly a page full of text; else a crowded picture of up to four texts and three shapes.

    An easy one is a page of plain dark letters.
    """
    rng = Random(f"vision {SEED} {number}")
    fonts = TESTED_FONTS if easy or rng.random() < 0.6 else OTHER_FONTS
    if easy or rng.random() < 0.7:
        return draw_page(rng, fonts, easy)
    texts = [some_text(rng) for _ in range(rng.choice([1, 1, 2, 3, 4, 0]))]
    shapes = [rng.choice(SHAPES) for _ in range(rng.choice([0, 1, 1, 1, 2, 3]))]
    return draw_scene(rng, some_size(rng, 512), shapes, texts, TRAIN_PHOTOS, fonts=fonts)


def draw_page(rng: Random, fonts: tuple[str, ...], easy: bool) -> Scene:
    """Two to five lines, as long as there is room."""
    size = some_size(rng, 400)
    behind = Image.new("RGB", size, pale(rng)) if easy else background(rng, size, TRAIN_PHOTOS)
    scene = Scene(behind, fonts=fonts)
    lines = rng.choice([2, 3, 3, 4, 4, 5])
    for line in range(lines):
        share = rng.uniform(0.65, 1.0) / lines
        longest = int(size[0] / (0.6 * share * size[1]))
        text = some_text(rng) if rng.random() < 0.4 else "".join(rng.choices(ALPHABET, k=rng.randint(4, 9)))
        rows = line * size[1] // lines, (line + 1) * size[1] // lines
        draw_text(scene, rng, text[: max(2, longest)], (share, share), rows)
    return scene


def things_in_crop(scene: Scene, crop: int, grid: tuple[int, int], side: int) -> list[Thing]:
    """What a crop shows, in its own pixels; crop 0 is the whole picture, squashed."""
    width, height = scene.image.size
    if crop == 0:
        (x, y), (across, down) = (0.0, 0.0), (side / width, side / height)
    else:
        resolution = grid[0] * side, grid[1] * side
        high, wide = fit_within((height, width), resolution)
        row, column = divmod(crop - 1, grid[1])
        x, y = (resolution[1] - wide) // 2 - column * side, (resolution[0] - high) // 2 - row * side
        across, down = wide / width, high / height
    return [
        thing._replace(box=(x + left * across, y + top * down, x + right * across, y + bottom * down))
        for thing in scene.things
        for left, top, right, bottom in [thing.box]
    ]


def labels(things: Sequence[Thing], patches: int, side: int) -> list[np.ndarray]:
    """Of each patch: how much of it every name and every colour covers, whose centre is in its left and right half, and
    which place that one has among the characters of its text whose centres the crop shows.

    As HEADS has them: (patches², classes) each; rows sum to 1.
    """
    edges = np.linspace(0, side, patches + 1)
    names, colors = np.zeros((patches, patches, len(NAMES))), np.zeros((patches, patches, len(COVERS)))
    halves, places = (np.zeros((patches, 2 * patches, len(classes))) for classes in (NAMES, PLACES))
    before = 0  # of a text, the characters beyond the crop
    for name, color, (left, top, right, bottom), place in things:
        wide = np.clip(np.minimum(right, edges[1:]) - np.maximum(left, edges[:-1]), 0, None)
        high = np.clip(np.minimum(bottom, edges[1:]) - np.maximum(top, edges[:-1]), 0, None)
        covered = high[:, None] * wide[None, :] * (patches / side) ** 2
        names[:, :, NAMES.index(name)] += covered
        colors[:, :, COVERS.index(color)] += covered
        row, column = int((top + bottom) / 2 * patches / side), int((left + right) * patches / side)
        before = 0 if place == 1 else before
        if 0 <= row < patches and 0 <= column < 2 * patches and left + right >= 0 and top + bottom >= 0:
            halves[row, column, NAMES.index(name)] += 1
            if place:
                places[row, column, min(place - before, PLACES[-1])] += 1
        elif left + right < 0:
            before = place
    parts = [names, colors, *(half for whole in (halves, places) for half in (whole[:, ::2], whole[:, 1::2]))]
    for x in parts:
        x[:, :, 0] = np.clip(1 - x.sum(axis=-1), 0, None)
        x /= x.sum(axis=-1, keepdims=True)
    return [x.reshape(patches**2, -1).astype(np.float32) for x in parts]


@dataclass
class VisionTask:
    """Telling what each patch shows."""

    model: Model
    stage: Stage

    @property
    def heads(self) -> list[nn.Linear]:
        return [getattr(self.model, name) for name in list(HEADS)[: self.stage.heads]]

    def crops(self, number: int, easy: bool = False) -> tuple[np.ndarray, list[list[np.ndarray]]]:
        """The whole of a picture, one of its crops if they show it otherwise, and their labels."""
        scene, vision = draw(number, easy), self.model.config.vision
        crops = make_crops(scene.image, self.model.config)
        chosen = [0] if len(crops) == 2 else [0, 1 + number % 2]  # a square picture is one crop, twice
        shown = [things_in_crop(scene, crop, crops.crop_grid, vision.image_size) for crop in chosen]
        return crops.pixels[chosen], [labels(things, vision.patch_grid[0], vision.image_size) for things in shown]

    def micro_losses(self, samples: Sequence[int], batch: Sequence[int], step: int) -> Iterable[MicroLoss]:
        drawn = [self.crops(number, step <= self.stage.easy) for number in samples]
        pixels = mx.array(np.concatenate([pixels for pixels, _ in drawn]))
        shown = [one for _, both in drawn for one in both]
        expected = [mx.array(np.stack(part)) for part in zip(*shown, strict=True)]

        def loss() -> mx.array:
            features = self.model.vision_tower(pixels)
            told = [head(features) for head in self.heads]
            losses = [quick.cross_entropy(scores, y).mean() for scores, y in zip(told, expected, strict=False)]
            return sum(losses) * (len(samples) / len(batch))

        yield loss

    def validate(self) -> float | None:
        return None


def main(stage: Stage, start: Path, output: Path) -> None:
    quick.install()
    model, _ = load(start)
    D = model.config.vision.hidden_size
    mx.random.seed(SEED)
    heads = list(HEADS)[: stage.heads]
    for name in heads:
        setattr(model, name, nn.Linear(D, len(HEADS[name])))
    model.freeze()
    for name in ("vision_tower", *heads):
        getattr(model, name).unfreeze()
    model.train()
    about = {"start": str(start), "steps": stage.steps}
    run = Run(output.with_name(f"{output.name}_run"), about, AdapterConfig("full", 0))
    first = mx.distributed.init().rank() == 0
    if first:
        run.open(resume=True)
    settings = LoopSettings(
        steps=stage.steps, learning_rate=stage.learning_rate, warmup=0.02, save_every=200, seed=stage.seed
    )
    with Bar("Vision", "step", hidden=not first) as bar:
        plan = Plan([1] * PICTURES, BATCH, stage.seed)
        train(model, VisionTask(model, stage), plan, settings, run, lambda record: bar.step(record, stage.steps))
    if first:
        partial = output.with_name(f"{output.name}.partial")
        shutil.copytree(start, partial, dirs_exist_ok=True)
        tensors = {name: array for name, array in tensors_of(model).items() if not name.startswith("patch_")}
        mx.save_safetensors(str(partial / "model.safetensors"), tensors, metadata={"format": "mlx"})
        partial.rename(output)


if __name__ == "__main__":
    main(STAGES[sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3]))
