"""The README.md of a converted folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import Config

CARD = """\
---
library_name: mlx
pipeline_tag: image-text-to-text
{base_model}tags:
- mlx
- avg-mlx
- llava
---
# AVG-LLaVA for MLX

Converted from {origin} with avg-mlx: {weights}.

AVG-LLaVA looks at an image as closely as the question needs. {routing}

    avg-mlx generate --model THIS_FOLDER --image photo.jpg --prompt "What is in this image?"

The method is described in "AVG-LLaVA: An Efficient Large Multimodal Model with Adaptive Visual Granularity"
(arXiv 2410.02745). The weights keep the licence of the checkpoint they come from.
"""


def model_card(origin: str, keys: Mapping[str, Any]) -> str:
    """A model card for a folder converted from `origin`, a Hub repository or a local folder, with config `keys`."""
    on_hub = not Path(origin).expanduser().exists()
    quantization = keys.get("quantization")
    if quantization:
        weights = f"language model quantized to {quantization['bits']} bits in groups of {quantization['group_size']}"
    else:
        weights = f"weights in {keys['torch_dtype']}"
    granularities = ", ".join(map(str, sorted(Config.from_dict(keys).granularities)))
    if keys["router_select"]:
        routing = f"A router picks {granularities} visual tokens per crop."
    else:
        routing = f"It has no router yet: choose {granularities} visual tokens per crop with --granularity."
    return CARD.format(
        base_model=f"base_model: {origin}\n" if on_hub else "",
        origin=origin if on_hub else "a local checkpoint",
        weights=weights,
        routing=routing,
    )
