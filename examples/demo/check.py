"""Accuracy counted again from the answers themselves, sharing no code with `avg-mlx evaluate`: a Markdown table.

    python examples/demo/check.py build/demo/evaluation/answers.jsonl

It also counts good questions that were declined. Of pictures asked about a shape and about a text
(build/demo/twofold/answers.jsonl) it tells instead which of the two was looked at more closely.
"""

import json
import sys
from pathlib import Path

DECLINING = ("nothing", "outside", "missing")  # categories whose right answer is that there is none


def plain(answer: str) -> str:
    return answer.strip().rstrip(".").lower()


def given(line: dict, mode: str) -> str:
    """The answer of a mode: a granularity, or one that chooses."""
    answers = {attempt["granularity"]: attempt["answer"] for attempt in line["attempts"]}
    return plain(answers[line["chosen"][mode]])


def declines(answer: str) -> bool:
    return answer.startswith(("i see no", "i only know"))


def print_accuracy(lines: list[dict]) -> None:
    """A row for every category, a column for every mode; then how many good questions are declined."""
    modes = [mode for mode in lines[0]["chosen"] if mode != "oracle"]
    print("| questions | | " + " | ".join(modes) + " |\n|---|---:|" + "---:|" * len(modes))
    groups: dict[str, list[dict]] = {}
    for line in lines:
        groups.setdefault(line["category"], []).append(line)
    for name, asked in sorted(groups.items()):
        right = [[given(line, mode) in map(plain, line["accepted"]) for line in asked] for mode in modes]
        print_row(name, right)
    good = [line for line in lines if line["category"] not in DECLINING]
    print_row("good questions declined", [[declines(given(line, mode)) for line in good] for mode in modes])


def print_row(name: str, counted: list[list[bool]]) -> None:
    print(f"| {name} | {len(counted[0])} | " + " | ".join(f"{sum(one) / len(one):.1%}" for one in counted) + " |")


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
