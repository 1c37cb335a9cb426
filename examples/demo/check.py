"""Accuracy counted again from the answers themselves, sharing no code with `avg-mlx evaluate`: a Markdown table.

python examples/demo/check.py build/demo/evaluation/answers.jsonl

Of pictures asked about a shape and about a text (build/demo/twofold/answers.jsonl) it tells instead which of the two
was looked at more closely.
"""

import json
import sys
from pathlib import Path

GROUPS = {
    "easy-VQA": ("yes/no", "shape", "color"),
    "easy-VQA but yes/no": ("shape", "color"),
    "reading": ("number", "word", "new word"),
}


def print_accuracy(lines: list[dict]) -> None:
    """A row for every group of questions, a column for every mode."""
    modes = ["adaptive", "random", *(str(granularity) for granularity in lines[0]["granularities"])]
    print("| questions | | " + " | ".join(modes) + " |")
    print("|---|---:|" + "---:|" * len(modes))
    for name, categories in GROUPS.items():
        asked = [line for line in lines if line["category"] in categories]
        shares = []
        for mode in modes:
            right = 0
            for line in asked:
                answers = {attempt["granularity"]: attempt["answer"] for attempt in line["attempts"]}
                right += answers[line["chosen"][mode]].strip().lower() == line["accepted"][0].lower()
            shares.append(f"{right / len(asked):.1%}")
        print(f"| {name} | {len(asked)} | " + " | ".join(shares) + " |")


def print_choices(lines: list[dict]) -> None:
    """Whether the text or the shape of the same picture was looked at more closely."""
    chosen: dict[str, dict[str, int]] = {}
    for line in lines:
        chosen.setdefault(line["image"], {})[line["category"]] = line["chosen"]["adaptive"]
    more = sum(granularity["text"] > granularity["shape"] for granularity in chosen.values())
    less = sum(granularity["text"] < granularity["shape"] for granularity in chosen.values())
    print(f"{len(chosen)} pictures: the text looked at more closely than the shape in {more}, less in {less}")


if __name__ == "__main__":
    answers = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    if {line["category"] for line in answers} == {"shape", "text"}:
        print_choices(answers)
    else:
        print_accuracy(answers)
