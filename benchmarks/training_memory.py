"""The memory that fine-tuning a published 7B takes, counted from its shapes: Markdown tables. No weights are made.

    python benchmarks/training_memory.py            # AVG-LLaVA, a 672×672 photo and 60 text tokens
    python benchmarks/training_memory.py --checkpoint llava-v1.6-mistral-7b-hf   # and the least time on Apple's chips
    python benchmarks/training_memory.py --measure  # the activation formula against small models

Trained tensors (LoRA layers and the router, in float32) take five times their bytes: themselves, the sum of gradients,
a micro-batch's gradient and AdamW's two moments.

Activations of one sample of N positions, in a bfloat16 language model of L blocks, width D, feed-forward width I and H
heads, none of them shared: where heads share keys, it is an upper bound. For the backward pass each block keeps, per
position: its input, two normalized inputs, the attention's queries, keys, values and output and the residual (8 D),
five arrays of the feed-forward (gate, its sigmoid and SiLU, up, product: 5 I) and a row of attention weights for each
head (H N: MLX differentiates attention unfused); besides, in float32, what enters the seven LoRA layers (6 D + I) and
their low-rank products (7 r).

    block       = N (2 (8 D + 5 I + H N) + 4 (6 D + I + 7 r)) bytes
    peak        = L block + 6 H N²            the last term while a block's attention is differentiated
    checkpoint  = 4 L N D + block + 6 H N²    only the blocks' ends are kept, one block at a time is computed again

The head runs on answer positions only, and its logits are not counted.

Time: forward and backward are two passes through the language model, since its own weights get no gradients, and three
with checkpoints; feedback is one. A pass takes as long as its operations at the chip's peak rate, or its weights at the
peak bandwidth. Real runs reach only a part of both.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from full_size import AVG_LLAVA, CONFIGS
from predictions import CHIPS

from avg_mlx.bench.cost import PARTS, Cost, Work
from avg_mlx.config import KNOWN_TOWERS, Config
from avg_mlx.markdown import table
from avg_mlx.model.avg_llava import Model
from avg_mlx.model.inventory import parts_of
from avg_mlx.training import instruct, rglf
from avg_mlx.weights.adapters import AdapterConfig, trained_tensors
from avg_mlx.weights.checkpoint import build_model
from avg_mlx.weights.hub import translated
from avg_mlx.weights.quantization import Quantization

GB = 1e9
BF16, FLOAT32 = 2, 4  # bytes
COPIES = 5  # a trained tensor, its gradient twice, two moments
RANK = 8
TEXT_TOKENS = 60
IMAGE_SIZE = (672, 672)
WIDTHS: dict[str, int | None] = {"bf16": None, "8 bits": 8, "4 bits": 4}


@dataclass(frozen=True)
class Shape:
    """What the activations of a language model depend on."""

    layers: int
    width: int
    feed_forward: int
    heads: int

    def block(self, positions: int) -> int:
        """Bytes that one block keeps."""
        D, I = self.width, self.feed_forward  # noqa: E741 - as in the formula
        half = 8 * D + 5 * I + self.heads * positions
        return positions * (BF16 * half + FLOAT32 * (6 * D + I + 7 * RANK))

    def activations(self, positions: int, grad_checkpoint: bool) -> int:
        """Bytes at the peak."""
        attention = 3 * BF16 * self.heads * positions**2
        if grad_checkpoint:
            ends = 2 * BF16 * self.layers * positions * self.width
            return ends + self.block(positions) + attention
        return self.layers * self.block(positions) + attention


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--checkpoint", choices=CONFIGS, default="AVG-LLaVA", help="whose shapes (default: %(default)s)"
    )
    parser.add_argument("--measure", action="store_true", help="compare the formula with small models")
    args = parser.parse_args()
    if args.measure:
        measure()
    else:
        count(args.checkpoint)
        print(f"\n{least_seconds(args.checkpoint)}")


def keys_of(checkpoint: str) -> dict[str, Any]:
    """The config of a checkpoint that has the usual granularities and a router."""
    keys = CONFIGS[checkpoint]
    if "text_config" in keys:
        keys = translated(Path(), keys) | {"vis_token_granularity": AVG_LLAVA["vis_token_granularity"]}
        return keys | {"router_select": True, "filtered_text_num": 32}
    return {**keys, "vision_config": KNOWN_TOWERS[keys["mm_vision_tower"]]}


def released(checkpoint: str, bits: int | None) -> tuple[Model, float]:
    """A published model, its arrays not computed, and its bytes."""
    keys = keys_of(checkpoint)
    model = build_model(keys, ())
    model.set_dtype(mx.bfloat16)
    if bits:
        Quantization(bits=bits).apply(model, keys)
    return model, sum(part.bytes for part in parts_of(model))


def trained_bytes(model: Model) -> int:
    return COPIES * sum(array.nbytes for array in trained_tensors(model).values())


def count(checkpoint: str) -> None:
    text = Config.from_dict(keys_of(checkpoint)).text
    sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    shape = Shape(*(text[name] for name in sizes))
    print("| | weights | LoRA, gradients, moments | a sample's activations | in all | with `--grad-checkpoint` |")
    print("|---|---|---|---|---|---|")
    for label, bits in WIDTHS.items():
        model, weights = released(checkpoint, bits)
        config = model.config
        lora = AdapterConfig("lora", -1, {"rank": RANK, "scale": 20.0, "dropout": 0.0})
        instruct.prepare(model, lora, instruct.Trainable(), grad_checkpoint=False)
        positions = TEXT_TOKENS + config.visual_tokens(config.finest, IMAGE_SIZE)
        trained = trained_bytes(model)
        plain, checkpointed = (shape.activations(positions, flag) for flag in (False, True))
        row = (weights, trained, plain, weights + trained + plain, weights + trained + checkpointed)
        print(f"| {label} | " + " | ".join(f"{bytes_ / GB:.1f} GB" for bytes_ in row) + " |")

    print(f"\nActivations are those of one sample of {positions} positions, at the finest granularity:", end=" ")
    print(f"{plain / GB:.1f} GB, or {checkpointed / GB:.1f} GB with gradient checkpointing.\n")
    print("| granularity | positions | activations | with `--grad-checkpoint` |")
    print("|---|---|---|---|")
    for granularity in config.granularities:
        positions = TEXT_TOKENS + config.visual_tokens(granularity, IMAGE_SIZE)
        gigabytes = [shape.activations(positions, flag) / GB for flag in (False, True)]
        print(f"| {granularity} | {positions} | {gigabytes[0]:.1f} GB | {gigabytes[1]:.1f} GB |")

    model, _ = released(checkpoint, None)
    rglf.prepare(model, fresh=False)
    rows, columns = config.crop_grid(IMAGE_SIZE)
    crops = 1 + rows * columns
    features = crops * max(config.granularities) * config.hidden_size * BF16
    print("\n| router | |")
    print("|---|---|")
    print(f"| parameters | {sum(array.size for array in trained_tensors(model).values()) / 1e6:.1f} million |")
    print(f"| trained, gradients, moments | {trained_bytes(model) / GB:.2f} GB |")
    print(f"| activations of an image of {crops} crops | {router_activations(model, crops) / GB:.2f} GB |")
    print(f"| feature cache, for an image of {crops} crops | {features / 1e6:.1f} MB |")


def least_seconds(checkpoint: str) -> str:
    """The least seconds that a sample takes on Apple's chips, with the language model in 4 bits."""
    config = Config.from_dict(keys_of(checkpoint))
    cost = Cost(config, dict.fromkeys(PARTS, 16.0) | {"language_model": 4.5})
    rows, columns = config.crop_grid(IMAGE_SIZE)
    positions = [TEXT_TOKENS + config.visual_tokens(g, IMAGE_SIZE) for g in config.granularities]
    passes = [cost.reference_prefill(n) for n in positions]
    every = sum(passes, Work())
    vision = cost.vision(1 + rows * columns)
    one = 1 / len(passes) * every
    stages = {
        "stage 3, all granularities": vision + 3 * every,
        "stage 3, one a step": vision + 3 * one,
        "feedback": vision + every,
    }
    lines = [
        [chip, *(f"{work.seconds(tflops * 1e12, bandwidth * 1e9):.1f} s" for work in stages.values())]
        for chip, (tflops, bandwidth) in CHIPS.items()
    ]
    return table(["a sample, with `--grad-checkpoint`", *stages], lines)


def router_activations(model: Model, crops: int) -> int:
    """What the router keeps for the backward pass, in float32: per position and crop 16 arrays of width D.

    They are: input, queries, keys, values, attended, its projection, dropped, their sum, normalized; feed-forward in,
    ReLU, dropped, out, sum, normalized; scorer in and GELU out. Attention weights across few crops are left out.
    """
    return 16 * crops * model.config.voter_size * model.config.hidden_size * FLOAT32


def measure() -> None:
    print("| L, D, I, H, N | checkpoint | counted | measured |")
    print("|---|---|---|---|")
    for layers, positions in ((3, 1024), (12, 1024), (6, 1536)):
        shape = Shape(layers, 256, 688, 8)
        for grad_checkpoint in (False, True):
            counted = shape.activations(positions, grad_checkpoint)
            found = measured(shape, positions, grad_checkpoint)
            sizes = f"{layers}, {shape.width}, {shape.feed_forward}, {shape.heads}, {positions}"
            print(f"| {sizes} | {grad_checkpoint} | {counted / 1e6:.0f} MB | {found / 1e6:.0f} MB |")


def measured(shape: Shape, positions: int, grad_checkpoint: bool) -> int:
    """Peak bytes of a backward pass through a Llama of this shape with LoRA, less what was there before."""
    from mlx_lm.models import llama
    from mlx_lm.tuner.trainer import grad_checkpoint as patch
    from mlx_lm.tuner.utils import linear_to_lora_layers

    args = {"model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 32, "hidden_size": shape.width}
    args |= {"num_hidden_layers": shape.layers, "intermediate_size": shape.feed_forward}
    model = llama.Model(llama.ModelArgs.from_dict(args | {"num_attention_heads": shape.heads}))
    model.set_dtype(mx.bfloat16)
    model.freeze()
    linear_to_lora_layers(model, shape.layers, {"rank": RANK, "scale": 20.0, "dropout": 0.0})
    block = type(model.layers[0])
    original = block.__call__
    if grad_checkpoint:
        patch(model.layers[0])
    inputs = mx.random.normal((1, positions, shape.width)).astype(mx.bfloat16)

    def loss() -> mx.array:
        return model.model(mx.zeros((1, positions), mx.int32), None, inputs)[0, -8:].square().mean()

    mx.eval(model.parameters(), inputs)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(nn.value_and_grad(model, loss)())
    block.__call__ = original
    return mx.get_peak_memory() - before


if __name__ == "__main__":
    main()
