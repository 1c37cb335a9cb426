"""Rehearse the conversion of a published checkpoint with made-up weights of the same shapes and bytes.

    python benchmarks/full_size.py --dir DISK                    # AVG-LLaVA to 4 bits, sparse files of zeros
    python benchmarks/full_size.py --dir DISK --dense            # random weights, 14.4 GB on disk
    python benchmarks/full_size.py --dir DISK --dtype bfloat16   # no quantization
    python benchmarks/full_size.py --dir DISK --checkpoint llava-v1.6-mistral-7b-hf

Prints convert.py's own table, its seconds and its peak resident memory, and what the model needs at each bit width.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from avg_mlx.bench.presets import preset_keys
from avg_mlx.config import KNOWN_TOWERS, Config
from avg_mlx.markdown import table
from avg_mlx.model.avg_llava import Model
from avg_mlx.model.inventory import shapes_of, tensors_of
from avg_mlx.weights.hub import translated
from avg_mlx.weights.pytorch import AUTHORS_LAYOUT, HUB_LAYOUT
from avg_mlx.weights.quantization import AFFINE_BITS, Quantization
from avg_mlx.weights.shards import Shape

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
SHARD_BYTES = 5_000_000_000
BF16 = 2  # bytes
BLOCK = 1 << 20  # weights that are made and written at a time

# The released config.json: the pinpoints are written as a text there, and the tower's config is a file of its own.
AVG_LLAVA: dict[str, Any] = {key: value for key, value in preset_keys("7b").items() if key != "vision_config"} | {
    "architectures": ["LlavaLlamaForCausalLM"],
    "torch_dtype": "bfloat16",
    "pad_token_id": 0,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "tokenizer_model_max_length": 4096,
    "mm_vision_select_feature": "patch",
    "image_grid_pinpoints": "[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]",
    "unfreeze_mm_vision_tower": True,
}
# The Hub's config.json leaves out what equals transformers' defaults; (height, width) are its pinpoints.
MISTRAL: dict[str, Any] = {
    "architectures": ["LlavaNextForConditionalGeneration"],
    "model_type": "llava_next",
    "torch_dtype": "float16",
    "ignore_index": -100,
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "image_token_index": 900,  # 32000 in the released one, whose tokenizer is not here
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "text_config": {
        "model_type": "mistral",
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "vocab_size": 32064,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
}
CONFIGS = {"AVG-LLaVA": AVG_LLAVA, "llava-v1.6-mistral-7b-hf": MISTRAL}
# Tiny ones, but their size does not matter here.
TOKENIZERS = {
    "AVG-LLaVA": [TESTS / "golden" / "checkpoint" / name for name in ("tokenizer.model", "tokenizer_config.json")],
    "llava-v1.6-mistral-7b-hf": [
        TESTS / "golden_llava" / "next" / "checkpoint" / name
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    ],
}


def main() -> None:
    args = parse_args()
    folder = Path(tempfile.mkdtemp(prefix="avg-mlx-", dir=args.dir))
    try:
        checkpoint, converted = folder / "checkpoint", folder / "converted"
        keys = write_checkpoint(checkpoint, args.checkpoint, args.layers, args.dense)
        options = ["--dtype", args.dtype] if args.dtype else ["-q", "--q-bits", str(args.q_bits)]
        cost = measure(ROOT / "convert.py", "--hf-path", checkpoint, "--mlx-path", converted, *options)
        print(f"convert.py {' '.join(options)}: {cost}")
        print(f"On disk: {sum(file.stat().st_size for file in converted.iterdir()) / 1e9:.2f} GB")
        if args.load:
            print(f"load: {measure('-c', f'import avg_mlx; avg_mlx.load({str(converted)!r})')}")
        print(f"\n{memory_table(keys)}")
    finally:
        if args.keep:
            print(f"Kept {folder}")
        else:
            shutil.rmtree(folder)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Rehearse converting the released checkpoint without it.")
    add = parser.add_argument
    add("--dir", type=Path, help="where to make a folder for the files (default: the system's temporary folder)")
    add("--keep", action="store_true", help="do not remove that folder")
    add("--dense", action="store_true", help="random weights, instead of sparse files of zeros")
    add("--load", action="store_true", help="also load the result, which takes as much memory as its weights")
    add("--checkpoint", choices=CONFIGS, default="AVG-LLaVA", help="whose shapes (default: %(default)s)")
    add("--layers", type=int, default=32, help="of the language model (default: %(default)s)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--q-bits", type=int, choices=AFFINE_BITS, default=4, help="default: %(default)s")
    kind.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), help="do not quantize")
    return parser.parse_args()


def build(keys: Mapping[str, Any]) -> Model:
    """The model in bfloat16, unloaded: its arrays are never computed."""
    model = Model(Config.from_dict(keys))
    model.set_dtype(mx.bfloat16)
    return model


def write_checkpoint(folder: Path, name: str, layers: int, dense: bool) -> dict[str, Any]:
    """Write a checkpoint in its own layout, and return its config as conversion sees it.

    Its files hold the tower's last layer too, which conversion leaves out.
    """
    config = json.loads(json.dumps(CONFIGS[name]))
    config.get("text_config", config)["num_hidden_layers"] = layers
    folder.mkdir()
    for file in TOKENIZERS[name]:
        shutil.copyfile(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(config))
    if "text_config" in config:
        keys, layout = translated(folder, config), HUB_LAYOUT
    else:
        keys, layout = config | {"vision_config": KNOWN_TOWERS[config["mm_vision_tower"]]}, AUTHORS_LAYOUT
    shapes = shapes_of(build({**keys, "mm_vision_select_layer": -1}))
    places = [(layout.origin(ours), shape) for ours, shape in shapes.items()]
    tensors = {place.name: place.shape(shape) for place, shape in places}
    shards = list(split(tensors))
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_shard(file, shard, dense)
        weight_map |= dict.fromkeys(shard, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    parameters = sum(map(math.prod, tensors.values()))
    print(
        f"Checkpoint: {parameters:,} parameters in {len(tensors)} tensors and {len(shards)} shards, "
        f"{BF16 * parameters / 1e9:.2f} GB in bfloat16, {'random' if dense else 'sparse'}",
        flush=True,
    )
    return keys


def split(tensors: Mapping[str, Shape]) -> Iterator[dict[str, Shape]]:
    """Shards of at most SHARD_BYTES."""
    shard: dict[str, Shape] = {}
    size = 0
    for name, shape in tensors.items():
        nbytes = BF16 * math.prod(shape)
        if size + nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = shape
        size += nbytes
    yield shard


def write_shard(file: Path, shard: Mapping[str, Shape], dense: bool) -> None:
    """A safetensors file of bfloat16 tensors: the header's length, the header, the data."""
    header, end = {}, 0
    for name, shape in shard.items():
        start, end = end, end + BF16 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        if dense:
            write_random(stream, end // BF16)
        else:
            stream.truncate(8 + len(text) + end)


def write_random(stream: BinaryIO, count: int) -> None:
    """Normal numbers of a weight's usual size: the upper halves of their float32 are bfloat16."""
    rng = np.random.default_rng(0)
    for start in range(0, count, BLOCK):
        numbers = 0.02 * rng.standard_normal(min(BLOCK, count - start), np.float32)
        stream.write((numbers.view(np.uint32) >> 16).astype("<u2").tobytes())


def measure(*arguments: str | Path) -> str:
    """Run Python with `arguments` to its end, and say how long it took and how much memory it held at its peak."""
    start = time.perf_counter()
    child = subprocess.Popen([sys.executable, *arguments])
    _, status, usage = os.wait4(child.pid, 0)  # the one way to learn a single child's peak
    seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{arguments[0]} failed with status {child.returncode}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"{seconds:.0f} s, peak resident memory {peak / 1e9:.2f} GB"


def memory_table(keys: Mapping[str, Any]) -> str:
    """The memory of the model and its KV cache for each bit width of its language model, as Markdown."""
    rows = []
    # Keys and values, in every layer, of every KV head.
    head_dim = keys["hidden_size"] // keys["num_attention_heads"]
    per_position = 2 * keys["num_hidden_layers"] * keys["num_key_value_heads"] * head_dim * BF16
    cache = 4096 * per_position
    for bits in (None, 8, 6, 4):
        model = build(keys)
        if bits:
            Quantization(bits=bits).apply(model, {})
        weights = sum(array.nbytes for array in tensors_of(model).values())
        sizes = (f"{size / 1e9:.2f} GB" for size in (weights, weights + cache))
        rows.append([f"{bits} bits" if bits else "bfloat16", *sizes])
    weighed = table(["language model", "weights", "weights + KV cache of 4096 positions"], rows)
    return f"{weighed}\n\nKV cache: {per_position:,} bytes a position, {cache / 1e9:.2f} GB for 4096."


if __name__ == "__main__":
    main()
