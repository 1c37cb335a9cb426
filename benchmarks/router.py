"""What the router's arrangement saves over the plain one, which follows the paper step by step: a Markdown table.

    python benchmarks/router.py                              # a quarter of the released width
    python benchmarks/router.py --width 4096 --dtype bfloat16  # the released router: 117.5 million parameters

Weights and features are random: one image in the given number of crops, and 60 text tokens. Both arrangements take
turns in one run, and medians are taken after a round that warms up. Operations are counted as two for each
multiplication by a weight, which is all but a thousandth of the router's work.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from avg_mlx.config import Config
from avg_mlx.markdown import table
from avg_mlx.model.router import Router, text_filter
from avg_mlx.model.scaler import pyramid

CHECKPOINT = Path(__file__).parent.parent / "tests" / "golden" / "checkpoint"
TEXT_TOKENS = 60


def main() -> None:
    args = parse_args()
    dtype = getattr(mx, args.dtype)
    config = released_config(args.width)
    router = Router(config)
    router.update(tree_map(lambda x: mx.random.normal(x.shape) * x.shape[-1] ** -0.5, router.parameters()))
    router.set_dtype(dtype)
    router.eval()
    features = mx.random.normal((args.crops, math.prod(config.vision.patch_grid), args.width)).astype(dtype)
    text = mx.random.normal((TEXT_TOKENS, args.width)).astype(dtype)
    mx.eval(router.parameters(), features, text)

    ways: dict[str, Callable[[], mx.array]] = {
        "plain": lambda: plain_logits(router, features, text, lambda x: to_pyramid(x, config)),
        "rearranged": lambda: router(features, text, lambda x: to_pyramid(x, config)),
    }
    seconds, peaks = measure(ways, args.repeats)
    plain, rearranged = operations(config, args.crops)
    median = {way: statistics.median(times) for way, times in seconds.items()}
    rows = [
        [way, f"{median[way]:.3f}", f"{min(times):.3f} to {max(times):.3f}", f"{peaks[way]:.2f}", f"{count / 1e12:.3f}"]
        for (way, times), count in zip(seconds.items(), (plain, rearranged), strict=True)
    ]
    saved = 1 - median["rearranged"] / median["plain"]
    rows.append(["saved", f"{saved:.1%}", "", "", f"{1 - rearranged / plain:.1%}"])
    print(table(["", "seconds, median", "least to most", "peak memory, GB", "TFLOP"], rows))
    difference = mx.abs(ways["plain"]() - ways["rearranged"]()).max().item()
    print(f"\nThe logits differ by {difference:.1e} at most. {mx.default_device()}, {args.dtype}, {args.crops} crops.")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the router against its plain arrangement.")
    parser.add_argument("--width", type=int, default=1024, help="features in a row (default: %(default)s)")
    parser.add_argument("--crops", type=int, default=5, help="default: %(default)s, those of a 672×672 image")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def released_config(width: int) -> Config:
    """The released granularities and crops, at another width."""
    keys = json.loads((CHECKPOINT / "config.json").read_text())
    tower = json.loads((CHECKPOINT / "clip" / "config.json").read_text())
    return Config.from_dict(keys | {"hidden_size": width, "vision_config": tower})


def to_pyramid(x: mx.array, config: Config) -> mx.array:
    return pyramid(x, config.granularities, config.vision.patch_grid)


def plain_logits(router: Router, features: mx.array, text: mx.array, pool: Callable[[mx.array], mx.array]) -> mx.array:
    """Section 3.2 of the paper, as trained: every position of every crop passes every layer."""
    filtered = text_filter(text, features[0], router.filtered_text_num)
    filtered = mx.broadcast_to(filtered, (len(features), *filtered.shape))
    x = mx.concatenate([pool(features), filtered], axis=1).swapaxes(0, 1)  # (positions, crops, D)
    mixer = router.crop_mixer
    x = mixer.norm1(x + nn.MultiHeadAttention.__call__(mixer.attention, x, x, x))
    x = mixer.norm2(x + mixer.linear2(nn.relu(mixer.linear1(x))))
    votes = (router.scorer(x) * router.voter[:, None]).sum(axis=0)  # (crops, granularities)
    return router.logit_norm(votes.mean(axis=0))


def operations(config: Config, crops: int) -> tuple[int, int]:
    """Count the operations of both arrangements in the seven D×D layers: three project, four follow."""
    square, text = 2 * config.hidden_size**2, config.filtered_text_num
    patches, positions = math.prod(config.vision.patch_grid), sum(config.granularities)
    plain = 7 * crops * (positions + text)
    rearranged = 3 * (crops * patches + text) + 4 * (crops * positions + text)
    return plain * square, rearranged * square


def measure(ways: dict[str, Callable[[], mx.array]], repeats: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Measure the seconds of each repeat of each arrangement, and its peak memory in GB."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    peaks: dict[str, float] = {}
    for n in range(1 + repeats):
        for way, run in ways.items():
            mx.reset_peak_memory()
            start = time.perf_counter()
            mx.eval(run())
            if n:
                seconds[way].append(time.perf_counter() - start)
            peaks[way] = mx.get_peak_memory() / 1e9
    return seconds, peaks


if __name__ == "__main__":
    main()
