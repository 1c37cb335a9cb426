"""What is not arithmetic: importing, and the part of the time to the first token that no MLX kernel accounts for.

    python benchmarks/overhead.py import     # seconds of `import avg_mlx`, and what it loads
    python benchmarks/overhead.py kernels    # the share outside MLX's kernels of the time to the first token

`kernels` runs `avg_mlx.generate` on random weights and an image file, as `avg-mlx generate` does, and counts the time
inside mx.eval and mx.async_eval as the kernels': on a CPU the second one waits too while many are under way. All else,
from reading the prompt and decoding the image to building graphs, is outside. Parsing arguments is measured separately
and added. Loading weights and importing libraries happen once in a process, and are left out.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what is not arithmetic.")
    parser.add_argument("what", choices=("import", "kernels"))
    parser.add_argument("--random-weights", choices=("tiny", "300m", "1b", "7b"), default="300m")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float32")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    args = parser.parse_args()
    if args.what == "import":
        measure_import(args.repeats)
    else:
        measure_kernels(args.random_weights, args.dtype, args.repeats)


def measure_import(repeats: int) -> None:
    """Time imports, each in a fresh interpreter, without Python's own start."""
    code = (
        "import sys, time; start = time.perf_counter(); import avg_mlx; seconds = time.perf_counter() - start; "
        "print(seconds, *sorted({'mlx', 'mlx_lm', 'numpy', 'transformers', 'PIL'} & set(sys.modules)))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
        for _ in range(repeats)
    ]
    seconds = [float(run[0]) for run in runs]
    loaded = ", ".join(runs[0][1:]) or "none of mlx, mlx_lm, numpy, PIL and transformers"
    print(f"import avg_mlx: {statistics.median(seconds):.3f} s (up to {max(seconds):.3f}), median of {repeats}")
    print(f"It loads {loaded}.")


def measure_kernels(weights: str, dtype: str, repeats: int) -> None:
    """Print how much of the time to the first token passes outside MLX's kernels."""
    import mlx.core as mx

    from avg_mlx import generate
    from avg_mlx.bench.measure import prompt_of, steered, synthetic_image
    from avg_mlx.bench.presets import random_model, word_tokenizer
    from avg_mlx.cli.generate import build_parser
    from avg_mlx.markdown import table

    model = random_model(weights, dtype)
    tokenizer = word_tokenizer(model.config.vocab_size)
    prompt = prompt_of(tokenizer, 60)
    waited = 0.0

    def timed(evaluate: Callable[..., None]) -> Callable[..., None]:
        def clocked(*arrays: Any) -> None:
            nonlocal waited
            start = time.perf_counter()
            evaluate(*arrays)
            waited += time.perf_counter() - start

        return clocked

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image.jpg"
        image.write_bytes(synthetic_image(800, 600))
        words = ["--image", str(image), "--prompt", prompt, "--max-tokens", "1"]
        start = time.perf_counter()
        build_parser("generate").parse_args(words)
        parsing = time.perf_counter() - start
        mx.eval, mx.async_eval = timed(mx.eval), timed(mx.async_eval)
        for granularity in sorted(model.config.granularities):
            runs = []
            for _ in range(1 + repeats):
                waited = 0.0
                with steered(model, granularity):
                    answer = generate(model, tokenizer, prompt, str(image), max_tokens=1)
                total = parsing + answer.timings.time_to_first_token
                runs.append((total, total - waited))
            total, outside = (statistics.median(column) for column in zip(*runs[1:], strict=True))
            rows.append([granularity, f"{total:.3f}", f"{outside:.3f}", f"{outside / total:.1%}"])
    print(table(["tokens per crop", "time to first token, s", "outside kernels, s", "share"], rows))


if __name__ == "__main__":
    main()
