"""The files beside the weights of a model folder: tokenizer, image processor, config and model card."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ..config import Config, VisionConfig
from ..files import MAX_TOKENIZER, check_file
from .quantization import widths
from .writing import Content

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json")
PROCESSOR = "preprocessor_config.json"

CARD = """\
---
{front_matter}
---
# {name} for MLX

Converted from {origin} with avg-mlx: {weights}.

{looking}

    avg-mlx generate --model THIS_FOLDER --image photo.jpg --prompt "What is in this image?"

{method} is described in "AVG-LLaVA: An Efficient Large Multimodal Model with Adaptive Visual Granularity"
(arXiv 2410.02745). The weights keep the licence of the checkpoint they come from.
"""


def copies(folder: Path, names: Sequence[str] = TOKENIZER_FILES) -> dict[str, Content]:
    """Return those files of `folder` that exist, to be copied. InputError for one that is too large to be genuine."""
    present = [name for name in names if (folder / name).is_file()]
    for name in present:
        check_file(folder / name, "download it again", MAX_TOKENIZER)
    return {name: folder / name for name in present}


def converted_files(folder: Path, origin: str | Path, keys: Mapping[str, Any]) -> dict[str, Content]:
    """Return the files of a converted folder with config `keys`: those of `folder` as they are, and a model card."""
    return {
        **copies(folder, (*TOKENIZER_FILES, PROCESSOR)),
        "README.md": model_card(str(origin), keys),
        "config.json": dict(sorted(keys.items())),
    }


def preprocessor_config(vision: VisionConfig) -> dict[str, Any]:
    """Return an image processor's config for other tools; this package reads the same values from config.json."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": vision.image_size},
        "do_center_crop": True,
        "crop_size": {"height": vision.image_size, "width": vision.image_size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
    }


def model_card(origin: str, keys: Mapping[str, Any]) -> str:
    """Return the README.md of a folder that was converted from `origin`, a Hub repository or a local folder."""
    on_hub = not Path(origin).expanduser().exists()
    front_matter = ModelCardData(
        base_model=origin if on_hub else None,
        library_name="mlx",
        pipeline_tag="image-text-to-text",
        tags=["mlx", "avg-mlx", "llava"],
    )
    quantization = keys.get("quantization")
    if quantization:
        bits = " and ".join(map(str, widths(quantization)))
        weights = f"language model quantized to {bits} bits in groups of {quantization['group_size']}"
    else:
        weights = f"weights in {keys['torch_dtype']}"
    config = Config.from_dict(keys)
    return CARD.format(
        front_matter=front_matter.to_yaml(),
        name="AVG-LLaVA" if config.has_router else "LLaVA",
        origin=origin if on_hub else "a local checkpoint",
        weights=weights,
        looking=_looking(config),
        method="The method" if config.has_router else "Training a router",
    )


def _looking(config: Config) -> str:
    """Say how closely the model looks at an image."""
    choices = ", ".join(map(str, sorted(config.granularities)))
    if config.has_router:
        return (
            "AVG-LLaVA looks at an image as closely as the question needs. "
            f"A router picks {choices} visual tokens per crop."
        )
    alike = f"It looks at all images with {config.finest} visual tokens per crop"
    if len(config.granularities) == 1:
        return f"{alike}."
    return f"{alike}, since it has no router yet: choose {choices} with --granularity."
