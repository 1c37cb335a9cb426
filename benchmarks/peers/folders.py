"""One set of random weights as three model folders: this project's, a `llava_next` of the Hub's, and that converted.

    python folders.py PRESET DTYPE FOLDER      # writes FOLDER/ours, theirs, converted, image.jpg and question.txt

All read the same tokenizer, one token a word. The layer of the tower that nobody uses is a copy of the one before it.
"""

import sys
from pathlib import Path
from typing import Any

import mlx.core as mx

from avg_mlx import convert
from avg_mlx.bench.measure import prompt_of, synthetic_image
from avg_mlx.bench.presets import KEYS, preset_keys, random_model, word_tokenizer
from avg_mlx.config import Config
from avg_mlx.files import read_json, write_json
from avg_mlx.model.inventory import tensors_of
from avg_mlx.weights.pytorch import HUB_LAYOUT
from avg_mlx.weights.side_files import preprocessor_config

IMAGE_TOKEN = "<image>"
CONTENT = "{{ message['content'] }}"
PARTS = "message['content'] | selectattr('type', 'equalto', '{}')"
CONTENT_OR_PARTS = (  # images come first, as the Hub's templates have them
    f"{{% if message['content'] is string %}}{CONTENT}{{% else %}}"
    f"{{% for part in {PARTS.format('image')} %}}{IMAGE_TOKEN} {{% endfor %}}"
    f"{{% for part in {PARTS.format('text')} %}}{{{{ part['text'] }}}}{{% endfor %}}{{% endif %}}"
)


def main() -> None:
    preset, dtype, home = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    keys = preset_keys(preset)
    tensors = tensors_of(random_model(preset, dtype))
    tokenizer = word_tokenizer(keys["vocab_size"])
    image_token = keys["vocab_size"] - 1
    write_folder(home / "ours", keys, tensors, tokenizer)
    write_folder(home / "theirs", their_keys(keys, image_token), their_tensors(keys, tensors), tokenizer)
    write_processor(home / "theirs", keys, image_token)
    write_template(home / "theirs" / "chat_template.jinja")
    convert(home / "theirs", home / "converted")
    (home / "image.jpg").write_bytes(synthetic_image(800, 600))
    (home / "question.txt").write_text(prompt_of(tokenizer, 60))


def write_folder(folder: Path, keys: dict[str, Any], tensors: dict[str, mx.array], tokenizer: Any) -> None:
    folder.mkdir(parents=True)
    write_json(folder / "config.json", keys)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "mlx"})
    tokenizer.save_pretrained(folder)


def their_keys(keys: dict[str, Any], image_token: int) -> dict[str, Any]:
    """The config of a `llava_next` of the same shapes."""
    text = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return {
        "model_type": "llava_next",
        "text_config": {
            "model_type": "llama",
            "rope_theta": 10000.0,
            **{name: keys[name] for name in (*text, "rms_norm_eps", "vocab_size", "max_position_embeddings")},
        },
        "vision_config": {"model_type": "clip_vision_model", **keys["vision_config"]},
        "image_token_index": image_token,
        "vocab_size": keys["vocab_size"],
        "eos_token_id": KEYS["eos_token_id"],
        "image_grid_pinpoints": [[height, width] for width, height in keys["image_grid_pinpoints"]],
        "vision_feature_layer": keys["mm_vision_select_layer"],
        "vision_feature_select_strategy": "default",
    }


def their_tensors(keys: dict[str, Any], tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    """The same arrays by the Hub's names, without the router."""
    kept = [(HUB_LAYOUT.origin(name), array) for name, array in tensors.items() if not name.startswith("router.")]
    theirs = {place.name: place.give(array) for place, array in kept}
    used = Config.from_dict(keys).vision_layers
    layer = "vision_tower.vision_model.encoder.layers.{}."
    copies = {
        name.replace(layer.format(used - 1), layer.format(unused)): array
        for name, array in theirs.items()
        if name.startswith(layer.format(used - 1))
        for unused in range(used, keys["vision_config"]["num_hidden_layers"])
    }
    norm = "vision_tower.vision_model.{}.{}"
    copies |= {norm.format("post_layernorm", n): theirs[norm.format("pre_layrnorm", n)] for n in ("weight", "bias")}
    return theirs | copies


def write_processor(folder: Path, keys: dict[str, Any], image_token: int) -> None:
    """What mlx-vlm wants beside the weights, and its image token as the tokenizer's last word."""
    vision = Config.from_dict(keys).vision
    pinpoints = [[height, width] for width, height in keys["image_grid_pinpoints"]]
    write_json(
        folder / "preprocessor_config.json",
        {
            **preprocessor_config(vision),
            "image_processor_type": "LlavaNextImageProcessor",
            "image_grid_pinpoints": pinpoints,
        },
    )
    write_json(
        folder / "processor_config.json",
        {
            "processor_class": "LlavaNextProcessor",
            "patch_size": vision.patch_size,
            "vision_feature_select_strategy": "default",
            "image_token": IMAGE_TOKEN,
            "num_additional_image_tokens": 1,
        },
    )
    file = folder / "tokenizer.json"
    tokenizer = read_json(file)
    words = {word: id for word, id in tokenizer["model"]["vocab"].items() if id != image_token}
    tokenizer["model"]["vocab"] = {**words, IMAGE_TOKEN: image_token}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"].append({"id": image_token, "content": IMAGE_TOKEN, "special": True, **plain})
    write_json(file, tokenizer)


def write_template(file: Path) -> None:
    """Let a user's content be parts, too: mlx-vlm's server gives the template a list, and would print it otherwise."""
    file.write_text(file.read_text().replace(f"USER: {CONTENT}", f"USER: {CONTENT_OR_PARTS}"))


if __name__ == "__main__":
    main()
