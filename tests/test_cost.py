"""Counted work: section by section what the reference counts, and what MLX is really told to compute."""

import math
from collections.abc import Callable

import mlx.core as mx
import pytest
from conftest import write_checkpoint

from avg_mlx import convert, load
from avg_mlx.bench.cost import PARTS, PREFILL_STEP, Cost, Work
from avg_mlx.bench.presets import preset_keys
from avg_mlx.config import Config

TERA = 1e12
TEXT = 60
CROPS = 5  # of a 672×672 image
# TFLOP of one 672×672 image with 60 text tokens on the 7B, by tokens per crop, as the reference's authors give them,
# with half a unit of their last digit. At 72 and 288 they count rows that unpadding, as trained, cuts away.
PUBLISHED = {36: (3.4, 0.05), 72: (5.9, 0.05), 144: (10.7, 0.05), 288: (20.8, 0.05), 576: (41, 0.5)}
VISUAL_TOKENS = {36: 192, 72: 384, 144: 744, 288: 1488, 576: 2928}
TINY_CROPS = 3


@pytest.fixture(scope="module")
def released() -> Cost:
    """Of the 7B in 16 bits."""
    return Cost(Config.from_dict(preset_keys("7b")), dict.fromkeys(PARTS, 16))


def test_vision_and_projector_are_the_published_count(released):
    assert round(released.vision(CROPS).flop / TERA, 1) == 2.0


def test_the_references_router_is_the_published_count(released):
    assert round(released.reference_router(CROPS, TEXT).flop / TERA, 2) == 1.35


@pytest.mark.parametrize("granularity", PUBLISHED)
def test_prefill_grows_with_granularity_as_published(released, granularity):
    """From the coarsest on: nine positions more than 60 and the image's would give all five numbers themselves."""
    counted = {g: released.reference_prefill(VISUAL_TOKENS[g] + TEXT).flop / TERA for g in (36, granularity)}
    (published, rounding), (coarsest, _) = PUBLISHED[granularity], PUBLISHED[36]
    assert counted[granularity] - counted[36] == pytest.approx(published - coarsest, abs=rounding + 0.05)
    assert counted[granularity] == pytest.approx(published, abs=rounding + 0.08)
    nine_more = released.reference_prefill(VISUAL_TOKENS[granularity] + TEXT + 9).flop / TERA
    assert abs(nine_more - published) < rounding


def test_finest_to_coarsest_is_the_published_ratio(released):
    """Of the reference, and of what is run here."""

    def ratio(router: Work, prefill: Callable[[int], Work]) -> float:
        finest, coarsest = ((released.vision(CROPS) + router + prefill(n + TEXT)).flop for n in (2928, 192))
        return finest / coarsest

    assert round(ratio(released.reference_router(CROPS, TEXT), released.reference_prefill), 1) == 6.7
    assert ratio(released.router(CROPS, TEXT), released.prefill) > 6.7


def test_what_is_run_is_less_than_the_references(released):
    assert released.router(CROPS, TEXT).flop < 0.8 * released.reference_router(CROPS, TEXT).flop
    assert released.prefill(252).flop < released.reference_prefill(252).flop


def test_a_decoding_step_reads_the_language_models_weights_and_the_cache_once(released):
    weights = 2 * (6_738_415_616 - 32000 * 4096)  # but for the embeddings' table
    cache = 524_288 * 2988  # docs/full-size.md
    assert released.decode(2988).bytes == pytest.approx(weights + cache, rel=1e-3)


@pytest.mark.parametrize("positions", [1, 2, PREFILL_STEP, PREFILL_STEP + 1, PREFILL_STEP + 2, 3 * PREFILL_STEP])
def test_prefill_in_steps_computes_the_same_but_for_the_last_layer(released, positions):
    """Steps read the weights anew."""
    layers = released.config.text["num_hidden_layers"]
    all_layers = released.reference_prefill(positions)
    last = 1 / layers * (all_layers.flop - released.reference_prefill(1).flop)
    assert all_layers.flop - last <= released.prefill(positions).flop <= all_layers.flop
    steps = math.ceil((positions - 1) / PREFILL_STEP) + 1
    weights = released.decode(1).bytes
    assert steps * weights * (layers - 1) / layers < released.prefill(positions).bytes


def test_fewer_bits_move_fewer_bytes_for_the_same_operations(released):
    four = Cost(released.config, dict.fromkeys(PARTS, 16) | {"language_model": 4.5})
    assert four.decode(100).flop == released.decode(100).flop
    assert 3.4 < released.decode(100).bytes / four.decode(100).bytes < 16 / 4.5
    assert four.vision(CROPS) == released.vision(CROPS)


def test_a_stage_takes_as_long_as_its_narrower_side():
    work = Work(flop=6e12, bytes=2e9)
    assert work.seconds(2e12, 100e9) == 3
    assert work.seconds(600e12, 100e9) == 0.02


def test_work_adds_up():
    assert Work(1, 2) + 3 * Work(4, 5) == Work(13, 17)


def computed(function: Callable, *arguments: mx.array) -> int:
    """Operations of all products in the graph that MLX builds for a call."""
    products: list[int] = []

    def count(record: dict) -> None:
        if record["type"] != "primitive":
            return
        name, inputs, [output] = record["name"], record["inputs"], record["outputs"][:1]
        if name in ("Matmul", "AddMM"):
            products.append(2 * math.prod(output[1]) * inputs[0][1][-1])
        elif name == "Convolution":
            products.append(2 * math.prod(output[1]) * math.prod(inputs[1][1][1:]))
        elif name == "ScaledDotProductAttention":
            (batch, heads, queries, width), keys = inputs[0][1], inputs[1][1][2]
            products.append(4 * batch * heads * queries * keys * width)

    mx.export_function(count, function, *arguments)
    return sum(products)


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2"])
def tiny(request, tmp_path_factory):
    """(model, tokenizer) of TINY sizes, with each language model."""
    folder = tmp_path_factory.mktemp(request.param)
    write_checkpoint(folder / "checkpoint", {"model_type": f"llava_{request.param}"})
    convert(folder / "checkpoint", folder / "model")
    return load(folder / "model")


@pytest.fixture(scope="module")
def counted(tiny) -> Cost:
    return Cost(tiny[0].config, dict.fromkeys(PARTS, 32), 32)


def test_vision_is_what_mlx_computes(tiny, counted):
    model, _ = tiny
    size = model.config.vision.image_size
    features = computed(lambda x: model.projector(model.vision_tower(x)), mx.zeros((TINY_CROPS, size, size, 3)))
    assert features == counted.vision(TINY_CROPS).flop


@pytest.mark.parametrize("text", [3, 40])
def test_routing_is_what_mlx_computes(tiny, counted, text):
    model, _ = tiny
    D = model.config.hidden_size
    shown = computed(model.route, mx.ones((TINY_CROPS, 16, D)), mx.ones((text, D)))
    assert shown == counted.router(TINY_CROPS, text).flop


@pytest.mark.parametrize("positions", [1, 2, 50])
def test_a_prompt_in_one_go_is_what_mlx_computes(tiny, counted, positions):
    """But for the scores above the diagonal, and the logits of all positions but the last."""
    model, _ = tiny
    config = model.config
    shown = computed(model, mx.ones((1, positions, config.hidden_size)))
    unseen = positions * (positions - 1) // 2 * 4 * config.hidden_size * config.text["num_hidden_layers"]
    logits = 2 * (positions - 1) * config.hidden_size * config.vocab_size
    assert shown - unseen - logits == counted.reference_prefill(positions).flop


def test_filling_the_cache_is_what_mlx_computes(tiny, counted):
    """As mlx-lm's generate_step asks for it: the cache's arrays, and then the last position's logits."""
    from mlx_lm.models.cache import make_prompt_cache

    model, _ = tiny
    config, positions = model.config, 20
    D, layers = config.hidden_size, config.text["num_hidden_layers"]

    def fill(embeddings: mx.array) -> list[mx.array]:
        cache = make_prompt_cache(model.language_model)
        model.hidden(embeddings, cache)
        return [array for layer in cache for array in (layer.keys, layer.values)]

    cached = make_prompt_cache(model.language_model)
    mx.eval(model.hidden(mx.ones((1, positions - 1, D)), cached))
    last = computed(lambda x: model(x, cached), mx.ones((1, 1, D)))
    filled = computed(fill, mx.ones((1, positions - 1, D)))
    unseen = (positions - 1) * (positions - 2) // 2 * 4 * D * (layers - 1)
    assert last == counted.decode(positions).flop
    assert filled - unseen == counted.fill(positions - 1).flop
    assert counted.fill(positions - 1) + counted.decode(positions) == counted.prefill(positions)


def test_the_tiny_model_is_told_apart_in_all_its_widths(tiny):
    """So that a count with two of them swapped would be seen."""
    config = tiny[0].config
    text, vision = config.text, config.vision
    widths = [text["hidden_size"], text["intermediate_size"], vision.hidden_size, vision.intermediate_size]
    assert len(set(widths)) == 4
    assert text["num_key_value_heads"] < text["num_attention_heads"]
