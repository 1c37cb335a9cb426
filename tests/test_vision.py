"""The vision tower and projector against NumPy, and models of other shapes from checkpoint to answer."""

import json
import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from arithmetic import erf, layer_norm, linear
from conftest import CHECKPOINT, TINY, TINY_TOWER, write_checkpoint
from mlx.utils import tree_map
from PIL import Image

from avg_mlx import convert, generate, load, route
from avg_mlx.config import Config, VisionConfig
from avg_mlx.model.avg_llava import Model
from avg_mlx.model.inventory import tensors_of
from avg_mlx.model.vision import ACTIVATIONS as OURS
from avg_mlx.model.vision import EncoderLayer, Projector, VisionTower

KEYS = json.loads((CHECKPOINT / "config.json").read_text()) | TINY
TOWER = json.loads((CHECKPOINT / "clip" / "config.json").read_text()) | TINY_TOWER


def randomize(module: nn.Module) -> nn.Module:
    random = np.random.default_rng(0)
    module.update(tree_map(lambda x: mx.array(random.normal(0, 0.3, x.shape).astype(np.float32)), module.parameters()))
    return module


def gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + erf(x / math.sqrt(2))) / 2


ACTIVATIONS = {"gelu": gelu, "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x))}


def specified_layer(x: np.ndarray, layer: EncoderLayer, heads: int, activation: str) -> np.ndarray:
    """A pre-norm Transformer layer for one crop's (tokens, D)."""
    y = layer_norm(x, layer.layer_norm1)
    attention = layer.attention
    query, key, value = (linear(y, p) for p in (attention.query_proj, attention.key_proj, attention.value_proj))
    mixed = np.zeros_like(x)
    width = x.shape[-1] // heads
    for head in range(heads):
        part = np.s_[:, head * width : (head + 1) * width]
        weights = np.exp(query[part] @ key[part].T / math.sqrt(width))
        mixed[part] = weights / weights.sum(axis=-1, keepdims=True) @ value[part]
    x = x + linear(mixed, attention.out_proj)
    return x + linear(ACTIVATIONS[activation](linear(layer_norm(x, layer.layer_norm2), layer.fc1)), layer.fc2)


def specified_tower(pixels: np.ndarray, tower: VisionTower, vision: VisionConfig) -> np.ndarray:
    """CLIP's encoder for one crop: (size, size, 3) → (patches, D)."""
    side, patch = vision.patch_grid[0], vision.patch_size
    patches = pixels.reshape(side, patch, side, patch, 3).swapaxes(1, 2).reshape(side * side, -1)
    x = patches @ np.array(tower.patch_embedding.weight).reshape(vision.hidden_size, -1).T
    x = np.concatenate([np.array(tower.class_embedding)[None], x]) + np.array(tower.position_embedding)
    x = layer_norm(x, tower.pre_layernorm)
    for layer in tower.layers:
        x = specified_layer(x, layer, vision.num_attention_heads, vision.hidden_act)
    return x[1:]


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_activations_are_exact(activation):
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    assert np.allclose(np.array(OURS[activation](mx.array(x))), ACTIVATIONS[activation](x), atol=1e-6)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("layers", [0, 1, 3])
def test_the_tower_is_clips_encoder_up_to_a_layer(activation, layers):
    vision = VisionConfig.from_dict(TOWER | {"hidden_act": activation})
    tower = randomize(VisionTower(vision, layers))
    pixels = np.random.default_rng(1).normal(size=(2, 56, 56, 3)).astype(np.float32)
    features = np.array(tower(mx.array(pixels)))
    assert features.shape == (2, 16, 32)
    assert np.allclose(features, [specified_tower(crop, tower, vision) for crop in pixels], atol=1e-3)


@pytest.mark.parametrize(("select_layer", "layers"), [(-1, 3), (-2, 2), (0, 0), (3, 3)])
def test_only_the_layers_that_are_used_are_kept(select_layer, layers):
    model = Model(Config.from_dict(KEYS | {"vision_config": TOWER, "mm_vision_select_layer": select_layer}))
    assert len(model.vision_tower.layers) == layers
    assert not any("post_layernorm" in name for name in tensors_of(model))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_projector_layers_have_exact_gelus_between_them(depth):
    config = Config.from_dict(KEYS | {"vision_config": TOWER, "mm_projector_type": f"mlp{depth}x_gelu"})
    projector = randomize(Projector(config))
    x = np.random.default_rng(1).normal(size=(2, 16, 32)).astype(np.float32)
    expected = linear(x, projector.layers[0])
    for layer in projector.layers[1:]:
        expected = linear(gelu(expected), layer)
    assert len(projector.layers) == depth
    assert np.allclose(np.array(projector(mx.array(x))), expected, atol=1e-4)


SHAPES = {
    "16×16 patches": (
        {
            "vis_token_granularity": [16, 32, 64, 128, 256],
            "image_grid_pinpoints": "[[224, 448], [448, 224], [448, 448]]",
            "max_position_embeddings": 4096,
        },
        {"image_size": 224},
    ),
    "patches of 7": ({"vis_token_granularity": [4, 16, 64]}, {"patch_size": 7}),
    "quick_gelu": ({}, {"hidden_act": "quick_gelu"}),
    "no GQA": ({"num_key_value_heads": 2}, {}),
    "tied embeddings": ({"tie_word_embeddings": True}, {}),
    "projector of depth 1": ({"mm_projector_type": "mlp1x_gelu"}, {}),
    "projector of depth 3": ({"mm_projector_type": "mlp3x_gelu"}, {}),
    "last layer": ({"mm_vision_select_layer": -1}, {}),
    "embeddings only": ({"mm_vision_select_layer": 0}, {}),
    "two granularities, finest first": ({"vis_token_granularity": [16, 2]}, {}),
    "one pinpoint": ({"image_grid_pinpoints": [[168, 168]]}, {}),
    "pad": ({"image_aspect_ratio": "pad"}, {}),
    "one filtered text token": ({"filtered_text_num": 1}, {}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_of_another_shape_goes_from_checkpoint_to_answer(tmp_path, shape):
    changes, tower = SHAPES[shape]
    tensors = write_checkpoint(tmp_path / "checkpoint", changes, tower)
    convert(tmp_path / "checkpoint", tmp_path / "model")
    model, tokenizer = load(tmp_path / "model")
    loaded = tensors_of(model)
    assert loaded.keys() == tensors.keys()
    assert all(np.array_equal(np.array(loaded[name]), array) for name, array in tensors.items())

    photo = Image.effect_mandelbrot((64, 48), (-2, -1, 1, 1), 50).convert("RGB")
    (view,) = route(model, tokenizer, "Why?", photo)
    granularities = changes.get("vis_token_granularity", TINY["vis_token_granularity"])
    assert view.routing.granularities == tuple(granularities)
    assert view.granularity == view.routing.choice
    for granularity in granularities:
        answer = generate(model, tokenizer, "Why?", photo, granularity=granularity, max_tokens=3)
        assert answer.prompt_tokens == len(answer.prompt_token_ids) - 1 + answer.views[0].visual_tokens
        if shape == "pad":
            assert (answer.views[0].crops, answer.views[0].crop_grid) == (1, (0, 0))
            assert answer.views[0].visual_tokens == granularity
        else:
            assert answer.views[0].visual_tokens > granularity


def test_grouped_queries_share_keys_and_values(tmp_path):
    """With its key and value heads repeated, a grouped model is an ordinary one."""
    tensors = write_checkpoint(tmp_path / "grouped", {"num_attention_heads": 4, "num_key_value_heads": 2})
    convert(tmp_path / "grouped", tmp_path / "model")
    grouped, _ = load(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text()) | {"num_key_value_heads": 4}
    full = Model(Config.from_dict(config))
    spread = {
        name: array.reshape(2, 16, 64).repeat(2, axis=0).reshape(64, 64)
        if "k_proj" in name or "v_proj" in name
        else array
        for name, array in tensors.items()
        if name.startswith("language_model.")
    }
    full.load_weights([(name, mx.array(array)) for name, array in spread.items()], strict=False)
    embeddings = mx.random.normal((1, 9, 64))
    assert mx.allclose(full(embeddings), grouped(embeddings), atol=1e-3)


def test_tied_embeddings_are_the_output_head(tmp_path):
    tensors = write_checkpoint(tmp_path / "checkpoint", {"tie_word_embeddings": True})
    assert "language_model.lm_head.weight" not in tensors
    convert(tmp_path / "checkpoint", tmp_path / "model")
    model, _ = load(tmp_path / "model")
    embeddings = mx.random.normal((1, 3, 64))
    hidden = model.language_model.model(mx.zeros((1, 3), mx.int32), None, embeddings)
    expected = hidden @ mx.array(tensors["language_model.model.embed_tokens.weight"]).T
    assert mx.allclose(model(embeddings), expected, atol=1e-4)
