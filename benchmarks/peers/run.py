"""This project against mlx-vlm's `llava_next` and a bare mlx-lm Llama, with the same random weights: Markdown tables.

    python benchmarks/peers/run.py                                      # 300m in float32, for a CPU
    python benchmarks/peers/run.py --random-weights 7b --dtype float16  # where there is room for it

Installs its own environment into build/peers (requirements.txt beside this file) and needs nothing but Python 3.11. All
get an image of 800×600 and 60 text tokens; each runs in a process of its own and they take turns, so that whatever else
the machine does hits all alike. The Llama gets prompts as long as this project's, to compare decoding at equal context.
The last table is of one checkpoint in the Hub's layout: what both make of it, against transformers in float32.

On Linux the CPU backend is much faster with OpenBLAS: LD_PRELOAD=libopenblas.so.0 before the command.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
ENVIRONMENT = ROOT / "build" / "peers"
REQUIREMENTS = HERE / "requirements.txt"
FINEST, COARSEST = 576, 36

OURS_FINEST = f"avg-mlx, {FINEST} tokens per crop"
OURS_COARSEST = f"avg-mlx, {COARSEST} tokens per crop, by the router"
THEIRS = "mlx-vlm, llava_next"
BARE_FINEST = "mlx-lm, the Llama alone, the first row's context"
BARE_COARSEST = "mlx-lm, the Llama alone, the second row's context"

Result = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare with mlx-vlm and mlx-lm on the same random weights.")
    parser.add_argument("--random-weights", choices=("tiny", "300m", "1b", "7b"), default="300m")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--decode-tokens", type=int, default=64)
    parser.add_argument("--output", type=Path, help="file for the table, too")
    args = parser.parse_args()
    if args.output and not args.output.parent.is_dir():
        parser.error(f"there is no folder {args.output.parent} for --output; make it, or name another")
    python = environment()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, HERE / "folders.py", args.random_weights, args.dtype, folder], check=True)
        weights_gb = (Path(folder) / "ours" / "model.safetensors").stat().st_size / 1e9
        results = take_turns(python, folder, args.repeats, args.decode_tokens)
        exactness = compare_logits(python, Path(folder))
    about = f"{args.random_weights}, {args.dtype}, medians (least–most) of {args.repeats} after one to warm up."
    text = f"{table(results)}\n\n{ratios(results, weights_gb)}\n\n{exactness}\n\n{about}"
    print(text)
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")


def environment() -> Path:
    """The Python of a virtual environment with the requirements and this project."""
    python = ENVIRONMENT / "bin" / "python"
    installed = ENVIRONMENT / "requirements.txt"
    if not installed.exists() or installed.read_text() != REQUIREMENTS.read_text():
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        what = ["-r", str(REQUIREMENTS), "--editable", str(ROOT)]
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *what], check=True, stdout=sys.stderr)
        installed.write_text(REQUIREMENTS.read_text())
    return python


class Worker:
    """A contestant's process."""

    def __init__(self, python: Path, kind: str, folder: str):
        self.kind = kind
        command = [str(python), str(HERE / "worker.py"), kind, folder]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, **task: Any) -> Result:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        print(json.dumps(task), file=stdin, flush=True)
        answer = stdout.readline()
        if not answer:
            sys.exit(f"{self.kind} ended with status {self.process.wait()}")
        return json.loads(answer)

    def stop(self) -> None:
        self.process.communicate()


def take_turns(python: Path, folder: str, repeats: int, decode_tokens: int) -> dict[str, list[Result]]:
    """The results of each row of the table."""
    ours, theirs, bare = (Worker(python, kind, folder) for kind in ("avg-mlx", "mlx-vlm", "mlx-lm"))
    results: dict[str, list[Result]] = {}
    for n in range(1 + repeats):
        finest = ours(granularity=FINEST, routed=False, decode_tokens=decode_tokens)
        coarsest = ours(granularity=COARSEST, routed=True, decode_tokens=decode_tokens)
        one_round = {
            OURS_FINEST: finest,
            OURS_COARSEST: coarsest,
            THEIRS: theirs(decode_tokens=decode_tokens),
            BARE_FINEST: bare(context=finest["positions"], decode_tokens=decode_tokens),
            BARE_COARSEST: bare(context=coarsest["positions"], decode_tokens=decode_tokens),
        }
        print(f"round {n} of {repeats} done" if n else "warmed up", file=sys.stderr)
        for row, result in one_round.items():
            if n:
                results.setdefault(row, []).append(result)
    for worker in (ours, theirs, bare):
        worker.stop()
    return results


def compare_logits(python: Path, folder: Path) -> str:
    """How far the last position's logits are from transformers'."""
    found = {}
    for kind in ("transformers", "mlx-vlm", "avg-mlx"):
        subprocess.run([python, HERE / "exact.py", kind, folder], check=True, stdout=sys.stderr)
        found[kind] = json.loads((folder / f"{kind}.json").read_text())
    expected = found["transformers"]["logits"]
    largest = max(map(abs, expected))
    rows = ["| the same `llava_next` checkpoint | positions | largest difference of a logit |", "|---|---|---|"]
    for kind, one in found.items():
        difference = max(abs(x - y) for x, y in zip(one["logits"], expected, strict=True))
        rows.append(f"| {kind} | {one['positions']} | {difference:.2g} of {largest:.2g} |")
    return "\n".join(rows)


def median(results: list[Result], what: str) -> float:
    return statistics.median(result[what] for result in results)


def table(results: dict[str, list[Result]]) -> str:
    rows = ["| | positions | time to first token, s | decode tokens/s | peak memory, GB |", "|---|---|---|---|---|"]
    for row, runs in results.items():
        first = "" if row in (BARE_FINEST, BARE_COARSEST) else spread(runs, "time_to_first_token")
        memory = "" if not first else f"{median(runs, 'peak_memory_gb'):.2f}"
        decode = spread(runs, "decode_tokens_per_second")
        rows.append(f"| {row} | {runs[0]['positions']:.0f} | {first} | {decode} | {memory} |")
    return "\n".join(rows)


def spread(runs: list[Result], what: str) -> str:
    values = [run[what] for run in runs]
    return f"{statistics.median(values):.3g} ({min(values):.3g}–{max(values):.3g})"


def ratios(results: dict[str, list[Result]], weights_gb: float) -> str:
    """What the rows say of each other."""
    columns = ["time to first token", "peak memory", f"what the weights' {weights_gb:.2f} GB leave of it"]
    rows = [f"| mlx-vlm's, over avg-mlx's | {' | '.join(columns)} |", "|---|---|---|---|"]
    for ours in (OURS_FINEST, OURS_COARSEST):
        time, memory, rest = (
            (median(results[THEIRS], what) - less) / (median(results[ours], what) - less)
            for what, less in (("time_to_first_token", 0), ("peak_memory_gb", 0), ("peak_memory_gb", weights_gb))
        )
        rows.append(f"| {ours} | ×{time:.2f} | ×{memory:.2f} | ×{rest:.2f} |")
    rows += ["", "| decode tokens/s, over the Llama's alone | |", "|---|---|"]
    for ours, bare in ((OURS_FINEST, BARE_FINEST), (OURS_COARSEST, BARE_COARSEST)):
        what = "decode_tokens_per_second"
        rows.append(f"| {ours} | {median(results[ours], what) / median(results[bare], what):.1%} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
