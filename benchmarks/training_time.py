"""How long a LoRA step takes at each bit width: measured on a small model, and the 7B's operations: Markdown tables.

    python benchmarks/training_time.py

Measures gradients of two samples at granularities 36, 72 and 144 with the golden checkpoint's language model, in one
run, medians of three after one that warms up. Features are computed beforehand: the vision tower is frozen.

The count is of the language model, from the prefill TFLOP of the reference for one 672×672 image with 60 text tokens.
The backward pass of LoRA costs about as much as the forward pass: gradients of inputs, none of weights. Gradient
checkpointing adds one more forward pass. Bit widths do not change the count: quantized weights are multiplied as
they are, and get no gradients.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
from rglf_cost import GOLDEN, PREFILL_TFLOP, write_data, write_stage3

from avg_mlx import Quantization, convert, load
from avg_mlx.training import instruct
from avg_mlx.training.data import read_samples
from avg_mlx.training.loop import step_gradients
from avg_mlx.weights.adapters import AdapterConfig

WIDTHS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "8 bits": {"quantization": Quantization(bits=8, group_size=32)},
    "4 bits": {"quantization": Quantization(bits=4, group_size=32)},
}
SAMPLES = 2
REPEATS = 3


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        write_stage3(home / "checkpoint")
        data = write_data(home / "data.json")
        seconds = {}
        for i, (width, options) in enumerate(WIDTHS.items()):
            convert(home / "checkpoint", home / str(i), **options)
            seconds[width] = step_seconds(home / str(i), data)
    print("| language model in | seconds a sample | of float32 |\n|---|---|---|")
    for width, value in seconds.items():
        print(f"| {width} | {value:.2f} | {value / seconds['float32']:.0%} |")
    print("\n| a sample of the 7B, all granularities | TFLOP |\n|---|---|")
    forward = sum(PREFILL_TFLOP.values())
    print(f"| LoRA | {2 * forward:.0f} |\n| LoRA with `--grad-checkpoint` | {3 * forward:.0f} |")


def step_seconds(model_folder: Path, data: Path) -> float:
    """Seconds for a sample's part in a step."""
    model, tokenizer = load(model_folder)
    samples = read_samples(data, GOLDEN, tokenizer, model.config)[:SAMPLES]
    config = AdapterConfig("lora", -1, {"rank": 8, "scale": 20.0, "dropout": 0.0})
    trainable = instruct.Trainable()
    instruct.prepare(model, config, trainable, grad_checkpoint=False)
    task = instruct.InstructTask(model, samples, [], trainable, micro_batch=SAMPLES)
    everything = range(SAMPLES)
    times = []
    for _ in range(1 + REPEATS):
        losses = list(task.micro_losses(everything, everything, step=1))  # the vision tower runs here
        start = time.perf_counter()
        mx.eval(step_gradients(model, losses, mx.distributed.init()))
        times.append((time.perf_counter() - start) / SAMPLES)
    return statistics.median(times[1:])


if __name__ == "__main__":
    main()
