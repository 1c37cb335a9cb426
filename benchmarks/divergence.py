"""How far half-precision and quantized models are from the reference on the golden cases: two Markdown tables.

    python benchmarks/divergence.py

The first table compares with the reference's numbers. The second one has more router decisions than six: it asks every
golden question about every golden image, and compares with the float32 model. This takes minutes on a CPU.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product, takewhile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from avg_mlx import Quantization, convert, generate, load
from avg_mlx.inputs.image import make_crops
from avg_mlx.inputs.image_io import read_image
from avg_mlx.inputs.tokenizer import Tokenizer
from avg_mlx.markdown import table
from avg_mlx.model.avg_llava import Model

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text())["cases"]
REFERENCE = np.load(GOLDEN / "reference.npz")

# Conversions, one after the other. Quantized models keep float32 elsewhere, to show the quantization alone.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "float32": [{"dtype": "float32"}],
    "float16": [{"dtype": "float16"}],
    "bfloat16": [{"dtype": "bfloat16"}],
    "bfloat16 weights, float32 arithmetic": [{"dtype": "bfloat16"}, {"dtype": "float32"}],
    "8 bits": [{"quantization": Quantization(8, 32)}],
    "6 bits": [{"quantization": Quantization(6, 32)}],
    "4 bits": [{"quantization": Quantization(4, 32)}],
    "4 bits, vision and router 8": [{"quantization": Quantization(4, 32, vision_bits=8, router_bits=8)}],
}


@dataclass(frozen=True)
class Outcome:
    """What a model computes for the golden images and prompts; case i asks prompt i about image i."""

    router_logits: np.ndarray  # (images, prompts, granularities)
    last_logits: np.ndarray  # (cases, granularities, vocabulary), each granularity forced
    tokens: list[list[int]]  # of each case: greedy, adaptive


def main() -> None:
    outcomes = {}
    with tempfile.TemporaryDirectory() as folder:
        for label, conversions in VARIANTS.items():
            source = GOLDEN / "checkpoint"
            for i, options in enumerate(conversions):
                destination = Path(folder, f"{label} {i}")
                convert(source, destination, **options)
                source = destination
            outcomes[label] = observe(*load(source))
    compare_with_reference(outcomes)
    print()
    compare_decisions(outcomes)


def observe(model: Model, tokenizer: Tokenizer) -> Outcome:
    """Compute what is compared."""
    config, cases = model.config, range(len(CASES))
    images = [GOLDEN / case["image"] for case in CASES]
    crops = [make_crops(read_image(image), config) for image in images]
    features = [model.encode(c) for c in crops]
    ids = [REFERENCE[f"case{i}_input_ids"].tolist() for i in cases]
    texts = [model.embed_text(prompt) for prompt in ids]

    def last_logits(i: int, granularity: int) -> np.ndarray:
        visual_tokens = model.pack(features[i], granularity, crops[i])
        return as_numpy(model(model.splice(ids[i], texts[i], [visual_tokens])[None])[0, -1])

    def tokens(i: int) -> list[int]:
        return list(generate(model, tokenizer, CASES[i]["prompt"], images[i], max_tokens=24).token_ids)

    router_logits = np.stack([as_numpy(model.route(f, text)) for f, text in product(features, texts)])
    return Outcome(
        router_logits.reshape(len(images), len(texts), -1),
        np.stack([[last_logits(i, g) for g in config.granularities] for i in cases]),
        [tokens(i) for i in cases],
    )


def compare_with_reference(outcomes: Mapping[str, Outcome]) -> None:
    cases = range(len(CASES))
    expected = np.stack([REFERENCE[f"case{i}_router_logits"] for i in cases])
    expected_last = np.stack([REFERENCE[f"case{i}_last_logits"] for i in cases])
    header = ["", "choice", "router logits, max", "last logits, max", "mean", "top token", "lead lost", "equal tokens"]
    rows = []
    for label, outcome in outcomes.items():
        router = outcome.router_logits[cases, cases]
        error = np.abs(outcome.last_logits - expected_last)
        rows.append(
            [
                label,
                agreement(router, expected),
                f"{np.abs(router - expected).max():.4f}",
                f"{error.max():.4f}",
                f"{error.mean():.4f}",
                agreement(outcome.last_logits, expected_last),
                widest_lead_lost(outcome.last_logits, expected_last),
                ", ".join(str(equal_tokens(outcome.tokens[i], CASES[i]["token_ids"])) for i in cases),
            ]
        )
    print(table(header, rows))
    print(
        f"\nThe reference: {', '.join(str(len(case['token_ids'])) for case in CASES)} tokens; its last logits have a "
        f"standard deviation of {expected_last.std():.2f}, and the top one a median lead of "
        f"{np.median(lead(expected_last, expected_last)):.2f}."
    )


def compare_decisions(outcomes: Mapping[str, Outcome]) -> None:
    expected = outcomes["float32"].router_logits
    rows = []
    for label, outcome in outcomes.items():
        logits = outcome.router_logits
        rows.append(
            [
                label,
                agreement(logits, expected),
                f"{np.abs(logits - expected).max():.4f}",
                f"{np.abs(lead(logits, expected) - lead(expected, expected)).max():.4f}",
                widest_lead_lost(logits, expected),
            ]
        )
    print(table(["", "choice", "router logits, max", "change of the lead, max", "lead lost"], rows))


def as_numpy(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32))


def agreement(logits: np.ndarray, expected: np.ndarray) -> str:
    """Count how often the largest logit is the expected one."""
    same = logits.argmax(-1) == expected.argmax(-1)
    return f"{same.sum()} of {same.size}"


def lead(logits: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The lead of the logit that is expected to be the largest over the one that is expected to come second."""
    order = np.argsort(expected, axis=-1)[..., -2:]
    second, first = np.moveaxis(np.take_along_axis(logits, order, axis=-1), -1, 0)
    return first - second


def widest_lead_lost(logits: np.ndarray, expected: np.ndarray) -> str:
    """The widest expected lead where another logit is the largest."""
    lost = lead(expected, expected)[logits.argmax(-1) != expected.argmax(-1)]
    return f"{lost.max():.4f}" if lost.size else "none"


def equal_tokens(tokens: list[int], expected: list[int]) -> int:
    """Count the tokens before the first that differs."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(tokens, expected, strict=False)))


if __name__ == "__main__":
    main()
