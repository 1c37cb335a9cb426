"""Does this machine's GPU compute what the reference does? One Markdown report to paste into an issue.

    make metal-check                                          # on a Mac; the bench has 301 M random weights in float16
    python benchmarks/metal_check.py --random-weights 7b -q   # the bench has the released shapes in 4 bits

It runs on MLX's default device, which is the GPU where there is one, and says which that was:

- parity: the golden checkpoint in float32, float16 and bfloat16 against the reference's numbers, within the bounds of
  tests/test_golden.py and tests/test_half_precision.py.
- types: the dtype that leaves each stage, which must be the one that was asked for.
- memory: MLX's arrays while the golden questions are answered, and afterwards.
- bench: what `avg-mlx bench` prints for random weights.

The exit status is 1 if a line of parity or types fails, or if the bench does. Progress goes to standard error.
"""

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import mlx.core as mx
import numpy as np
from divergence import CASES, GOLDEN, REFERENCE, as_numpy, equal_tokens
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from avg_mlx import convert, generate, load
from avg_mlx.inputs.image import make_crops
from avg_mlx.inputs.image_io import read_image
from avg_mlx.inputs.prompt import build_messages, encode_messages
from avg_mlx.markdown import table
from avg_mlx.model.router import text_filter
from avg_mlx.model.scaler import pool, pyramid


@dataclass(frozen=True)
class Bounds:
    """How far from the reference a dtype may be."""

    stages: float | None  # everything before the router, and the language model's input; None: shown, not judged
    router: float  # router logits
    logits: float  # the language model's last logits
    mean: float  # of the latter
    lead: float  # by how much the reference's best router logit may lead the second and still lose
    tokens: bool  # whether greedy answers must be equal


TF32 = "MLX_ENABLE_TF32"

Dtype = Literal["float32", "float16", "bfloat16"]

GRANULARITIES = (36, 72, 144, 288, 576)  # of the golden checkpoint and of random weights
EXACT = 1e-3  # of what does not depend on the model's dtype
BOUNDS: dict[Dtype, Bounds] = {
    "float32": Bounds(stages=1e-3, router=1e-4, logits=1e-3, mean=1e-3, lead=0, tokens=True),
    "float16": Bounds(stages=None, router=0.05, logits=0.05, mean=0.0125, lead=0.017, tokens=False),
    "bfloat16": Bounds(stages=None, router=0.4, logits=0.4, mean=0.1, lead=0.2, tokens=False),
}


@dataclass(frozen=True)
class Line:
    """What was found at one stage in one dtype."""

    found: str
    holds: bool | None = None  # None: shown, not judged

    def __str__(self) -> str:
        return {True: f"{self.found} ✓", False: f"**{self.found} ✗**", None: self.found}[self.holds]


@dataclass
class Findings:
    """What was found in one dtype, by stage."""

    parity: dict[str, Line] = field(default_factory=dict)
    types: dict[str, Line] = field(default_factory=dict)
    memory: dict[str, str] = field(default_factory=dict)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check this machine's GPU against the reference; print a report.")
    parser.add_argument("--random-weights", choices=("tiny", "300m", "1b", "7b"), default="tiny", help="of the bench")
    parser.add_argument("-q", "--quantize", action="store_true", help="run the bench with the language model in 4 bits")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="rounds of the bench (default: 3)")
    parser.add_argument("--cases", type=int, nargs="+", choices=range(len(CASES)), default=[*range(len(CASES))])
    parser.add_argument("--granularities", type=int, nargs="+", choices=GRANULARITIES, default=[*GRANULARITIES])
    args = parser.parse_args(arguments)
    environment = dict(os.environ)  # of the bench
    # MLX may multiply float32 with ten bits of mantissa where the GPU has products for that. Parity needs all 23.
    os.environ.setdefault(TF32, "0")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in BOUNDS:
            tell(f"parity in {dtype}")
            found[dtype] = check(Path(folder, dtype), dtype, args.cases, args.granularities)
    tell(f"bench, {args.random_weights}")
    options = ["--random-weights", args.random_weights, "--repeats", args.repeats, *["-q"] * args.quantize]
    bench, bench_ran = run_bench([*options, "--granularities", *args.granularities], environment)
    lines = [line for findings in found.values() for line in (*findings.parity.values(), *findings.types.values())]
    judged = [line.holds for line in lines if line.holds is not None]
    print(report(found, judged, bench, args.cases))
    return 0 if all(judged) and bench_ran else 1


def tell(what: str) -> None:
    print(f"metal-check: {what} …", file=sys.stderr, flush=True)


def check(folder: Path, dtype: Dtype, cases: Sequence[int], granularities: Sequence[int]) -> Findings:
    """Convert the golden checkpoint to `dtype` and see what it computes."""
    convert(GOLDEN / "checkpoint", folder, dtype=dtype)
    mx.clear_cache()
    before = mx.get_active_memory()
    model, tokenizer = load(folder)
    findings = Findings()
    findings.memory["weights"] = megabytes(mx.get_active_memory() - before)
    mx.reset_peak_memory()
    compare(findings, model, tokenizer, BOUNDS[dtype], cases, granularities)
    answer(findings, model, tokenizer, BOUNDS[dtype], cases, before)
    for stage, arrays in stages(model, tokenizer, cases[0]).items():
        names = sorted({str(array.dtype).rpartition(".")[2] for array in arrays})
        findings.types[stage] = Line(", ".join(names), names == [dtype])
    findings.memory["peak"] = megabytes(mx.get_peak_memory() - before)
    del model, arrays
    mx.clear_cache()
    findings.memory["held when the model is gone"] = megabytes(mx.get_active_memory() - before)
    return findings


def compare(
    findings: Findings, model: Any, tokenizer: Any, bounds: Bounds, cases: Sequence[int], granularities: Sequence[int]
) -> None:
    """Each stage's largest difference from the reference over the cases, and whether choices agree."""
    bound_of = {
        "prompt's ids": EXACT,
        "pixels": EXACT,
        "router logits": bounds.router,
        "last logits": bounds.logits,
        "last logits, mean": bounds.mean,
    }
    largest: dict[str, float] = defaultdict(float)
    choices = 0
    for case in cases:
        for stage, ours, reference in computed(model, tokenizer, case, granularities):
            found = as_numpy(ours)
            error = np.abs(found - reference) if found.shape == reference.shape else np.array([np.inf])
            largest[stage] = np.maximum(largest[stage], error.max())  # which keeps NaN, unlike max
            if stage == "last logits":
                largest[f"{stage}, mean"] = np.maximum(largest[f"{stage}, mean"], error.mean())
            if stage == "router logits":
                choices += agrees(found, reference, bounds.lead)
    for stage, difference in largest.items():
        bound = bound_of.get(stage, bounds.stages)
        if bound is None:
            findings.parity[stage] = Line(f"{difference:.2g}")
        else:
            holds = bool(difference < bound)
            findings.parity[stage] = Line(f"{difference:.2g} {'<' if holds else 'not <'} {bound:g}", holds)
    findings.parity["router's choice"] = Line(f"{choices} of {len(cases)}", choices == len(cases))


def computed(
    model: Any, tokenizer: Any, case: int, granularities: Sequence[int]
) -> Iterator[tuple[str, mx.array, np.ndarray]]:
    """What the model and the reference compute for a golden case, stage by stage."""

    def reference(name: str) -> np.ndarray:
        return REFERENCE[f"case{case}_{name}"]

    config = model.config
    coarsest = min(config.granularities)
    ids = encode_messages(tokenizer, build_messages(CASES[case]["prompt"], images=1))
    yield "prompt's ids", mx.array(ids), reference("input_ids")
    crops = make_crops(read_image(GOLDEN / CASES[case]["image"]), config)
    pixels = mx.array(crops.pixels.transpose(0, 3, 1, 2))
    yield "pixels", pixels[:, :, ::24, ::24], reference("pixel_values_sub")
    features, text = model.encode(crops), model.embed_text(ids)
    yield "features", features[:, ::31], reference("image_features_sub")
    yield "pooled features", pool(features, coarsest, config.vision.patch_grid), reference("coarsest_features")
    if features.dtype == mx.float32:  # rounding would reorder words that are about as similar
        kept = text_filter(text, features[0], config.filtered_text_num)
        yield "router's kept words", kept[:, :8], reference("filtered_text_sub")
    yield "router logits", model.route(features, text), reference("router_logits")
    embeddings = model.splice(ids, text, [model.pack(features, coarsest, crops)])
    yield "language model's input", embeddings[::3], reference("coarsest_inputs_embeds_sub")
    for granularity in granularities:
        embeddings = model.splice(ids, text, [model.pack(features, granularity, crops)])
        level = config.granularities.index(granularity)
        yield "last logits", model(embeddings[None])[0, -1], reference("last_logits")[level]


def agrees(logits: np.ndarray, reference: np.ndarray, lead: float) -> bool:
    """Whether the reference's choice is made, or its second where its lead is too small to tell."""
    best, second = np.argsort(-reference)[:2]
    decided = reference[best] - reference[second] > lead
    return int(logits.argmax()) in ([best] if decided else [best, second])


def answer(findings: Findings, model: Any, tokenizer: Any, bounds: Bounds, cases: Sequence[int], before: int) -> None:
    """Greedy answers against the reference's, and what stays in memory after each."""
    equal, held = [], []
    for case in cases:
        image, expected = GOLDEN / CASES[case]["image"], CASES[case]["token_ids"]
        tokens = list(generate(model, tokenizer, CASES[case]["prompt"], image, max_tokens=24).token_ids)
        equal.append((equal_tokens(tokens, expected), len(expected)))
        held.append(mx.get_active_memory() - before)
    whole = sum(same == length for same, length in equal)
    shown = ", ".join(f"{same}/{length}" for same, length in equal)
    findings.parity["greedy tokens"] = Line(shown, whole == len(cases) if bounds.tokens else None)
    findings.memory["held after an answer"] = f"{megabytes(min(held))} to {megabytes(max(held))}"


def stages(model: Any, tokenizer: Any, case: int) -> dict[str, list[mx.array]]:
    """What leaves each stage for a golden case, and for a token that follows it."""
    config = model.config
    crops = make_crops(read_image(GOLDEN / CASES[case]["image"]), config)
    ids = encode_messages(tokenizer, build_messages(CASES[case]["prompt"], images=1))
    tower, text = model.run_tower(crops), model.embed_text(ids)
    features = model.projector(tower)
    visual_tokens = model.pack(features, min(config.granularities), crops)
    embeddings = model.splice(ids, text, [visual_tokens])
    cache = make_prompt_cache(model.language_model)
    hidden = model.hidden(embeddings[None], cache)
    found = {
        "weights": floats_of(model.parameters()),
        "vision tower": [tower],
        "features": [features],
        "pyramid": [pyramid(features, config.granularities, config.vision.patch_grid)],
        "router logits": [model.route(features, text)],
        "visual tokens": [visual_tokens],
        "text": [text],
        "embeddings": [embeddings],
        "hidden states": [hidden],
        "logits": [model.head(hidden[:, -1:])],
        "next logits": [model.language_model(mx.array([[9]]), cache=cache)],
        "KV cache": floats_of([layer.state for layer in cache]),
    }
    mx.eval([array for arrays in found.values() for array in arrays])
    return found


def floats_of(tree: Any) -> list[mx.array]:
    """Arrays of numbers, as packed weights are not."""
    arrays = cast(dict[str, Any], tree_flatten(tree, destination={})).values()
    return [x for x in arrays if isinstance(x, mx.array) and mx.issubdtype(x.dtype, mx.floating)]


def run_bench(options: Sequence[object], environment: Mapping[str, str]) -> tuple[str, bool]:
    """What `avg-mlx bench` prints, and whether it could."""
    command = [sys.executable, "-m", "avg_mlx", "bench", *map(str, options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return (done.stdout.rstrip(), True) if done.returncode == 0 else (f"**{done.stderr.strip()}**", False)


def report(found: Mapping[Dtype, Findings], judged: Sequence[bool], bench: str, cases: Sequence[int]) -> str:
    failed = len(judged) - sum(judged)
    which = "all golden cases" if len(cases) == len(CASES) else f"golden cases {', '.join(map(str, cases))}"
    return f"""\
# Metal check: {device_name()}

{len(judged)} results of parity and types were judged. {f"**{failed} fail.**" if failed else "All hold."}

{table(("", ""), about().items(), left=2)}

## Parity

The largest difference from the reference over {which}, and the bound below which it must stay where there is one.
The router's choice may be the reference's second where its lead is smaller than half precision can tell.
Greedy tokens: how many come before the first that differs.

{by_dtype({dtype: findings.parity for dtype, findings in found.items()})}

## Types

{by_dtype({dtype: findings.types for dtype, findings in found.items()})}

## Memory

MLX's arrays while the golden model was at work, without MLX's cache of free buffers.

{by_dtype({dtype: findings.memory for dtype, findings in found.items()})}

The process itself took {megabytes(largest_size())} at most, the bench not included.

## Bench

{bench}"""


def by_dtype(columns: Mapping[str, Mapping[str, object]]) -> str:
    """A row for each stage, a column for each dtype; a dash where a stage was not looked at."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [(name, *(column.get(name, "–") for column in columns.values())) for name in names]
    return table(("", *columns), rows, left=1 + len(columns))


def about() -> dict[str, str]:
    """The machine and the versions."""
    info = mx.device_info()
    mac = platform.mac_ver()[0]
    system = f"macOS {mac}" if mac else f"{platform.system()} {platform.release()}"
    memory = [f"{int(info[key]) / 1e9:.1f} GB {what}" for key, what in MEMORY_KEYS.items() if key in info]
    versions = [f"{name} {version(name)}" for name in ("avg-mlx", "mlx", "mlx-lm", "numpy")]
    return {
        "MLX's default device": f"{mx.default_device()}: {device_name()}",
        "memory": ", ".join(memory) or "not told by MLX",
        "system": f"{system}, {platform.machine()}",
        "versions": ", ".join([*versions, f"Python {platform.python_version()}"]),
        "commit": commit(),
        TF32: f"{os.environ[TF32]}, but for the bench",
    }


MEMORY_KEYS = {
    "memory_size": "in all",
    "total_memory": "in all",
    "max_recommended_working_set_size": "recommended for the GPU",
}


def device_name() -> str:
    kind = "CPU"
    if mx.default_device().type == mx.DeviceType.gpu:
        kind = "Metal" if mx.metal.is_available() else "CUDA"
    return f"{mx.device_info()['device_name']} ({kind})"


def commit() -> str:
    """The checked-out commit, and whether files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"


def largest_size() -> int:
    """Bytes; macOS counts in bytes, Linux in KiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


if __name__ == "__main__":
    sys.exit(main())
