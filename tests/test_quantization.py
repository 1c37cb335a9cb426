"""What is quantized, to how many bits, and that what is quantized still answers."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import write_checkpoint
from mlx_lm.convert import QUANT_RECIPES
from PIL import Image
from safetensors.numpy import load_file, save_file

from avg_mlx import InputError, convert, generate, load, route
from avg_mlx.model.inventory import tensors_of
from avg_mlx.weights.quantization import RECIPES, Quantization

PHOTO = Image.effect_mandelbrot((64, 48), (-2, -1, 1, 1), 50).convert("RGB")

# Widths that every group size divides.
WIDE = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1}
WIDE_TOWER = {"hidden_size": 128, "intermediate_size": 128}


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wide") / "checkpoint"
    write_checkpoint(folder, WIDE, WIDE_TOWER)
    return folder


@pytest.fixture(scope="module")
def original(wide):
    folder = wide.parent / "model"
    convert(wide, folder)
    return load(folder)


def quantized_layers(model: nn.Module) -> dict[str, tuple[str, int, int]]:
    """{path: (mode, bits, group size)} of the quantized layers."""
    return {
        path: (module.mode, module.bits, module.group_size)
        for path, module in model.named_modules()
        if hasattr(module, "scales")
    }


def layers_of(model: nn.Module, *parts: str) -> set[str]:
    """Paths of all layers that have a weight to quantize, or had one."""
    return {
        path
        for path, module in model.named_modules()
        if (hasattr(module, "to_quantized") or hasattr(module, "scales")) and path.partition(".")[0] in parts
    }


def converted(wide: Path, tmp_path: Path, **options):
    convert(wide, tmp_path / "model", quantization=Quantization(**options))
    return load(tmp_path / "model")


@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 64), (4, 128), (5, 32), (6, 64), (8, 128)])
def test_every_layer_of_the_language_model_and_no_other(wide, original, tmp_path, bits, group_size):
    model, _ = converted(wide, tmp_path, bits=bits, group_size=group_size)
    assert quantized_layers(model) == dict.fromkeys(layers_of(model, "language_model"), ("affine", bits, group_size))
    assert len(layers_of(model, "language_model")) == 7 + 2  # a Llama layer's, embeddings and head
    ours, theirs = (tensors_of(m) for m in (model, original[0]))
    others = {name for name in theirs if not name.startswith("language_model.")}
    assert all(mx.array_equal(ours[name], theirs[name]) for name in others)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("affine", 4, 64)),
        ({"mode": "mxfp4"}, ("mxfp4", 4, 32)),
        ({"mode": "nvfp4"}, ("nvfp4", 4, 16)),
        ({"mode": "mxfp8"}, ("mxfp8", 8, 32)),
        ({"mode": "mxfp4", "bits": 4, "group_size": 32}, ("mxfp4", 4, 32)),
    ],
)
def test_modes_and_defaults(wide, tmp_path, options, expected):
    model, tokenizer = converted(wide, tmp_path, **options)
    assert set(quantized_layers(model).values()) == {expected}
    assert generate(model, tokenizer, "Why?", PHOTO, granularity=1, max_tokens=3).token_ids


@pytest.mark.parametrize(
    ("option", "parts"), [("vision_bits", ("vision_tower", "projector")), ("router_bits", ("router",))]
)
@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_other_parts_are_quantized_on_request(wide, tmp_path, option, parts, mode):
    """In affine mode, whatever the language model's: 8 bits, while it has 4."""
    model, tokenizer = converted(wide, tmp_path, mode=mode, **{option: 8})
    layers = quantized_layers(model)
    expected = dict.fromkeys(layers_of(model, "language_model"), (mode, 4, 64 if mode == "affine" else 32))
    assert layers == expected | dict.fromkeys(layers_of(model, *parts), ("affine", 8, 64))
    assert route(model, tokenizer, "Why?", PHOTO)[0].routing is not None


def test_layers_that_no_group_divides_stay_as_they_are(tmp_path):
    """A tower of width 48, not a multiple of 32; only what reads its wider hidden layers, or no tower, is quantized."""
    write_checkpoint(tmp_path / "checkpoint", tower={"hidden_size": 48, "intermediate_size": 96})
    model, tokenizer = converted(tmp_path / "checkpoint", tmp_path, bits=4, group_size=32, vision_bits=8)
    seeing = {path for path in quantized_layers(model) if path.startswith(("vision_tower", "projector"))}
    assert seeing == {"vision_tower.layers.0.fc2", "vision_tower.layers.1.fc2", "projector.layers.1"}
    assert route(model, tokenizer, "Why?", PHOTO)[0].routing is not None


def test_recipes_are_mlx_lms():
    assert tuple(QUANT_RECIPES) == RECIPES


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> Path:
    """Eight layers, so that recipes have some to tell apart."""
    folder = tmp_path_factory.mktemp("deep") / "checkpoint"
    write_checkpoint(folder, {"intermediate_size": 64, "num_hidden_layers": 8})
    return folder


@pytest.mark.parametrize(
    ("recipe", "low", "high"), [("mixed_2_6", 2, 6), ("mixed_3_4", 3, 4), ("mixed_3_6", 3, 6), ("mixed_4_6", 4, 6)]
)
def test_recipes_mix_bits_within_the_language_model(deep, tmp_path, recipe, low, high):
    """More bits for the head, and for values and down-projections of the first and last eighth and each third layer."""
    model, tokenizer = converted(deep, tmp_path, recipe=recipe)
    layers = quantized_layers(model)
    assert layers.keys() == layers_of(model, "language_model")
    for path, (_, bits, _) in layers.items():
        name, layer = path.rpartition(".")[2], int(path.split(".")[3]) if ".layers." in path else None
        more = name == "lm_head" or (name in ("v_proj", "down_proj") and layer in (0, 3, 6, 7))
        assert bits == (high if more else low), path
    assert generate(model, tokenizer, "Why?", PHOTO, granularity=1, max_tokens=3).token_ids


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 7}, "bits=7 is not supported in mode affine; choose from 2, 3, 4, 5, 6, 8"),
        ({"bits": 1}, "bits=1 is not supported"),
        ({"bits": 16}, "bits=16 is not supported"),
        ({"group_size": 16}, "group_size=16 is not supported in mode affine; choose from 32, 64, 128"),
        ({"group_size": 0}, "group_size=0 is not supported"),
        ({"mode": "mxfp4", "bits": 8}, "bits=8 is not supported in mode mxfp4; choose from 4"),
        ({"mode": "nvfp4", "group_size": 32}, "group_size=32 is not supported in mode nvfp4; choose from 16"),
        ({"mode": "int4"}, "mode=int4 is not supported; choose from affine, mxfp4, nvfp4, mxfp8"),
        ({"recipe": "mixed_1_2"}, "recipe=mixed_1_2 is not supported; choose from mixed_2_6, "),
        ({"recipe": "mixed_2_6", "bits": 4}, "leave out bits=4"),
        ({"recipe": "mixed_2_6", "mode": "mxfp4"}, "leave out mode=mxfp4"),
        ({"vision_bits": 7}, "vision_bits=7 is not supported"),
        ({"router_bits": 1}, "router_bits=1 is not supported"),
    ],
)
def test_what_mlx_does_not_support_is_refused(options, words):
    with pytest.raises(InputError) as error:
        Quantization(**options)
    assert words in str(error.value)


def test_a_group_size_that_fits_no_layer_is_refused(tmp_path):
    write_checkpoint(tmp_path / "checkpoint", {"hidden_size": 64, "intermediate_size": 96})
    with pytest.raises(InputError, match="multiple of group_size=128; choose a smaller"):
        convert(tmp_path / "checkpoint", tmp_path / "model", quantization=Quantization(group_size=128))
    assert not (tmp_path / "model").exists()


def test_a_model_without_router_ignores_the_routers_bits(tmp_path):
    write_checkpoint(tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "model.safetensors"
    save_file({n: a for n, a in load_file(file).items() if not n.startswith("model.router.")}, file)
    model, _ = converted(tmp_path / "checkpoint", tmp_path, group_size=32, router_bits=8)
    assert quantized_layers(model).keys() == layers_of(model, "language_model")


@pytest.mark.parametrize("options", [{"bits": 8}, {"bits": 4}, {"recipe": "mixed_3_6"}, {"mode": "mxfp4"}], ids=str)
def test_a_quantized_model_computes_what_its_dequantized_weights_say(wide, original, tmp_path, options):
    quantized, _ = converted(wide, tmp_path, **options)
    convert(tmp_path / "model", tmp_path / "dequantized", dequantize=True)
    dequantized, _ = load(tmp_path / "dequantized")
    embeddings = mx.array(np.random.default_rng(0).normal(size=(1, 20, 128)).astype(np.float32))
    logits, expected, unquantized = (model(embeddings) for model in (quantized, dequantized, original[0]))
    assert mx.allclose(logits, expected, atol=1e-3)
    assert not mx.allclose(logits, unquantized, atol=1e-3)


@pytest.mark.parametrize("options", [{"bits": 8}, {"recipe": "mixed_3_6", "vision_bits": 8, "router_bits": 8}], ids=str)
def test_the_config_tells_mlx_lm_what_is_quantized_how(wide, tmp_path, options):
    model, _ = converted(wide, tmp_path, **options)
    recorded = json.loads((tmp_path / "model" / "config.json").read_text())["quantization"]
    usual = (recorded["mode"], recorded["bits"], recorded["group_size"])
    for path, found in quantized_layers(model).items():
        own = recorded.get(path)
        assert found == ((own["mode"], own["bits"], own["group_size"]) if own else usual)
