"""How closely images are looked at: routing, budgets, and what enters the language model."""

import dataclasses
import gc
import itertools

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from avg_mlx import InputError, route
from avg_mlx.files import read_json
from avg_mlx.inference.view import Routing, Stopwatch, look
from avg_mlx.inputs.image import make_crops
from avg_mlx.inputs.prompt import PLACEHOLDER_ID
from avg_mlx.weights.checkpoint import load_model

WIDE, TALL, SQUARE = (
    Image.effect_mandelbrot(size, (-2, -1, 1, 1), 50).convert("RGB") for size in ((160, 40), (40, 90), (100, 100))
)
PHOTOS = (WIDE, TALL, SQUARE)


@pytest.fixture(scope="module")
def looked(tiny):
    """Three photographs and a question."""
    return look(*tiny, "<image> or <image>, and <image>?", PHOTOS)


@pytest.mark.parametrize("n", range(3), ids=["wide", "tall", "square"])
def test_each_of_several_images_is_routed_by_itself_with_the_same_text(tiny, looked, n):
    model, _ = tiny
    crops = make_crops(PHOTOS[n], model.config)
    logits = model.route(model.encode(crops), looked.text)
    view = looked.views[n]
    assert np.allclose(view.routing.logits, logits.tolist(), atol=1e-5)
    assert view.granularity == model.config.granularities[int(mx.argmax(logits).item())]
    assert view.source == "router"
    assert (view.crops, view.crop_grid) == (len(crops), crops.crop_grid)


def test_swapped_images_swap_their_views(tiny):
    forth, back = (route(*tiny, "Which?", photos) for photos in ([WIDE, TALL], [TALL, WIDE]))
    assert forth[0] != forth[1]
    assert forth == back[::-1]


def test_the_question_has_a_say(tiny):
    questions = ("Why?", "Read the text on the sign.")
    ours, theirs = (route(*tiny, question, SQUARE, system_prompt=".")[0].routing for question in questions)
    assert not np.allclose(ours.logits, theirs.logits, atol=1e-3)


def test_probabilities_are_the_softmax_of_the_logits(looked):
    for view in looked.views:
        exponentials = np.exp(view.routing.logits)
        assert np.allclose(view.routing.probabilities, exponentials / exponentials.sum(), atol=1e-6)
        assert view.routing.granularities == (1, 2, 4, 8, 16)
        assert view.routing.choice == view.routing.granularities[int(np.argmax(view.routing.logits))]


def test_visual_tokens_are_counted_as_they_are_packed(tiny, looked):
    model, _ = tiny
    for view, features, crops in zip(looked.views, looked.features, looked.crops, strict=True):
        assert view.visual_tokens == len(model.pack(features, view.granularity, crops))
        assert view.visual_tokens_finest == len(model.pack(features, 16, crops))


def test_each_image_enters_at_its_placeholder(tiny, looked):
    model, _ = tiny
    embeddings = looked.embeddings(model)
    expected, text, images = [], iter(looked.text), iter(range(3))
    for id in looked.ids:
        if id == PLACEHOLDER_ID:
            n = next(images)
            expected += list(model.pack(looked.features[n], looked.views[n].granularity, looked.crops[n]))
        else:
            embedding = next(text)
            assert mx.array_equal(embedding, model.language_model.model.embed_tokens(mx.array(id)))
            expected.append(embedding)
    assert mx.array_equal(embeddings, mx.stack(expected))
    assert looked.positions == len(embeddings)


def test_position_ids_have_a_filler_for_every_visual_token(looked):
    counts = iter(view.visual_tokens for view in looked.views)
    expected = []
    for id in looked.ids:
        expected += [-1] * next(counts) if id == PLACEHOLDER_ID else [id]
    assert looked.position_ids(-1) == expected
    assert len(expected) == looked.positions


@pytest.fixture(params=[(16, 8, 4, 2, 1), (4, 16, 1, 8, 2), (1, 2, 16, 4, 8)], ids=str)
def ranked(request, monkeypatch):
    """A router that ranks granularities so, whatever it is shown."""
    logits = [-float(request.param.index(g)) for g in (1, 2, 4, 8, 16)]
    monkeypatch.setattr("avg_mlx.model.avg_llava.Model.route", lambda *_: mx.array(logits))
    return request.param


@pytest.mark.parametrize("photo", PHOTOS, ids=["wide", "tall", "square"])
def test_a_budget_is_spent_on_the_best_scored_granularity_that_fits(tiny, ranked, photo):
    model, tokenizer = tiny
    counts = {g: model.config.visual_tokens(g, (photo.height, photo.width)) for g in ranked}
    for budget in sorted({count + more for count in counts.values() for more in (0, 1, 1000)}):
        (view,) = route(model, tokenizer, "Why?", photo, max_visual_tokens=budget)
        assert view.granularity == next(g for g in ranked if counts[g] <= budget)
        assert view.source == ("router" if view.granularity == ranked[0] else "budget")
        assert view.visual_tokens == counts[view.granularity] <= budget
        assert view.routing.choice == ranked[0]
    with pytest.raises(InputError, match=f"takes at least {min(counts.values())}"):
        route(model, tokenizer, "Why?", photo, max_visual_tokens=min(counts.values()) - 1)


def test_a_budget_is_for_each_image(tiny, ranked):
    together = route(*tiny, "Which?", PHOTOS, max_visual_tokens=40)
    assert together == tuple(route(*tiny, "Which?", photo, max_visual_tokens=40)[0] for photo in PHOTOS)
    assert sum(view.visual_tokens for view in route(*tiny, "Which?", [SQUARE] * 3, max_visual_tokens=20)) > 20


@pytest.mark.parametrize("granularity", [1, 2, 4, 8, 16])
def test_a_forced_granularity_needs_no_router(tiny, granularity, monkeypatch):
    model, tokenizer = tiny
    monkeypatch.setattr(type(model), "route", lambda *_: pytest.fail("it was routed"))
    for view in route(model, tokenizer, "Which?", [WIDE, TALL], granularity=granularity):
        assert (view.granularity, view.source, view.routing) == (granularity, "forced", None)


def test_text_needs_neither_image_nor_router(tiny, monkeypatch):
    model, tokenizer = tiny
    monkeypatch.setattr(type(model), "route", lambda *_: pytest.fail("it was routed"))
    looked = look(model, tokenizer, "Why?")
    assert looked.views == looked.crops == looked.features == ()
    assert looked.positions == len(looked.ids) == len(looked.text)
    assert mx.array_equal(looked.embeddings(model), looked.text)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"granularity": 3}, "granularity is 3, but this model has auto and 1, 2, 4, 8, 16"),
        ({"granularity": "fine"}, "granularity is 'fine', but this model has auto and 1, 2, 4, 8, 16"),
        ({"granularity": 4, "max_visual_tokens": 50}, "leave --granularity out"),
        ({"max_visual_tokens": 1}, "no granularity fits into 1 visual tokens; this image takes at least 7"),
        ({"max_pixels": 100}, "above the limit"),
    ],
)
def test_options_that_are_refused(tiny, options, words):
    with pytest.raises(InputError, match=words):
        look(*tiny, "Why?", SQUARE, **options)


def test_a_prompt_beyond_the_context_is_refused_with_its_length(tiny, tiny_folder):
    _, tokenizer = tiny
    keys = read_json(tiny_folder / "config.json")
    looked = look(*tiny, "Why?", SQUARE, granularity=16)
    fits = load_model(tiny_folder, keys | {"max_position_embeddings": looked.positions})
    assert look(fits, tokenizer, "Why?", SQUARE, granularity=16).positions == looked.positions
    short = load_model(tiny_folder, keys | {"max_position_embeddings": looked.positions - 1})
    words = (
        rf"takes {looked.positions} positions \({len(looked.text)} for text, the rest for images\) but the model has "
        rf"{looked.positions - 1}; shorten it, or look less closely"
    )
    with pytest.raises(InputError, match=words):
        look(short, tokenizer, "Why?", SQUARE, granularity=16)


def test_best_of_looks_only_at_what_is_allowed():
    routing = Routing((36, 72, 144), (0.5, -1.0, 2.0), (0.2, 0.1, 0.7))
    assert routing.choice == 144
    for size in (1, 2, 3):
        for allowed in itertools.permutations((36, 72, 144), size):
            expected = next(g for g in (144, 36, 72) if g in allowed)
            assert routing.best_of(allowed) == expected


def test_views_are_not_to_be_changed(looked):
    with pytest.raises(dataclasses.FrozenInstanceError):
        looked.views[0].granularity = 1


def test_the_stopwatch_evaluates_what_it_clocks():
    stopwatch = Stopwatch()
    gc.collect()
    before = mx.get_active_memory()
    array = mx.random.normal((1000, 1000))
    stopwatch.clock("stage", array)
    assert mx.get_active_memory() - before >= array.nbytes
    stopwatch.clock("next")
    assert list(stopwatch.seconds) == ["stage", "next"]
    assert all(seconds >= 0 for seconds in stopwatch.seconds.values())
