"""The least time that the 7B can take on Apple's chips, from counted work and published peaks: Markdown tables.

    python benchmarks/predictions.py                  # the language model in 4 bits, the rest in 16
    python benchmarks/predictions.py --q-bits 16      # everything in 16 bits

Nothing is measured. A stage is assumed to last as long as its operations take at the GPU's peak rate, or its bytes at
the peak bandwidth, whichever is longer. Preparing the image is left out. Real runs reach only a part of both peaks.

Peaks, as published:
operations: FP32 TFLOPS of the GPU from Hugging Face's list of hardware (huggingface.co/hardware,
  github.com/huggingface/huggingface.js/pull/1044); Apple's GPUs run 16-bit products at the same rate. M5: four times
  the M4 of its class, as Apple states for its neural accelerators
  (the-decoder.com/apples-m5-chip-brings-faster-ai-to-macbook-ipad-and-vision-pro).
bandwidth: Apple's figures, as reported in github.com/ggml-org/llama.cpp/pull/1642 (M1, M2),
  macrumors.com/2022/10/24/macbook-pro-very-high-bandwidth-ram-rumor (M1 Max), gamebastion.com/n/…/474547 (M1 Ultra,
  M2 Ultra, M4 Pro, M4 Max), goodnewsapodcast.com/apples-m4-m4-pro-and-m4-max-compared-… (M3, M4),
  macmegasite.com/2024/10/30 (M3 Max), the-decoder.com (M5) and pepelac.news/en/posts/id30875 (M5 Pro, M5 Max).
"""

import argparse

from avg_mlx.bench.cost import PARTS, Cost, Work
from avg_mlx.bench.presets import preset_keys
from avg_mlx.config import Config
from avg_mlx.markdown import table

# name: (TFLOPS, GB/s)
CHIPS = {
    "M1": (2.6, 68),
    "M1 Max": (10.4, 400),
    "M1 Ultra": (21, 800),
    "M2": (3.6, 100),
    "M2 Ultra": (27.2, 800),
    "M3": (4.1, 100),
    "M3 Max": (14.2, 400),
    "M4": (4.6, 120),
    "M4 Pro": (9.2, 273),
    "M4 Max": (18.4, 546),
    "M5": (4 * 4.6, 153),
    "M5 Pro": (4 * 9.2, 307),
    "M5 Max": (4 * 18.4, 614),
}
IMAGE_SIZE = (672, 672)
TEXT_TOKENS = 60
GROUP_BITS = 32 / 64  # a scale and a bias of 16 bits for every 64 weights


def main() -> None:
    parser = argparse.ArgumentParser(description="Predict the 7B's times on Apple's chips from their published peaks.")
    parser.add_argument("--q-bits", type=int, choices=(4, 6, 8, 16), default=4, help="of the language model (4)")
    bits = parser.parse_args().q_bits
    config = Config.from_dict(preset_keys("7b"))
    weights = dict.fromkeys(PARTS, 16.0) | {"language_model": bits + GROUP_BITS if bits < 16 else 16}
    cost = Cost(config, weights)
    print(f"Counted: {IMAGE_SIZE[0]}×{IMAGE_SIZE[1]}, {TEXT_TOKENS} text tokens, language model in {bits} bits.\n")
    print(counted(cost))
    print("\nPredicted, at best: seconds to the first token by tokens per crop, and decode tokens/s at the finest.\n")
    print(predicted(cost))


def stages(cost: Cost, granularity: int) -> dict[str, Work]:
    """The counted work of each stage."""
    rows, columns = cost.config.crop_grid(IMAGE_SIZE)
    crops = 1 + rows * columns
    positions = TEXT_TOKENS + cost.config.visual_tokens(granularity, IMAGE_SIZE)
    return {
        "vision": cost.vision(crops),
        "router": cost.router(crops, TEXT_TOKENS),
        "prefill but for the last position": cost.fill(positions - 1),
        "the last, or one decode step": cost.decode(positions),
    }


def counted(cost: Cost) -> str:
    """TFLOP and GB of every stage."""
    rows = []
    for g in sorted(cost.config.granularities):
        works = stages(cost, g).values()
        cells = (f"{work.flop / 1e12:.3g} TFLOP, {work.bytes / 1e9:.3g} GB" for work in works)
        rows.append([g, cost.config.visual_tokens(g, IMAGE_SIZE), *cells])
    return table(["tokens per crop", "visual tokens", *stages(cost, cost.config.finest)], rows)


def predicted(cost: Cost) -> str:
    """Seconds to the first token on every chip."""
    granularities = sorted(cost.config.granularities)
    rows = []
    for chip, (tflops, bandwidth) in CHIPS.items():
        peaks = tflops * 1e12, bandwidth * 1e9
        seconds = [[work.seconds(*peaks) for work in stages(cost, g).values()] for g in granularities]
        first = (f"{sum(parts):.2f}" for parts in seconds)
        rows.append([chip, f"{tflops:g}", bandwidth, *first, f"{1 / seconds[-1][-1]:.0f}"])
    return table(["chip", "TFLOPS", "GB/s", *granularities, "decode tokens/s"], rows)


if __name__ == "__main__":
    main()
