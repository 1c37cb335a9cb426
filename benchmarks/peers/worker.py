"""One contestant in a process of its own: answers as often as it is told to, and says how long that took.

    python worker.py avg-mlx|mlx-vlm|mlx-lm FOLDER

Reads tasks from standard input and writes results to standard output, both one JSON object a line.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

Task = dict[str, Any]  # context, granularity, decode_tokens: as far as the contestant heeds them
Run = Callable[[Task], Iterator[int]]  # yields for every token, with the last how many positions were prefilled


def main() -> None:
    kind, home = sys.argv[1], Path(sys.argv[2])
    with os.fdopen(os.dup(1), "w") as results:
        os.dup2(2, 1)  # whatever else prints
        run = {"avg-mlx": avg_mlx, "mlx-vlm": mlx_vlm, "mlx-lm": mlx_lm}[kind](home)
        for line in sys.stdin:
            print(json.dumps(measure(run, json.loads(line))), file=results, flush=True)


def measure(run: Run, task: Task) -> dict[str, float]:
    """From the call to the first token, and from there to the last."""
    mx.clear_cache()
    mx.reset_peak_memory()
    start = time.perf_counter()
    tokens = [(positions, time.perf_counter() - start) for positions in run(task)]
    (_, first), (positions, last) = tokens[0], tokens[-1]
    return {
        "positions": positions,
        "time_to_first_token": first,
        "decode_tokens_per_second": (len(tokens) - 1) / (last - first),
        "peak_memory_gb": mx.get_peak_memory() / 1e9,
    }


def avg_mlx(home: Path) -> Run:
    """Granularity forced, or, where the task says so, found best by the router."""
    import avg_mlx
    from avg_mlx.bench.measure import steered

    model, tokenizer = avg_mlx.load(home / "ours")
    tokenizer.eos_token_ids = ()
    question, image = (home / "question.txt").read_text(), str(home / "image.jpg")

    def run(task: Task) -> Iterator[int]:
        granularity, limit = task["granularity"], task["decode_tokens"] + 1
        routed = task["routed"]
        with steered(model, granularity) if routed else contextlib.nullcontext():
            for segment in avg_mlx.stream_generate(
                model, tokenizer, question, image, granularity="auto" if routed else granularity, max_tokens=limit
            ):
                yield segment.answer.prompt_tokens if segment.answer else 0

    return run


def mlx_vlm(home: Path) -> Run:
    """The same words and image; it has one granularity, and lays no crops out."""
    from mlx_vlm import load, stream_generate
    from mlx_vlm.models.cache import make_prompt_cache

    model, processor = load(str(home / "theirs"))
    processor.tokenizer.stopping_criteria = lambda token: False
    messages = [{"role": "user", "content": f"<image> {(home / 'question.txt').read_text()}"}]
    prompt = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    image = str(home / "image.jpg")

    def run(task: Task) -> Iterator[int]:
        cache = make_prompt_cache(model.language_model)
        tokens = 0
        limit = task["decode_tokens"] + 1
        for result in stream_generate(model, processor, prompt, image, max_tokens=limit, prompt_cache=cache):
            if result.generation_tokens > tokens:
                tokens = result.generation_tokens
                yield cache[0].offset - tokens  # it is a token ahead, which is not in the prompt either

    return run


def mlx_lm(home: Path) -> Run:
    """The language model alone, on as many positions as the task says."""
    from mlx_lm.generate import generate_step
    from mlx_lm.models import llama

    keys = json.loads((home / "ours" / "config.json").read_text(encoding="utf-8"))
    model = llama.Model(llama.ModelArgs.from_dict({**keys, "model_type": "llama", "tie_word_embeddings": False}))
    prefix = "language_model."
    tensors = cast(dict[str, mx.array], mx.load(str(home / "ours" / "model.safetensors")))
    model.load_weights([(n.removeprefix(prefix), a) for n, a in tensors.items() if n.startswith(prefix)])
    mx.eval(model.parameters())
    del tensors

    def run(task: Task) -> Iterator[int]:
        prompt = mx.arange(task["context"]) % 100  # of any vocabulary
        for _ in generate_step(prompt, model, max_tokens=task["decode_tokens"] + 1):
            yield task["context"]

    return run


if __name__ == "__main__":
    main()
