"""A few of the test questions, for the tests of this repository: none of their pictures shows a photograph.

python examples/demo/sample.py build/demo tests/demo
"""

import json
import shutil
import sys
from pathlib import Path

from PIL import Image

EVERY = {  # of so many questions, the first so many
    "test.jsonl": (20, 1),
    "test_easy_vqa.jsonl": (400, 1),
    "test_twofold.jsonl": (30, 2),
}


def main(build: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    chosen = []
    for name, (step, together) in EVERY.items():
        records = [json.loads(line) for line in (build / name).read_text().splitlines()]
        records = [record for record in records if is_drawn(build / record["image"])]
        chosen += [record for n in range(0, len(records), step) for record in records[n : n + together]]
    for record in chosen:
        file = record["image"].replace("/", "-")
        shutil.copy(build / record["image"], folder / file)
        record["image"] = file
    (folder / "questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in chosen))
    print(f"{len(chosen)} questions")


def is_drawn(file: Path) -> bool:
    """Whether a picture is small and has few colours, as photographs do not."""
    with Image.open(file) as image:
        return file.suffix == ".png" and max(image.size) <= 320 and image.convert("RGB").getcolors(256) is not None


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
