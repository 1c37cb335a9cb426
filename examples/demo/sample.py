"""A few of the test questions, for the tests of this repository: none of their pictures shows a photograph.

python examples/demo/sample.py build/demo tests/demo
"""

import json
import shutil
import sys
from pathlib import Path

EVERY = {"test_easy_vqa.jsonl": (240, 1), "test_twofold.jsonl": (30, 2)}  # of so many questions, the first so many


def main(build: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    chosen = []
    for name, (step, together) in EVERY.items():
        records = [json.loads(line) for line in (build / name).read_text().splitlines()]
        chosen += [record for n in range(0, len(records), step) for record in records[n : n + together]]
    for record in chosen:
        file = record["image"].replace("/", "-")
        shutil.copy(build / record["image"], folder / file)
        record["image"] = file
    (folder / "questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in chosen))
    print(f"{len(chosen)} questions")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
