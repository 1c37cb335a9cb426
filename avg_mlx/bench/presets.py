"""Random weights in the shapes of the released family, for when there is no checkpoint."""

import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..config import KNOWN_TOWERS, Config
from ..files import write_json
from ..inputs.prompt import CHAT_TEMPLATE
from ..inputs.tokenizer import Tokenizer
from ..model.avg_llava import Model
from ..model.inventory import tensors_of
from ..weights.checkpoint import load_tokenizer
from ..weights.quantization import Quantization

TOWER = "openai/clip-vit-large-patch14-336"


def _shapes(
    vision: dict[str, int], vocab_size: int, hidden: int, intermediate: int, layers: int, heads: int
) -> dict[str, Any]:
    """The keys of `config.json` that differ between presets."""
    return {
        "vision_config": {**KNOWN_TOWERS[TOWER], **vision},
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }


def _tower(hidden: int, layers: int) -> dict[str, int]:
    """A smaller CLIP with the patches and proportions of the large one, and heads of 64 or less."""
    return {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": max(2, hidden // 64),
    }


# All keep crops of 336 pixels, 24×24 patches and five granularities; only towers and language models are smaller.
SHAPES = {
    "tiny": _shapes(_tower(32, 3), vocab_size=512, hidden=64, intermediate=192, layers=2, heads=2),
    "300m": _shapes(_tower(256, 12), vocab_size=32000, hidden=1024, intermediate=3072, layers=16, heads=8),
    "1b": _shapes(_tower(512, 12), vocab_size=32000, hidden=2048, intermediate=5504, layers=16, heads=16),
    "7b": _shapes({}, vocab_size=32000, hidden=4096, intermediate=11008, layers=32, heads=32),  # as released
}
KEYS: dict[str, Any] = {
    "model_type": "llava_llama",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "mm_vision_tower": TOWER,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_patch_merge_type": "spatial_unpad",
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "vis_token_granularity": [36, 72, 144, 288, 576],
    "router_select": True,
}


def preset_keys(name: str) -> dict[str, Any]:
    """The `config.json` of a preset."""
    return {**KEYS, **SHAPES[name], "mm_hidden_size": SHAPES[name]["vision_config"]["hidden_size"]}


def random_model(name: str, dtype: str = "float16", quantization: Quantization | None = None) -> Model:
    """A preset's model. Each tensor is drawn, cast and quantized by itself, so that none is held twice."""
    mx.random.seed(0)
    keys = preset_keys(name)
    model = Model(Config.from_dict(keys))
    model.set_dtype(getattr(mx, dtype))
    if quantization:
        quantization.apply(model, keys)
    for array in tensors_of(model).values():
        mx.eval(array)
    model.eval()
    return model


def word_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer of whole words, one token each. Its words are "w3", "w4" and so on, and all others are unknown."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors

    special = {"<unk>": 0, "<s>": 1, "</s>": 2}
    words = {f"w{id}": id for id in range(len(special), vocab_size)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(special | words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", special["<s>"])])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": CHAT_TEMPLATE,
    }
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(f"{folder}/tokenizer.json")
        write_json(Path(folder) / "tokenizer_config.json", settings)
        return load_tokenizer(Path(folder), KEYS)
