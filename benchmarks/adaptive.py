"""A plain LLaVA-NeXT of random weights is made adaptive: its loss at each granularity before and after, as tables.

    python benchmarks/adaptive.py            # about two minutes on two CPU cores

The commands are those of docs/adaptive.md, the photos 64 drawn squares and circles, the checkpoint the tiny one of
tests/golden_llava in the Hub's layout.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw

CHECKPOINT = Path(__file__).parent.parent / "tests" / "golden_llava" / "next" / "checkpoint"
COLORS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220), "white": (240, 240, 240)}
PHOTOS = 64
DATA = ("--data", "train.json", "--image-folder", "photos")
TUNED = ("--iters", "60", "--learning-rate", "3e-3", "--batch-size", "8", "--train-projector")
ROUTED = ("--router-iters", "30", "--router-batch-size", "8")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        draw(home)
        run(home, "convert", "--hf-path", str(CHECKPOINT), "--mlx-path", "plain", "--granularities")
        before = feedback(home, "plain")
        run(home, "train", "rglf", "--model", "plain", *DATA, "--adapter-path", "adapters", *TUNED, *ROUTED)
        run(home, "fuse", "--model", "plain", "--adapter-path", "adapters", "--save-path", "adaptive")
        after = feedback(home, "adaptive")
        asked = ("--image", "photos/0.png", "--prompt", "What is this?")
        answer = run(home, "generate", "--model", "adaptive", *asked).strip()
    print(f"Before:\n\n{before}\nAfter:\n\n{after}\nAsked “What is this?” about the first photo, it says “{answer}”.")


def draw(home: Path) -> None:
    """Photos, and what is asked about them."""
    random, samples = Random(0), []
    (home / "photos").mkdir()
    for n in range(PHOTOS):
        color, kind = random.choice(list(COLORS)), random.choice(["square", "circle"])
        image = Image.new("RGB", (random.choice([120, 160, 220]), random.choice([120, 160])), (90, 90, 90))
        pen = ImageDraw.Draw(image)
        x, y, side = random.randint(5, 60), random.randint(5, 60), random.randint(25, 50)
        (pen.rectangle if kind == "square" else pen.ellipse)((x, y, x + side, y + side), fill=COLORS[color])
        image.save(home / "photos" / f"{n}.png")
        turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": f"a {color} {kind}"}]
        samples.append({"id": str(n), "image": f"{n}.png", "conversations": turns})
    (home / "train.json").write_text(json.dumps(samples))


def feedback(home: Path, model: str) -> str:
    return run(home, "feedback", "--model", model, *DATA, "--output", f"{model}.jsonl")


def run(home: Path, *arguments: str) -> str:
    """What a verb prints on standard output."""
    command = [sys.executable, "-m", "avg_mlx", *arguments]
    return subprocess.run(command, cwd=home, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
