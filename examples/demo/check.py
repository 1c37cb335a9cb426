"""Accuracy counted again from the answers themselves, sharing no code with `avg-mlx evaluate`: a Markdown table.

python examples/demo/check.py build/demo/evaluation/answers.jsonl
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
print("| questions | | adaptive | " + " | ".join(str(g) for g in lines[0]["granularities"]) + " |")
print("|---|---:|" + "---:|" * (1 + len(lines[0]["granularities"])))
for name, categories in GROUPS.items():
    asked = [line for line in lines if line["category"] in categories]
    shares = []
    for taken in (None, *lines[0]["granularities"]):
        right = 0
        for line in asked:
            answers = {attempt["granularity"]: attempt["answer"] for attempt in line["attempts"]}
            right += answers[taken or line["chosen"]["adaptive"]].strip().lower() == line["accepted"][0].lower()
        shares.append(f"{right / len(asked):.1%}")
    print(f"| {name} | {len(asked)} | " + " | ".join(shares) + " |")
