"""Accuracy counted again from the answers themselves, sharing no code with `avg-mlx evaluate`: Markdown tables.

    python examples/demo/check.py build/demo/evaluation/answers.jsonl

It also counts good questions that were declined, visual tokens as a share of the finest's, and the texts of each length
that are read, and it names wordings that are seldom understood. Of pictures asked about a shape and about a text
(build/demo/twofold/answers.jsonl) it tells instead which of the two was looked at more closely.
"""

import json
import re
import sys
from pathlib import Path

from palette import NAMES as COLORS
from wordings import SHAPE_NAMES, bare

DECLINING = ("nothing", "outside", "missing")  # categories whose right answer is that there is none


def plain(answer: str) -> str:
    return answer.strip().rstrip(".").lower()


def given(line: dict, mode: str) -> str:
    """The answer of a mode: a granularity, or one that chooses."""
    answers = {attempt["granularity"]: attempt["answer"] for attempt in line["attempts"]}
    return plain(answers[line["chosen"][mode]])


def declines(answer: str) -> bool:
    return answer.startswith(("i see no", "i only know"))


def is_right(line: dict, mode: str) -> bool:
    return given(line, mode) in map(plain, line["accepted"])


def grouped(lines: list[dict], keys: list) -> dict:
    """{key: its lines}."""
    groups: dict = {}
    for key, line in zip(keys, lines, strict=True):
        groups.setdefault(key, []).append(line)
    return groups


def print_accuracy(lines: list[dict]) -> None:
    """A row for every category, a column for every mode; then how many good questions are declined."""
    modes = [mode for mode in lines[0]["chosen"] if mode != "oracle"]
    print("| questions | | " + " | ".join(modes) + " |\n|---|---:|" + "---:|" * len(modes))
    groups = grouped(lines, [line["category"] for line in lines])
    groups["reading, all"] = [line for line in lines if line["category"].startswith("reading")]
    for name, asked in sorted(groups.items()):
        print_row(name, [[is_right(line, mode) for line in asked] for mode in modes])
    good = [line for line in lines if line["category"] not in DECLINING]
    print_row("good questions declined", [[declines(given(line, mode)) for line in good] for mode in modes])


def print_row(name: str, counted: list[list[bool]]) -> None:
    print(f"| {name} | {len(counted[0])} | " + " | ".join(f"{sum(one) / len(one):.1%}" for one in counted) + " |")


def print_tokens(lines: list[dict]) -> None:
    """The visual tokens of the router's choices in each category, on average and as a share of the finest's."""
    print("\n| questions | visual tokens | of the finest's |\n|---|---:|---:|")
    groups = grouped(lines, [line["category"].split()[0] for line in lines])
    for name, asked in sorted(groups.items()):
        tokens = sum(
            next(a["visual_tokens"] for a in line["attempts"] if a["granularity"] == line["chosen"]["adaptive"])
            for line in asked
        )
        print(f"| {name} | {tokens / len(asked):.1f} | {tokens / sum(x['visual_tokens_finest'] for x in asked):.1%} |")


def print_lengths(lines: list[dict], mode: str) -> None:
    """How many texts of each length are read."""
    print(f"\n| characters | texts | read at {mode} |\n|---|---:|---:|")
    texts = [line for line in lines if line["category"].startswith("reading")]
    for length, asked in sorted(grouped(texts, [len(line["accepted"][0]) for line in texts]).items()):
        print_row(str(length), [[is_right(line, mode) for line in asked]])


def print_misunderstood(lines: list[dict], mode: str) -> None:
    """The endings of questions that were asked ten times or more, and answered rightly at most four times in ten."""
    names = rf"\b({'|'.join((*COLORS, *SHAPE_NAMES))})"
    endings = [re.sub(names, "…", bare(line["question"]))[-40:].strip() for line in lines]
    for ending, asked in sorted(grouped(lines, endings).items()):
        right = sum(is_right(line, mode) for line in asked)
        if len(asked) >= 10 and right <= 0.4 * len(asked):
            print(f"\nseldom understood: “{ending}”, {right} of {len(asked)} right at {mode}")


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
        finest = str(max(attempt["granularity"] for attempt in answers[0]["attempts"]))
        print_accuracy(answers)
        if "adaptive" in answers[0]["chosen"]:
            print_tokens(answers)
        print_lengths(answers, finest)
        print_misunderstood(answers, finest)
