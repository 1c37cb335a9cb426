"""Each stage against the reference's numbers, in float32, after convert → load from disk."""

import functools

import mlx.core as mx
import numpy as np
import pytest
from conftest import CASES, GOLDEN, GRANULARITIES, Reference

from avg_mlx import generate
from avg_mlx.geometry import visual_token_count
from avg_mlx.inputs.image import make_crops
from avg_mlx.inputs.image_io import read_image
from avg_mlx.inputs.prompt import build_messages, encode_messages
from avg_mlx.model.router import text_filter
from avg_mlx.model.scaler import pool

TOLERANCE = 1e-3
ROUTER_TOLERANCE = 1e-4  # the router does not compute in the reference's order

pytestmark = pytest.mark.parametrize("case", range(len(CASES)))


def close(ours, reference, tolerance=TOLERANCE) -> None:
    ours = np.array(ours)
    assert ours.shape == reference.shape
    assert np.abs(ours - reference).max() < tolerance


@pytest.fixture(scope="module")
def crops_of(model):
    return functools.cache(lambda case: make_crops(read_image(GOLDEN / CASES[case]["image"]), model.config))


@pytest.fixture(scope="module")
def features_of(model, crops_of):
    return functools.cache(lambda case: model.encode(crops_of(case)))


def ids_of(case: int) -> list[int]:
    return Reference(case)("input_ids").tolist()


def test_prompt_ids(case, tokenizer):
    assert encode_messages(tokenizer, build_messages(CASES[case]["prompt"], images=1)) == ids_of(case)


def test_pixel_values(case, crops_of):
    crops = crops_of(case)
    assert len(crops) == CASES[case]["num_crops"]
    assert crops.image_size == tuple(CASES[case]["size"][::-1])
    close(crops.pixels.transpose(0, 3, 1, 2)[:, :, ::24, ::24], Reference(case)("pixel_values_sub"))


def test_features(case, features_of):
    close(features_of(case)[:, ::31], Reference(case)("image_features_sub"))


def test_scaler(case, model, features_of):
    close(pool(features_of(case), 36, model.config.vision.patch_grid), Reference(case)("coarsest_features"))


def test_text_filter(case, model, features_of):
    kept = text_filter(model.embed_text(ids_of(case)), features_of(case)[0], model.config.filtered_text_num)
    close(kept[:, :8], Reference(case)("filtered_text_sub"))


def test_router_logits(case, model, features_of):
    logits = model.route(features_of(case), model.embed_text(ids_of(case)))
    close(logits, Reference(case)("router_logits"), ROUTER_TOLERANCE)
    assert GRANULARITIES[mx.argmax(logits).item()] == CASES[case]["picked"]


def test_packed_lengths(case, model, crops_of):
    crops, text = crops_of(case), CASES[case]["prompt_tokens"]
    lengths = [
        text + visual_token_count(g, model.config.vision.patch_grid, crops.crop_grid, crops.image_size)
        for g in GRANULARITIES
    ]
    assert lengths == CASES[case]["sequence_lengths"]


def test_embeddings(case, model, crops_of, features_of):
    ids, features = ids_of(case), features_of(case)
    embeddings = model.splice(ids, model.embed_text(ids), [model.pack(features, 36, crops_of(case))])
    close(embeddings[::3], Reference(case)("coarsest_inputs_embeds_sub"))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_last_logits(case, granularity, model, crops_of, features_of):
    ids, features = ids_of(case), features_of(case)
    embeddings = model.splice(ids, model.embed_text(ids), [model.pack(features, granularity, crops_of(case))])
    level = GRANULARITIES.index(granularity)
    assert len(embeddings) == Reference(case)("sequence_lengths")[level]
    logits = model(embeddings[None])[0, -1]
    close(logits, Reference(case)("last_logits")[level])
    if granularity == CASES[case]["picked"]:
        close(logits, Reference(case)("auto_last_logits"))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_greedy_tokens_forced(case, granularity, model, tokenizer):
    expected = Reference(case)("greedy_per_granularity")[GRANULARITIES.index(granularity)]
    image = GOLDEN / CASES[case]["image"]
    answer = generate(model, tokenizer, CASES[case]["prompt"], image, granularity=granularity, max_tokens=12)
    assert list(answer.token_ids) == [token for token in expected.tolist() if token >= 0]
    assert answer.views[0].source == "forced"
    assert answer.views[0].routing is None


def test_greedy_tokens_adaptive(case, model, tokenizer):
    answer = generate(model, tokenizer, CASES[case]["prompt"], GOLDEN / CASES[case]["image"], max_tokens=24)
    assert answer.views[0].granularity == CASES[case]["picked"]
    assert answer.views[0].source == "router"
    assert list(answer.token_ids) == CASES[case]["token_ids"] == Reference(case)("greedy_auto").tolist()
    assert answer.text == CASES[case]["text"]
    close(answer.views[0].routing.logits, Reference(case)("router_logits"))
    assert answer.prompt_tokens == CASES[case]["sequence_lengths"][GRANULARITIES.index(CASES[case]["picked"])]
