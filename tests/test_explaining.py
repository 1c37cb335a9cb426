"""The router's vote taken apart: against the reference's logits, against slow sums, and as maps over the image."""

import dataclasses
import itertools
import json
import math
import re

import mlx.core as mx
import numpy as np
import pytest
from arithmetic import layer_norm
from conftest import CASES, GOLDEN, GRANULARITIES, PHOTO, TINY, Reference
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_map
from PIL import Image

from avg_mlx import InputError, OptionError, explain, load, route
from avg_mlx.config import Config
from avg_mlx.explaining.evidence import take_apart
from avg_mlx.explaining.heat import fit, overlaps, spread_over_image, spread_over_patches
from avg_mlx.geometry import poolings, token_grid
from avg_mlx.inputs.prompt import PLACEHOLDER_ID
from avg_mlx.model.router import Router
from avg_mlx.model.scaler import pyramid

EXACT = 1e-4
QUESTION = "What is this?"


@pytest.fixture(scope="module", params=range(len(CASES)), ids=lambda case: CASES[case]["image"])
def golden(request, model, tokenizer):
    """(case, explanation) of each golden case."""
    case = CASES[request.param]
    [explanation] = explain(model, tokenizer, case["prompt"], GOLDEN / case["image"])
    return request.param, explanation


@pytest.fixture(scope="module")
def explained(tiny):
    """The photo's explanation by the tiny model."""
    return explain(*tiny, QUESTION, PHOTO)[0]


def added_up(votes) -> np.ndarray:
    """All votes, one after the other."""
    total = np.array(votes.unfilled)
    for word in votes.words:
        total = total + np.array(word.votes)
    for level in votes.levels:
        for crop, row, column in itertools.product(*map(range, level.shape[:3])):
            total = total + level[crop, row, column]
    return total


def normalized(votes, sums: np.ndarray) -> np.ndarray:
    return (sums - sums.mean()) / math.sqrt(sums.var() + votes.eps) * votes.weight + votes.bias


# The golden cases


def test_the_norm_of_the_votes_sums_is_the_references_logits(golden):
    case, explanation = golden
    logits = normalized(explanation.votes, added_up(explanation.votes))
    assert np.abs(logits - Reference(case)("router_logits")).max() < EXACT
    assert np.abs(logits - explanation.view.routing.logits).max() < EXACT


def test_the_votes_sums_are_what_the_router_normalizes(golden, model, monkeypatch, tokenizer):
    """Seen from inside: the array that reaches the last LayerNorm."""
    case, explanation = golden
    seen = []
    norm = type(model.router.logit_norm)
    call = norm.__call__
    here = model.router.logit_norm
    monkeypatch.setattr(norm, "__call__", lambda self, x: (seen.append(x) if self is here else None, call(self, x))[1])
    route(model, tokenizer, CASES[case]["prompt"], GOLDEN / CASES[case]["image"])
    [sums] = seen
    assert np.abs(np.array(sums) - explanation.votes.sums).max() < EXACT
    assert np.abs(np.array(sums) - added_up(explanation.votes)).max() < EXACT


def test_every_comparison_adds_up_to_the_difference_of_logits(golden):
    _, explanation = golden
    logits = dict(zip(GRANULARITIES, explanation.view.routing.logits, strict=True))
    for choice, over in itertools.permutations(GRANULARITIES, 2):
        evidence = explanation.votes.evidence(choice, over)
        parts = [level.sum() for level in evidence.levels] + [*evidence.words, evidence.unfilled, evidence.bias]
        assert math.fsum(parts) == pytest.approx(logits[choice] - logits[over], abs=EXACT)
        assert evidence.total == pytest.approx(math.fsum(parts))
        assert evidence.image == pytest.approx(math.fsum(parts[: len(GRANULARITIES)]))


def test_the_choice_is_compared_with_each_other_granularity_the_likeliest_first(golden):
    case, explanation = golden
    best, *others = sorted(GRANULARITIES, key=lambda g: -Reference(case)("router_logits")[GRANULARITIES.index(g)])
    compared = explanation.comparisons()
    assert [evidence.over for evidence in compared] == others
    assert {evidence.choice for evidence in compared} == {best}
    assert all(evidence.total > 0 for evidence in compared)  # or it would not be the choice


def test_levels_are_the_grids_of_the_pyramid_in_each_crop(golden):
    case, explanation = golden
    shapes = [(CASES[case]["num_crops"], *token_grid(g, (24, 24)), len(GRANULARITIES)) for g in GRANULARITIES]
    assert [level.shape for level in explanation.votes.levels] == shapes
    assert [level.granularity for level in explanation.levels] == list(GRANULARITIES)
    assert [level.visual_tokens for level in explanation.levels] == [
        length - CASES[case]["prompt_tokens"] for length in CASES[case]["sequence_lengths"]
    ]


def test_kept_words_are_tokens_of_the_prompt_at_their_positions(golden, tokenizer):
    case, explanation = golden
    ids = Reference(case)("input_ids").tolist()
    words = explanation.votes.words
    assert len(words) == min(32, len(ids) - 1)
    assert len({word.position for word in words}) == len(words)
    for word in words:
        assert ids[word.position] == word.id != PLACEHOLDER_ID
        decoded = tokenizer.backend_tokenizer.decode([word.id], skip_special_tokens=False)
        assert word.text == decoded or (decoded, word.text) == ("", " ") or word.text.startswith("<0x")


def test_the_map_over_the_image_and_what_lies_on_padding_are_all_the_images_evidence(golden):
    _, explanation = golden
    for evidence in explanation.to_dict()["evidence"]:
        assert np.sum(evidence["heat"]) + evidence["padding"] == pytest.approx(evidence["image"], abs=EXACT)
        parts = [evidence["image"], *evidence["words"], evidence["unfilled"], evidence["bias"]]
        assert evidence["total"] == pytest.approx(sum(parts))


# Routers at random


@st.composite
def configurations(draw) -> Config:
    side = draw(st.sampled_from([4, 7, 8]))
    granularities = draw(st.lists(st.sampled_from(poolings((side, side))), min_size=2, max_size=5, unique=True))
    changes = {"vis_token_granularity": granularities, "filtered_text_num": draw(st.integers(0, 9)), "hidden_size": 16}
    keys = json.loads((GOLDEN / "checkpoint" / "config.json").read_text()) | TINY | changes
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1}
    config = keys | {"image_grid_pinpoints": [[side * 14, side * 28], [side * 28, side * 28]]}
    return Config.from_dict(config | {"vision_config": tower | {"image_size": side * 14, "patch_size": 14}})


@settings(max_examples=25)
@given(configurations(), st.integers(1, 5), st.integers(1, 12), st.integers(0, 1000))
def test_votes_add_up_for_any_router(config, crops, tokens, seed):
    random = np.random.default_rng(seed)
    router = Router(config)
    parameters = tree_map(lambda x: mx.array(random.normal(0, 0.5, x.shape).astype(np.float32)), router.parameters())
    router.update(parameters)
    router.eval()
    patch_grid = config.vision.patch_grid
    features = mx.array(random.normal(size=(crops, math.prod(patch_grid), 16)).astype(np.float32))
    text = mx.array(random.normal(size=(tokens, 16)).astype(np.float32))

    def pool(x: mx.array) -> mx.array:
        return pyramid(x, config.granularities, patch_grid)

    words = [(n, n + 100, f"word {n}") for n in range(tokens)]
    votes = take_apart(config, router, router.score(features, text, pool), words)
    scale = max(1.0, float(np.abs(votes.sums).max()))
    assert np.abs(votes.sums - added_up(votes)).max() < EXACT * scale
    logits = np.array(router(features, text, pool))
    assert np.abs(layer_norm(votes.sums, router.logit_norm) - logits).max() < 1e-3
    assert len(votes.words) == min(tokens, config.filtered_text_num)
    assert all(word.text == f"word {word.position}" for word in votes.words)
    first, second = config.granularities[:2]
    assert votes.evidence(first, second).total == pytest.approx(logits[0] - logits[1], abs=2e-3)


def test_the_image_says_the_same_whatever_is_asked(tiny):
    """As trained: positions of the image never see the words, so only the norm weighs their votes differently."""
    one, other = (explain(*tiny, question, PHOTO)[0].votes for question in (QUESTION, "Is there a dog in the garden?"))
    for here, there in zip(one.levels, other.levels, strict=True):
        assert np.allclose(here, there, atol=1e-5)
    assert not np.allclose(one.sums, other.sums, atol=1e-3)


# Maps


@given(
    st.lists(st.floats(0.05, 7), min_size=1, max_size=9),
    st.floats(-20, 20),
    st.integers(1, 40),
    st.floats(0.1, 3),
)
def test_shares_of_a_cell_are_its_part_within_the_pixels(lengths, start, size, scale):
    edges = np.concatenate([[start], start + np.cumsum(lengths)])
    shares = overlaps(edges, size, scale)
    assert shares.shape == (size, len(lengths))
    inside = np.clip(edges, 0, size * scale)
    assert np.allclose(shares.sum(axis=0), np.diff(inside) / np.diff(edges), atol=1e-9)


@given(st.sampled_from([(24, 24), (4, 4), (7, 7)]), st.data())
def test_spreading_over_patches_keeps_sums_and_is_even_within_a_token(patch_grid, data):
    granularity = data.draw(st.sampled_from(poolings(patch_grid)))
    rows, columns = token_grid(granularity, patch_grid)
    level = np.random.default_rng(0).normal(size=(2, rows, columns))
    spread = spread_over_patches(level, patch_grid)
    assert spread.shape == (2, *patch_grid)
    assert np.allclose(spread.sum(axis=(1, 2)), level.sum(axis=(1, 2)))
    pooled = pyramid(mx.array(spread.reshape(2, -1, 1).astype(np.float32)), [granularity], patch_grid)
    kernel = (patch_grid[0] // rows) * (patch_grid[1] // columns)
    assert np.allclose(np.array(pooled)[..., 0] * kernel, level.reshape(2, -1), atol=1e-5)


@given(st.integers(1, 900), st.integers(1, 900), st.integers(1, 60))
def test_spreading_over_the_image_keeps_sums_but_for_padding(config, height, width, longest):
    geometry = config.geometry(config.finest, (height, width))
    maps = np.random.default_rng(0).normal(size=(len(geometry.crops), *geometry.token_grid))
    size = fit((height, width), longest)
    heat = spread_over_image(maps, geometry, size)
    assert heat.shape == size
    assert max(size) == longest
    expected = 0.0
    for numbers, crop in zip(maps, geometry.crops, strict=True):
        for (row, column), value in np.ndenumerate(numbers):
            shares = [
                (np.clip(edges[n + 1], 0, side) - np.clip(edges[n], 0, side)) / (edges[n + 1] - edges[n])
                for edges, n, side in ((crop.row_edges, row, height), (crop.column_edges, column, width))
            ]
            expected += value * math.prod(shares)
    assert heat.sum() == pytest.approx(expected, abs=1e-6)


@pytest.fixture(scope="module")
def config(tiny) -> Config:
    return tiny[0].config


def test_evidence_lies_where_its_token_does(tiny, explained):
    """One token's evidence alone lights up its cell and nothing else."""
    evidence = explained.votes.evidence(1, 4)
    blank = [np.zeros_like(level) for level in evidence.levels]
    blank[2][3, 1, 0] = 2.0  # the third local crop, at granularity 4: row 1, column 0
    heat = explained.heat(dataclasses.replace(evidence, levels=tuple(blank)), longest=400)
    crop = explained.levels[2].crops[3]
    height, width = explained.geometry.image_size
    rows, columns = (np.flatnonzero(heat.any(axis=axis)) * max(height, width) / 400 for axis in (1, 0))
    top, bottom = max(crop.row_edges[1], 0), min(crop.row_edges[2], height)
    left, right = max(crop.column_edges[0], 0), min(crop.column_edges[1], width)
    assert rows.min() == pytest.approx(top, abs=2)
    assert rows.max() == pytest.approx(bottom, abs=3)
    assert columns.min() == pytest.approx(left, abs=2)
    assert columns.max() == pytest.approx(right, abs=3)


# The whole


def test_an_explanation_is_of_the_view_that_route_gives(tiny):
    for options in ({}, {"token_cost": 3.0}, {"max_visual_tokens": 20}):
        [view] = route(*tiny, QUESTION, PHOTO, **options)
        [explanation] = explain(*tiny, QUESTION, PHOTO, **options)
        assert explanation.view == view
        assert explanation.geometry.granularity == view.granularity
        assert explanation.geometry.visual_tokens == view.visual_tokens
        assert explanation.evidence().choice == view.granularity


def test_each_image_has_its_own_explanation(tiny):
    images = [PHOTO, Image.new("RGB", (300, 50), "white")]
    explained = explain(*tiny, QUESTION, images)
    views = route(*tiny, QUESTION, images)
    assert [each.view for each in explained] == list(views)
    assert [each.image.size for each in explained] == [Image.open(PHOTO).size, (300, 50)]
    for each, view in zip(explained, views, strict=True):
        assert np.abs(normalized(each.votes, each.votes.sums) - view.routing.logits).max() < EXACT


def test_where_no_router_runs_there_are_no_votes(tiny, tiny_stage3):
    forced = explain(*tiny, QUESTION, PHOTO, granularity=4)[0]
    without = explain(*load(tiny_stage3), QUESTION, PHOTO)[0]
    for explanation, granularity, source in ((forced, 4, "forced"), (without, 16, "finest")):
        assert (explanation.view.granularity, explanation.view.source) == (granularity, source)
        assert explanation.votes is None
        assert explanation.evidence() is None
        assert explanation.comparisons() == []
        content = explanation.to_dict()
        assert (content["router"], content["votes"], content["evidence"]) == (None, None, [])
        assert content["geometry"]["visual_tokens"] == content["visual_tokens"]


def test_json_has_all_that_an_explanation_is_made_of(explained):
    content = json.loads(json.dumps(explained.to_dict()))
    votes, granularities = content["votes"], content["router"]["granularities"]
    total = np.array(votes["unfilled"]) + sum(np.array(word["votes"]) for word in votes["words"])
    for level, g in zip(votes["levels"], granularities, strict=True):
        geometry, numbers = level["geometry"], np.array(level["votes"])  # crops, granularities, rows, columns
        assert geometry["granularity"] == g
        assert numbers.shape == (len(content["geometry"]["crops"]), len(granularities), *geometry["token_grid"])
        total = total + numbers.sum(axis=(0, 2, 3))
    assert np.allclose(total, votes["sums"], atol=EXACT)
    sums, norm = np.array(votes["sums"]), votes["norm"]
    logits = (sums - sums.mean()) / np.sqrt(sums.var() + norm["eps"]) * norm["weight"] + norm["bias"]
    assert np.allclose(logits, content["router"]["logits"], atol=EXACT)


def test_a_comparison_with_what_is_no_other_granularity_is_refused(explained):
    chosen = explained.view.granularity
    for wrong in (3, chosen):
        with pytest.raises(InputError, match=str(wrong)):
            explained.evidence(wrong)
    assert explained.evidence(next(g for g in (1, 2, 4, 8, 16) if g != chosen)) is not None


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [({"granularty": 4}, OptionError, "granularity"), ({"max_tokens": 4}, OptionError, "max_tokens"),
     ({"granularity": 5}, InputError, "5"), ({"max_visual_tokens": 1}, InputError, "1")],
)  # fmt: skip
def test_options_are_those_of_looking(tiny, options, error, named):
    with pytest.raises(error, match=named):
        explain(*tiny, QUESTION, PHOTO, **options)


def test_a_router_in_another_precision_votes_as_it_decides(tiny_four_bits):
    """Logits are the router's own; the votes are summed in more digits than it has."""
    [explanation] = explain(*load(tiny_four_bits), QUESTION, PHOTO)
    logits = normalized(explanation.votes, explanation.votes.sums)
    assert np.abs(logits - explanation.view.routing.logits).max() < 0.05


# In notebooks


def test_explanations_show_themselves_escaped_and_with_nothing_from_outside(explained):
    word = dataclasses.replace(explained.votes.words[0], text='</span><script src="http://x">alert(1)</script>')
    votes = dataclasses.replace(explained.votes, words=(word, *explained.votes.words[1:]))
    hostile = dataclasses.replace(explained, votes=votes)._repr_html_()
    assert "&lt;script src=&quot;http://x&quot;&gt;" in hostile
    for shown in (hostile, explained._repr_html_(), explained.view._repr_html_()):
        assert "<script" not in shown
        sources = re.findall(r'<[^>]* (?:src|href)="(.*?)"', shown)
        assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
        assert f"Granularity {explained.view.granularity}," in shown
        assert len(shown) < 60_000
    assert hostile.count("<img") == 1


def test_an_answer_shows_itself_escaped(tiny):
    from avg_mlx import generate

    answer = dataclasses.replace(generate(*tiny, QUESTION, PHOTO, max_tokens=2), text="<b>5 < 6</b>\nand more")
    shown = answer._repr_html_()
    assert "&lt;b&gt;5 &lt; 6&lt;/b&gt;" in shown
    assert answer.views[0]._repr_html_() in shown
