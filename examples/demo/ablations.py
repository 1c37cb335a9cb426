"""What each part of the router's training is worth: a Markdown table.

    python examples/demo/ablations.py build/demo evaluation
    python examples/demo/ablations.py build/demo twofold

The models differ in their routers alone, so the answers of the full one's evaluation, which is named, serve all: new is
which granularity each router takes. Routers that have not been trained are left out.
"""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np

from avg_mlx import load
from avg_mlx.cli.progress import Bar
from avg_mlx.evaluation.results import Attempt, Result, read_results
from avg_mlx.inputs.image import make_crops
from avg_mlx.inputs.image_io import read_image
from avg_mlx.inputs.prompt import build_messages, encode_messages

ROUTERS = {
    "router without the instruction": "no-instruction",
    "no ranking loss": "no-ranking-loss",
    "no choice loss": "no-choice-loss",
    "no token cost": "no-token-cost",
}


def main(build: Path, evaluation: str) -> None:
    results = read_results(build / evaluation / "answers.jsonl")
    fixed = [str(g) for g in results[0].granularities]
    tried = {mode: [result.attempt(mode) for result in results] for mode in ("adaptive", "random", *fixed)}
    best = max(fixed, key=lambda mode: accuracy(tried[mode]))
    rows = {"full": tried["adaptive"], f"best fixed granularity ({best})": tried[best], "random": tried["random"]}
    folders = {name: build / folder / "model" for name, folder in ROUTERS.items()}
    trained = {name: folder for name, folder in folders.items() if folder.is_dir()}
    rows |= dict(zip(trained, choices_of(build, results, list(trained.values())), strict=True))

    finest = sum(result.visual_tokens_finest for result in results)
    print("| | accuracy | visual tokens | reduction |\n|---|---:|---:|---:|")
    for name, attempts in rows.items():
        tokens = sum(attempt.visual_tokens for attempt in attempts)
        print(f"| {name} | {accuracy(attempts):.1%} | {tokens / len(attempts):.1f} | {1 - tokens / finest:.1%} |")


def accuracy(attempts: list[Attempt]) -> float:
    return sum(attempt.correct for attempt in attempts) / len(attempts)


def choices_of(build: Path, results: list[Result], folders: list[Path]) -> list[list[Attempt]]:
    """The attempts that each of the models in `folders` takes."""
    models = [load(folder) for folder in folders]
    if not models:
        return []
    seer, tokenizer = models[0]
    taken: list[list[Attempt]] = [[] for _ in models]
    image = None
    with Bar("Routers", "question") as bar:
        for n, result in enumerate(results, 1):
            if result.image != image:
                image, features = result.image, seer.encode(make_crops(read_image(build / result.image), seer.config))
            text = seer.embed_text(encode_messages(tokenizer, build_messages(result.question, 1)))
            for attempts, (model, _) in zip(taken, models, strict=True):
                g = model.config.granularities[int(np.argmax(np.array(model.route(features, text).astype(mx.float32))))]
                attempts.append(next(attempt for attempt in result.attempts if attempt.granularity == g))
            bar.show(n, len(results))
    return taken


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
