"""What is not computed twice, and what is released: Markdown tables.

    python benchmarks/serving.py questions    # a second question about the same image, in a ChatSession
    python benchmarks/serving.py batch        # eight questions together, against one by one
    python benchmarks/serving.py memory       # 200 answers in one process

All run on random weights, which --random-weights and --dtype choose.
"""

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

import mlx.core as mx

from avg_mlx import Answer, ChatSession, Request, generate, generate_batch
from avg_mlx.bench.measure import prompt_of, steered, synthetic_image
from avg_mlx.bench.presets import random_model, word_tokenizer
from avg_mlx.errors import AvgMlxError
from avg_mlx.inputs.tokenizer import Tokenizer
from avg_mlx.markdown import table
from avg_mlx.model.avg_llava import Model

FINEST, COARSEST = 576, 36
ANSWERS, TENTH = 200, 10
SIZES = ((800, 600), (336, 336), (600, 800), (1000, 300), (640, 480))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what is reused, and what is released.")
    parser.add_argument("what", choices=("questions", "batch", "memory"))
    parser.add_argument("--random-weights", choices=("tiny", "300m", "1b", "7b"), help="300m, for memory tiny")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    model = random_model(args.random_weights or ("tiny" if args.what == "memory" else "300m"), args.dtype)
    tokenizer = word_tokenizer(model.config.vocab_size)
    tokenizer.eos_token_ids = ()
    print(f"{mx.default_device()}, {args.dtype}\n")
    if args.what == "questions":
        compare_questions(model, tokenizer, args.repeats)
    elif args.what == "batch":
        compare_batch(model, tokenizer, args.repeats)
    else:
        watch_memory(model, tokenizer)


def compare_questions(model: Model, tokenizer: Tokenizer, repeats: int) -> None:
    """Ask twice at the finest granularity and twice at the coarsest, in the same session."""
    prompt, image = prompt_of(tokenizer, 60), synthetic_image(800, 600)
    rows: dict[str, list[Answer]] = {}
    for n in range(1 + repeats):
        session = ChatSession(model, tokenizer)

        def ask(granularity: int, image: bytes | None = None, session: ChatSession = session) -> Answer:
            with steered(model, granularity):
                *_, last = session.ask(prompt, image, max_tokens=16)
            assert last.answer
            return last.answer

        answers = {
            f"first question, at {FINEST}": ask(FINEST, image),
            f"second question, at {FINEST}": ask(FINEST),
            f"third question, at {COARSEST}": ask(COARSEST),
            f"fourth question, at {COARSEST}": ask(COARSEST),
        }
        for row, answer in answers.items():
            if n:
                rows.setdefault(row, []).append(answer)
    counted, timed = (
        ["images seen", "routed", "positions prefilled", "reused"],
        ["vision", "prefill", "time to first token"],
    )
    cells = []
    for row, asked in rows.items():
        c = asked[0].counters
        seconds = (f"{median(asked, what.replace(' ', '_')):.3f}" for what in timed)
        cells.append([row, c.vision_calls, c.router_calls, c.prefilled, c.reused, *seconds])
    print(table(["", *counted, *(f"{what}, s" for what in timed)], cells))


def median(answers: list[Answer], what: str) -> float:
    """The median of one of the answers' timings."""
    return statistics.median(float(getattr(answer.timings, what)) for answer in answers)


def compare_batch(model: Model, tokenizer: Tokenizer, repeats: int) -> None:
    """Ask eight questions of different lengths about five images, at all granularities, with answers of 32 tokens."""
    images, granularities = [synthetic_image(*size) for size in SIZES], sorted(model.config.granularities)
    requests = [
        Request(prompt_of(tokenizer, 40 + 5 * n), images[n % 5], granularities[3 * n % 5], max_tokens=32)
        for n in range(8)
    ]
    ways: dict[str, Callable[[], Sequence[Answer | AvgMlxError]]] = {
        "one by one": lambda: [generate(model, tokenizer, **asdict(request)) for request in requests],
        "together": lambda: generate_batch(model, tokenizer, requests),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    texts = {}
    for n in range(1 + repeats):
        for way, run in ways.items():
            start = time.perf_counter()
            texts[way] = [answer.token_ids for answer in run() if isinstance(answer, Answer)]
            if n:
                seconds[way].append(time.perf_counter() - start)
    rows = [
        [way, f"{statistics.median(times):.2f}", f"{min(times):.2f} to {max(times):.2f}"]
        for way, times in seconds.items()
    ]
    print(table(["eight questions", "seconds, median", "least to most"], rows))
    same = sum(a == b for a, b in zip(*texts.values(), strict=True))
    print(f"\n{same} of {len(requests)} answers are identical, token for token.")


def watch_memory(model: Model, tokenizer: Tokenizer) -> None:
    """Watch the peaks of MLX's arrays and of the process, while images and granularities take turns."""
    prompt, images = prompt_of(tokenizer, 60), [synthetic_image(*size) for size in SIZES]
    granularities = sorted(model.config.granularities)
    peaks, rows = [], []
    for start in range(0, ANSWERS, TENTH):
        mx.reset_peak_memory()
        for n in range(start, start + TENTH):
            # Every ten answers pass the same images at the same granularities, the finest among them.
            with steered(model, granularities[n % len(granularities)]):
                generate(model, tokenizer, prompt, images[n // 2 % len(images)], max_tokens=8)
        peaks.append(mx.get_peak_memory())
        sizes = (peaks[-1], mx.get_active_memory(), process_peak())
        rows.append([f"{start + 1}–{start + TENTH}", *(f"{size / 1e6:.1f}" for size in sizes)])
    header = ["answers", "peak of arrays, MB", "held after the last, MB", "peak of the process so far, MB"]
    print(table(header, rows))
    print(f"\nThe last ten's peak is {peaks[-1] / peaks[0]:.2%} of the first ten's.")


def process_peak() -> int:
    """The most bytes of resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
