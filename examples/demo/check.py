"""Accuracy counted again from the answers themselves, sharing no code with `avg-mlx evaluate`: a Markdown table.

python examples/demo/check.py build/demo/evaluation/answers.jsonl

Of pictures asked about a shape and about a text it tells which of the two was looked at more closely.
"""

import json
import sys
from pathlib import Path

GROUPS = {
    "easy-VQA": ("yes/no", "shape", "color"),
    "easy-VQA but yes/no": ("shape", "color"),
    "reading": ("number", "word", "new word"),
}

lines = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
modes = ["adaptive", "random", *(str(granularity) for granularity in lines[0]["granularities"])]
twofold: dict[str, dict[str, int]] = {}
for line in lines:
    twofold.setdefault(line["image"], {})[line["category"]] = line["chosen"]["adaptive"]
pairs = [(chosen["shape"], chosen["text"]) for chosen in twofold.values() if {"shape", "text"} <= chosen.keys()]

if pairs:
    more = sum(text > shape for shape, text in pairs)
    less = sum(text < shape for shape, text in pairs)
    print(f"{len(pairs)} pictures: the text looked at more closely than the shape in {more}, less in {less}")
    sys.exit()

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
