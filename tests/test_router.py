"""The router against its steps written with NumPy, and what crops may know of each other."""

import json
import math
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from arithmetic import erf, layer_norm, linear
from conftest import CHECKPOINT, TINY, TINY_TOWER
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_map

from avg_mlx.config import Config
from avg_mlx.model.router import CropMixer, Router, text_filter
from avg_mlx.model.scaler import pyramid

D = 64
HEADS = 8


def to_pyramid(x: mx.array) -> mx.array:
    """Of TINY's crops."""
    return pyramid(x, TINY["vis_token_granularity"], (4, 4))


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def specified_filter(text: np.ndarray, base_features: np.ndarray, count: int) -> np.ndarray:
    """Section 5: every token's mean cosine with every base feature; the best in falling order, then zeros."""
    cosines = [[t @ f / np.linalg.norm(t) / np.linalg.norm(f) for f in base_features] for t in text]
    order = np.argsort(-np.mean(cosines, axis=1), kind="stable")[:count]
    return np.concatenate([text[order], np.zeros((count - len(order), text.shape[1]))])


def specified_mixer(x: np.ndarray, mixer: CropMixer) -> np.ndarray:
    """Section 6.1 for (crops, positions, D): one position and one head after another, across crops."""
    query, key, value = (
        linear(x, layer) for layer in (mixer.attention.query_proj, mixer.attention.key_proj, mixer.attention.value_proj)
    )
    mixed = np.zeros_like(x)
    width = x.shape[-1] // HEADS
    for position in range(x.shape[1]):
        for head in range(HEADS):
            part = np.s_[:, position, head * width : (head + 1) * width]
            attention = softmax(query[part] @ key[part].T / math.sqrt(width))
            mixed[part] = attention @ value[part]
    x = layer_norm(x + linear(mixed, mixer.attention.out_proj), mixer.norm1)
    return layer_norm(x + linear(np.maximum(linear(x, mixer.linear1), 0), mixer.linear2), mixer.norm2)


def specified_logits(router: Router, levels: np.ndarray, features: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Section 6 as a whole."""
    kept = specified_filter(text, features[0], router.filtered_text_num)
    x = np.stack([np.concatenate([crop, kept]) for crop in levels])
    x = specified_mixer(x, router.crop_mixer)
    hidden = linear(x, router.scorer.linear1)
    scores = linear(hidden * (1 + erf(hidden / math.sqrt(2))) / 2, router.scorer.linear2)
    votes = np.einsum("cpg,p->cg", scores, np.array(router.voter)[:, 0])
    return layer_norm(votes.mean(axis=0), router.logit_norm)


def randomize(module: nn.Module) -> nn.Module:
    random = np.random.default_rng(0)
    module.update(tree_map(lambda x: mx.array(random.normal(0, 0.3, x.shape).astype(np.float32)), module.parameters()))
    return module.eval()


@pytest.fixture(scope="module")
def config() -> Config:
    keys = json.loads((CHECKPOINT / "config.json").read_text()) | TINY
    tower = json.loads((CHECKPOINT / "clip" / "config.json").read_text()) | TINY_TOWER
    return Config.from_dict(keys | {"vision_config": tower})


@pytest.fixture(scope="module")
def router(config):
    return randomize(Router(config))


@pytest.fixture(scope="module")
def mixer():
    return randomize(CropMixer(D))


@contextmanager
def in_training(module: nn.Module):
    module.train()
    try:
        yield
    finally:
        module.eval()


def unpooled(x: mx.array) -> mx.array:
    return x


def random(*shape: int) -> mx.array:
    return mx.array(np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32))


@pytest.mark.parametrize("count", [0, 5])
def test_a_router_that_keeps_no_text_sees_the_image_only(config, count):
    router = randomize(Router(replace(config, filtered_text_num=count)))
    features, other = random(3, 16, D), random(2, 16, D)
    logits, asked, looked = (
        np.array(router(x, text, to_pyramid))
        for x, text in ((features, random(7, D)), (features, random(9, D)), (other, random(7, D)))
    )
    assert np.array_equal(logits, asked) == (count == 0)
    assert not np.array_equal(logits, looked)


@pytest.mark.parametrize("crops", [1, 3, 5])
@pytest.mark.parametrize("tokens", [3, 5, 40], ids=lambda n: f"{n} text tokens")
def test_logits_are_the_specified_ones(config, router, crops, tokens):
    features, text = random(crops, 16, D), random(tokens, D)
    logits = router(features, text, to_pyramid)
    expected = specified_logits(router, np.array(to_pyramid(features)), np.array(features), np.array(text))
    assert logits.shape == (len(config.granularities),)
    assert np.allclose(np.array(logits), expected, atol=1e-4)


def test_the_scorer_has_an_exact_gelu(router):
    x = random(50, D)
    hidden = linear(np.array(x), router.scorer.linear1)
    expected = linear(hidden * (1 + erf(hidden / math.sqrt(2))) / 2, router.scorer.linear2)
    assert np.allclose(np.array(router.scorer(x)), expected, atol=1e-5)


def test_the_voter_weighs_positions_in_the_order_of_the_pyramid(router):
    features, text = random(2, 16, D), random(5, D)
    reverse = router(features, text, lambda x: to_pyramid(x)[:, ::-1])
    assert not mx.allclose(router(features, text, to_pyramid), reverse, atol=1e-3)


def test_local_crops_vote_alike(router):
    """Attention and mean know no order of crops; only the text filter asks for the base crop, the first."""
    features, text = random(4, 16, D), random(5, D)
    turned = features[mx.array([0, 3, 1, 2])]
    logits = [router(x, text, to_pyramid) for x in (features, turned)]
    assert mx.allclose(*logits, atol=1e-4)


def test_dropout_is_only_for_training(router):
    features, text = random(2, 16, D), random(5, D)
    assert mx.array_equal(router(features, text, to_pyramid), router(features, text, to_pyramid))
    with in_training(router):
        assert not mx.array_equal(router(features, text, to_pyramid), router(features, text, to_pyramid))


@pytest.mark.parametrize(("training", "readers"), [(False, 1), (True, 3)], ids=["evaluating", "training"])
def test_a_layer_gets_no_more_rows_than_it_must(router, training, readers, monkeypatch):
    """Patches are projected before they are pooled; crops read the text together, unless it drops out for each."""
    rows: Counter[int] = Counter()
    call = nn.Linear.__call__

    def count(layer: nn.Linear, x: mx.array) -> mx.array:
        rows[id(layer)] += x.size // x.shape[-1]
        return call(layer, x)

    monkeypatch.setattr(nn.Linear, "__call__", count)
    with in_training(router) if training else nullcontext():
        router(random(3, 16, D), random(9, D), to_pyramid)
    attention, mixer, scorer = router.crop_mixer.attention, router.crop_mixer, router.scorer
    text = readers * TINY["filtered_text_num"]
    for layer in (attention.query_proj, attention.key_proj, attention.value_proj):
        assert rows.pop(id(layer)) == 3 * 16 + text
    for layer in (attention.out_proj, mixer.linear1, mixer.linear2, scorer.linear1, scorer.linear2):
        assert rows.pop(id(layer)) == 3 * (1 + 2 + 4 + 8 + 16) + text
    assert not rows


def test_the_mixer_is_the_specified_layer(mixer):
    x = random(3, 7, D)
    assert np.allclose(np.array(mixer(x, unpooled)), specified_mixer(np.array(x), mixer), atol=1e-4)


@given(order=st.permutations(range(6)))
def test_permuted_positions_give_permuted_outputs(mixer, order):
    x, order = random(3, 6, D), mx.array(order)
    assert mx.allclose(mixer(x[:, order], unpooled), mixer(x, unpooled)[:, order], atol=1e-5)


@pytest.mark.parametrize("position", [0, 3, 5])
@pytest.mark.parametrize("crop", [0, 2])
def test_a_changed_token_reaches_its_position_in_all_crops_and_nothing_else(mixer, position, crop):
    x = random(3, 6, D)
    changed = mx.array(x)
    changed[crop, position] = random(D)
    moved = mx.abs(mixer(changed, unpooled) - mixer(x, unpooled)).max(axis=-1) > 1e-4  # (crops, positions)
    expected = mx.zeros((3, 6), dtype=mx.bool_)
    expected[:, position] = True
    assert mx.array_equal(moved, expected)


@given(st.integers(1, 12), st.integers(1, 12))
def test_the_text_filter_keeps_the_most_similar_in_falling_order(tokens, count):
    text, base_features = random(tokens, D), random(9, D)
    kept = np.array(text_filter(text, base_features, count))
    assert kept.shape == (count, D)
    assert np.array_equal(kept, specified_filter(np.array(text), np.array(base_features), count))
    assert not kept[tokens:].any()


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_similarity_is_a_cosine(scale):
    """Only directions count, of the text and of each base feature."""
    text, base_features = random(10, D), random(9, D)
    scaled = base_features * mx.array([scale] + [1] * 8)[:, None]
    assert mx.array_equal(text_filter(text, scaled, 4), text_filter(text, base_features, 4))
    scaled = text * mx.array([scale] + [1] * 9)[:, None]
    kept, expected = (text_filter(x, base_features, 10) for x in (scaled, text))
    directions = [x / mx.linalg.norm(x, axis=-1, keepdims=True) for x in (kept, expected)]
    assert mx.allclose(*directions, atol=1e-5)


def test_text_without_direction_does_no_harm():
    """An embedding of zeros, as of padding, is not like anything."""
    text = mx.concatenate([mx.zeros((1, D)), mx.ones((1, D))])
    kept = text_filter(text, mx.ones((4, D)), 2)
    assert kept.tolist() == [[1.0] * D, [0.0] * D]
