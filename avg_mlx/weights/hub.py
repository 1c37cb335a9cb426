"""The Hub's layout, which transformers reads: its configs in the authors' words and back, its template and processor.

What a config leaves out are the defaults of transformers' own config classes, which are asked for them.
"""

import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..config import CLIP, HUB_TYPES, MAX_LAYERS, VisionConfig, tower_type
from ..errors import InputError, printable, shown
from ..files import MAX_TOKENIZER, read_file, read_json
from ..inputs.prompt import PLACEHOLDER
from .sentencepiece import damaged_tokenizer, special_tokens, tokenizer_settings
from .side_files import PROCESSOR, copies, preprocessor_config
from .writing import Content

ADAPTIVE = ("vis_token_granularity", "filtered_text_num")  # ours, which transformers passes over
NOT_TEXT = re.compile(rf"mm_.*|image_.*|{'|'.join(ADAPTIVE)}|layout|router_select|torch_dtype|vision_config")
TEMPLATES = ("chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer_config.json")

# What the Hub's configs may say, where only one thing can be run.
ONLY: dict[str, Any] = {
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "use_image_newline_parameter": True,
}
ONLY_PIXELS: dict[str, Any] = {
    **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), True),
    "resample": 3,
}


def translated(folder: Path, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the Hub's config `keys` in the authors' words, completed, with the tower's under `vision_config`.

    Raises InputError for a model that cannot be run.
    """
    _only(ONLY, keys, "")
    layer = keys.get("vision_feature_layer", -2)
    if type(layer) is not int:
        raise InputError(f"vision_feature_layer is {shown(layer)}, but features of one layer only can be run")
    anyres = keys["model_type"] == "llava_next"
    text, vision, pixels = _text(keys["text_config"]), _vision(keys), _image_processor(folder)
    _check_pixels(pixels, vision["image_size"])
    vision |= {name: pixels[name] for name in ("image_mean", "image_std") if name in pixels}
    padded = str(pixels.get("image_processor_type")).startswith("LlavaImageProcessor") and pixels.get("do_pad")
    pinpoints = keys.get("image_grid_pinpoints") or _defaults("llava_next", {})["image_grid_pinpoints"]
    return {
        **text,
        **{name: keys[name] for name in ADAPTIVE if name in keys},
        "model_type": f"llava_{text['model_type']}",
        "layout": "transformers",
        "torch_dtype": keys.get("dtype") or keys.get("torch_dtype") or keys["text_config"].get("torch_dtype"),
        "eos_token_id": _end_of_sequence(folder, keys["text_config"]),
        "tie_word_embeddings": text["tie_word_embeddings"] or keys.get("tie_word_embeddings", False),
        "image_aspect_ratio": "anyres" if anyres else "pad" if padded else "crop",
        "image_grid_pinpoints": _swapped(pinpoints) if anyres else None,
        "mm_patch_merge_type": "spatial_unpad" if anyres else "flat",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": layer,
        "mm_vision_select_feature": "patch",
        "image_token_index": keys.get("image_token_index", keys.get("image_token_id")),
        "vision_config": vision,
    }


def hub_files(folder: Path, keys: Mapping[str, Any], vision: VisionConfig) -> dict[str, Content]:
    """Return the files beside the weights for a converted `folder`, with config `keys`, in the Hub's layout again."""
    anyres = keys["image_aspect_ratio"] == "anyres"
    name = HUB_TYPES["llava_next" if anyres else "llava"]
    pinpoints = {"image_grid_pinpoints": _swapped(keys["image_grid_pinpoints"])} if anyres else {}
    text = {name: value for name, value in keys.items() if not NOT_TEXT.fullmatch(name)}
    config = {
        **{name: keys[name] for name in ADAPTIVE if name in keys},
        **pinpoints,
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": "llava_next" if anyres else "llava",
        "torch_dtype": keys["torch_dtype"],
        "image_token_index": keys["image_token_index"],
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": keys["tie_word_embeddings"],
        "vision_feature_layer": keys["mm_vision_select_layer"],
        "vision_feature_select_strategy": "default",
        "text_config": text | {"model_type": keys["model_type"].removeprefix("llava_")},
        "vision_config": {**keys["vision_config"], "model_type": CLIP},
    }
    cropped = keys["image_aspect_ratio"] == "crop"
    kind = "CLIPImageProcessor" if cropped else f"{name}ImageProcessor"
    return {
        **copies(folder),
        "config.json": config,
        PROCESSOR: {**preprocessor_config(vision), **pinpoints, "image_processor_type": kind, "do_pad": not cropped},
        "processor_config.json": {
            "processor_class": f"{name}Processor",
            "image_token": PLACEHOLDER,
            "patch_size": vision.patch_size,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        },
        "chat_template.jinja": tokenizer_settings(folder)["chat_template"],
    }


def hub_tokenizer_files(folder: Path, keys: Mapping[str, Any]) -> dict[str, Content]:
    """Return the tokenizer.json, as it is, and a tokenizer_config.json that has the processor's chat template.

    keys: the translated config. Raises InputError if one of them is missing, or if the placeholder is no token.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise InputError(f"{folder} has no tokenizer.json; save one there with transformers' AutoTokenizer")
    tokenizer, index = read_json(file, limit=MAX_TOKENIZER), keys["image_token_index"]
    added = tokenizer.get("added_tokens")
    tokens = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    if [token.get("id") for token in tokens if token.get("content") == PLACEHOLDER] != [index]:
        raise InputError(f"{file} has no token {PLACEHOLDER} with the config's id {shown(index)}; download it again")
    settings = tokenizer_settings(folder)
    with damaged_tokenizer(folder):
        special = special_tokens(settings)
    ours = {
        **special,
        # transformers' own classes would build another tokenizer than that of the file.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "chat_template": _chat_template(folder),
        "extra_special_tokens": {"image_token": PLACEHOLDER},
    }
    return {"tokenizer.json": file, "tokenizer_config.json": {**settings, **ours}}


def _text(keys: Any) -> dict[str, Any]:
    """Return a language model's config, complete, by the names that mlx-lm reads."""
    if not isinstance(keys, dict) or not isinstance(keys.get("model_type", "llama"), str):
        raise InputError(f"text_config is {shown(keys)}, expected an object with its model_type; download it again")
    kind = keys.get("model_type", "llama")
    text = _defaults(kind, keys)
    if text.get("hidden_act", "silu") != "silu":
        raise InputError(f"the language model's hidden_act is {shown(text['hidden_act'])}, but only 'silu' can be run")
    rope = text.pop("rope_parameters", None) or {}
    text["rope_theta"] = rope.pop("rope_theta", text.get("rope_theta"))
    text["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    return {**text, "model_type": kind}


def _vision(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return a CLIP tower's config, complete."""
    if (kind := tower_type(keys)) != CLIP:
        raise InputError(f"the vision tower is a {shown(kind)}, but only CLIP's can be run")
    given = keys.get("vision_config") or _defaults("llava_next", {})["vision_config"]
    return {name: value for name, value in _defaults(CLIP, given).items() if name in VisionConfig.__dataclass_fields__}


def _defaults(kind: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a config by the defaults of transformers' class, without the keys that any config has."""
    layers = keys.get("num_hidden_layers", 1)
    if type(layers) is not int or not 0 < layers <= MAX_LAYERS:  # some classes make a list of so many
        raise InputError(f"num_hidden_layers is {shown(layers)}, expected a whole number from 1 to {MAX_LAYERS}")
    with quiet_transformers():
        from transformers import CONFIG_MAPPING, PretrainedConfig

    if kind not in CONFIG_MAPPING:
        raise InputError(f"the language model is of type {shown(kind)}, which transformers does not know")
    try:
        with quiet_transformers():
            complete = CONFIG_MAPPING[kind](**{name: value for name, value in keys.items() if name != "model_type"})
        common = PretrainedConfig().to_dict().keys() - {"tie_word_embeddings"}
        return {name: value for name, value in complete.to_dict().items() if name not in common}
    except Exception as error:  # each class checks in its own way
        reason = printable(f"{type(error).__name__}: {error}")
        raise InputError(f"transformers refuses the {kind} config ({reason}); download it again") from error


def _swapped(pinpoints: Any) -> Any:
    """Turn (height, width) into the authors' (width, height), or back; what is no list of pairs stays as it is."""
    if not isinstance(pinpoints, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pinpoints):
        return pinpoints
    return [pair[::-1] for pair in pinpoints]


def _image_processor(folder: Path) -> dict[str, Any]:
    """Return what the image processor's config says, from the file in which this release of transformers has it."""
    if (folder / "processor_config.json").is_file():
        nested = read_json(folder / "processor_config.json").get("image_processor")
        if isinstance(nested, dict):
            return nested
    return read_json(folder / PROCESSOR) if (folder / PROCESSOR).is_file() else {}


def _check_pixels(pixels: Mapping[str, Any], side: int) -> None:
    """Raise InputError for an image processor that makes other pixels than this package."""
    _only(ONLY_PIXELS, pixels, "the image processor's ")
    factor = pixels.get("rescale_factor", 1 / 255)
    if type(factor) is not float or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise InputError(f"the image processor's rescale_factor is {shown(factor)}, but only 1/255 can be run")
    for name in ("size", "crop_size"):
        size = pixels.get(name, side)
        if any(given != side for given in (size.values() if isinstance(size, dict) else [size])):
            raise InputError(f"the image processor's {name} is {shown(size)}, but the tower's crops have {side} pixels")


def _only(allowed: Mapping[str, Any], keys: Mapping[str, Any], whose: str) -> None:
    for name, value in allowed.items():
        if keys.get(name, value) != value:
            raise InputError(f"{whose}{name} is {shown(keys[name])}, but only {shown(value)} can be run")


def _end_of_sequence(folder: Path, text: Mapping[str, Any]) -> Any:
    """Return the ids at which answers end, or None: then they end at the tokenizer's own."""
    file = folder / "generation_config.json"
    generation = read_json(file) if file.is_file() else {}
    return next((keys["eos_token_id"] for keys in (generation, text) if keys.get("eos_token_id") is not None), None)


def _chat_template(folder: Path) -> str:
    """Return the chat template from the first file that has one."""
    for name in TEMPLATES:
        file = folder / name
        if not file.is_file():
            continue
        if file.suffix == ".jinja":
            return read_file(file, "download it again", MAX_TOKENIZER).decode(errors="replace")
        template = read_json(file).get("chat_template")
        if isinstance(template, list):  # of named ones
            named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
            template = named.get("default")
        if isinstance(template, str):
            return template
    raise InputError(f"{folder} has no chat template; put one into {TEMPLATES[0]} there")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers, which warns about PyTorch, and about keys and types that are no concern here."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
