"""A model in half precision computes in it from pixels to logits, quantized or not."""

from collections import defaultdict

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import PHOTO
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from avg_mlx import Quantization, convert, load
from avg_mlx.inputs.image import make_crops
from avg_mlx.inputs.image_io import read_image
from avg_mlx.inputs.prompt import PLACEHOLDER_ID
from avg_mlx.model.scaler import pyramid

QUANTIZATIONS = {
    "unquantized": None,
    "4 bits": Quantization(bits=4, group_size=32),
    "all at 8 bits": Quantization(bits=8, group_size=32, vision_bits=8, router_bits=8),
    "mxfp4": Quantization(mode="mxfp4"),
    "nvfp4": Quantization(mode="nvfp4"),
    "mxfp8": Quantization(mode="mxfp8"),
    "mixed_3_6": Quantization(recipe="mixed_3_6", group_size=32),
}
KV_CACHES = {"plain": lambda cache: cache, "quantized": lambda cache: [c.to_quantized(32, 8) for c in cache]}


@pytest.fixture(scope="module", params=QUANTIZATIONS.values(), ids=QUANTIZATIONS)
def quantization(request):
    return request.param


@pytest.fixture(scope="module", params=["float16", "bfloat16"])
def dtype(request):
    return getattr(mx, request.param)


@pytest.fixture(scope="module")
def model(tiny_checkpoint, tmp_path_factory, dtype, quantization):
    folder = tmp_path_factory.mktemp("half") / "model"
    convert(tiny_checkpoint, folder, dtype=str(dtype).rpartition(".")[2], quantization=quantization)
    return load(folder)[0]


@pytest.mark.parametrize("kv_cache", KV_CACHES.values(), ids=KV_CACHES)
def test_no_stage_is_promoted_to_float32(model, dtype, kv_cache):
    config, ids = model.config, [1, PLACEHOLDER_ID, 7, 8]
    crops = make_crops(read_image(PHOTO), config)
    tower, text, cache = (
        model.run_tower(crops),
        model.embed_text(ids),
        kv_cache(make_prompt_cache(model.language_model)),
    )
    features = model.projector(tower)
    visual_tokens = model.pack(features, config.finest, crops)
    embeddings = model.splice(ids, text, [visual_tokens])
    hidden = model.hidden(embeddings[None], cache)
    stages = {
        "weights": floats_of(model.parameters()),
        "vision tower": [tower],
        "features": [features],
        "pyramid": [pyramid(features, config.granularities, config.vision.patch_grid)],
        "router": [model.route(features, text)],
        "visual tokens": [visual_tokens],
        "text": [text],
        "embeddings": [embeddings],
        "hidden": [hidden],
        "logits": [model.head(hidden)],
        "next logits": [model.language_model(mx.array([[9]]), cache=cache)],
        "KV": floats_of([layer.state for layer in cache]),
    }
    found = {stage: {array.dtype for array in arrays} for stage, arrays in stages.items()}
    assert found == {stage: {dtype} for stage in stages}


def test_no_layer_is_promoted_to_float32(model, dtype, monkeypatch):
    """Whatever happens between the stages: every layer's result, in training's dropout and decoding too."""
    seen = defaultdict(set)
    for kind in {type(module) for module in model.modules()}:
        record_results(kind, seen, monkeypatch)
    crops = make_crops(read_image(PHOTO), model.config)
    features, text = model.encode(crops), model.embed_text([1, 7, 8])
    model.route(features, text)
    cache = make_prompt_cache(model.language_model)
    model(text[None], cache)
    model.language_model(mx.array([[9]]), cache=cache)
    assert {
        "VisionTower",
        "Projector",
        "Router",
        "CropAttention",
        "Scorer",
        "Attention",
        "MLP",
        "RMSNorm",
    } <= seen.keys()
    assert dict(seen) == {name: {dtype} for name in seen}


def record_results(kind: type[nn.Module], seen: dict[str, set[mx.Dtype]], monkeypatch) -> None:
    """Note the dtype of all that modules of a kind return from now on."""
    if not callable(call := vars(kind).get("__call__")):
        return

    def record(module, *inputs, **options):
        result = call(module, *inputs, **options)
        seen[kind.__name__].add(result.dtype)
        return result

    monkeypatch.setattr(kind, "__call__", record)


def floats_of(tree) -> list[mx.array]:
    """Arrays of numbers, as packed weights are not."""
    return [x for _, x in tree_flatten(tree) if isinstance(x, mx.array) and mx.issubdtype(x.dtype, mx.floating)]
