"""Whether what speaks for a close look lies on what has to be read: evidence in the text's box against its area.

    python benchmarks/evidence.py --model demo             # about a minute on two CPU cores

It draws pictures of one shape and one text, as examples/demo does with its test photos, and asks what is written.
The mass of a map in a box is the share of the positive evidence, for the first granularity over the second, that lies
in it; evenly spread evidence has the box's share of the area. The map is `Explanation.heat`, once as it is and once
after the evidence of a plain picture of the same size and mean colour is taken off, which leaves what the picture's
content changes. Needs the demo extra: pip install -e '.[demo]'.
"""

import argparse
import dataclasses
import importlib
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from avg_mlx import Evidence, Explanation, explain, load
from avg_mlx.explaining.heat import overlaps
from avg_mlx.markdown import table

QUESTION = "What is written?"
SIDE = 256  # numbers along the longer side of a map
SIZES = ((128, 128), (160, 120), (120, 160), (192, 128), (128, 192), (240, 120))
WANTED = 3.0  # times the box's share of the area

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "demo"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how much evidence for a close look lies on a text.")
    parser.add_argument("--model", default="demo", help="converted folder (default: demo)")
    parser.add_argument("--pictures", type=int, default=100, help="how many are drawn (default: 100)")
    parser.add_argument("--prompt", default=QUESTION, help=f"the question (default: {QUESTION})")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    ratios: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    chosen = []
    for scene in scenes(args.pictures, args.seed):
        plain = Image.new("RGB", scene.image.size, tuple(np.asarray(scene.image).mean(axis=(0, 1)).round().astype(int)))
        [seen], [blank] = (explain(model, tokenizer, args.prompt, image) for image in (scene.image, plain))
        chosen.append(seen.view.granularity)
        for name, heat in maps(seen, blank):
            for what, thing in (("the text", scene.texts[0]), ("the shape", scene.shapes[0])):
                ratios[name, what].append(mass_and_area(heat, thing.box, scene.image.size))
    counts = ", ".join(f"{g}: {chosen.count(g)}" for g in sorted(set(chosen)))
    print(f"{args.model}: {args.pictures} pictures, asked {args.prompt!r}; chosen {counts}.\n")
    print(summary(ratios))


def scenes(count: int, seed: int) -> Iterator[Any]:
    """Pictures of a shape and a text, as the demo's test has them."""
    pictures, backgrounds, words = map(importlib.import_module, ("pictures", "backgrounds", "words"))
    for n in range(count):
        rng = Random(f"evidence {seed} {n}")
        while True:
            scene = pictures.draw_scene(
                rng,
                rng.choice(SIZES),
                [rng.choice(pictures.SHAPES)],
                [words.some_text(rng)],
                backgrounds.TEST_PHOTOS,
                shares=(0.2, 0.3),
            )
            if scene.shapes and scene.texts:
                break
        yield scene


def maps(seen: Explanation, blank: Explanation) -> Iterator[tuple[str, np.ndarray]]:
    """(name, map) of what speaks for a close look: the finest over the coarsest, and the choice over the coarsest."""
    if seen.votes is None or blank.votes is None:
        raise SystemExit("this model has no router, so there is no evidence to measure")
    coarsest, finest = min(seen.votes.granularities), max(seen.votes.granularities)
    compared = {"finest over coarsest": finest}
    if seen.view.granularity != coarsest:
        compared["choice over coarsest"] = seen.view.granularity
    for name, granularity in compared.items():
        evidence, plain = (each.votes.evidence(granularity, coarsest) for each in (seen, blank) if each.votes)
        yield name, seen.heat(evidence, SIDE)
        yield f"{name}, less a plain picture's", seen.heat(less(evidence, plain, blank, seen), SIDE)


def less(evidence: Evidence, plain: Evidence, blank: Explanation, seen: Explanation) -> Evidence:
    """Take off a plain picture's evidence, both in units of the picture's logits."""
    assert seen.votes is not None
    assert blank.votes is not None
    scale = blank.votes.deviation / seen.votes.deviation
    levels = (level - there * scale for level, there in zip(evidence.levels, plain.levels, strict=True))
    return dataclasses.replace(evidence, levels=tuple(levels))


def mass_and_area(
    heat: np.ndarray, box: tuple[float, float, float, float], size: tuple[int, int]
) -> tuple[float, float]:
    """(share of the positive evidence, share of the area) of a box of (left, top, right, bottom) pixels."""
    left, top, right, bottom = box
    sides = zip(((top, bottom), (left, right)), heat.shape, size[::-1], strict=True)
    down, across = (
        overlaps(edges, pixels, side / pixels)[:, 0] * np.ptp(edges) * pixels / side for edges, pixels, side in sides
    )
    positive = np.maximum(heat, 0)
    return float(down @ positive @ across / (positive.sum() or 1)), (right - left) * (bottom - top) / (
        size[0] * size[1]
    )


def summary(ratios: dict[tuple[str, str], list[tuple[float, float]]]) -> str:
    """A row for each map and each kind of box."""
    rows = []
    for (name, what), pairs in ratios.items():
        masses, areas = zip(*pairs, strict=True)
        times = [mass / area for mass, area in pairs]
        rows.append(
            [
                name,
                what,
                len(pairs),
                f"{statistics.mean(areas):.1%}",
                f"{statistics.mean(masses):.1%}",
                f"{statistics.mean(masses) / statistics.mean(areas):.2f}",
                f"{statistics.median(times):.2f}",
                f"{sum(each >= WANTED for each in times) / len(times):.0%}",
            ]
        )
    header = ["evidence", "box", "pictures", "area", "mass", "mass / area", "median of it", f"at least {WANTED:g}"]
    return table(header, rows, left=2)


if __name__ == "__main__":
    main()
