"""See, choose, compose: features, how closely images are looked at, and what enters the language model."""

import dataclasses
import gc
import itertools

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from avg_mlx import ChatSession, InputError, Request, generate, route, stream_batch, stream_generate
from avg_mlx.blas import BLAS
from avg_mlx.errors import OptionError
from avg_mlx.files import read_json
from avg_mlx.inference.options import AskOptions, Decoding, GenerateOptions, Looking, RouteOptions
from avg_mlx.inference.steps import Stopwatch, ask_again, choose, compose, prepare, score, see
from avg_mlx.inference.view import Routing, view_image
from avg_mlx.inputs.image import make_crops
from avg_mlx.inputs.prompt import PLACEHOLDER_ID
from avg_mlx.weights.checkpoint import load_model

WIDE, TALL, SQUARE = (
    Image.effect_mandelbrot(size, (-2, -1, 1, 1), 50).convert("RGB") for size in ((160, 40), (40, 90), (100, 100))
)
PHOTOS = (WIDE, TALL, SQUARE)


@pytest.fixture(scope="module")
def seen(tiny):
    """Three photographs and a question, after the vision tower."""
    return see(*tiny, "<image> or <image>, and <image>?", PHOTOS, Looking())


@pytest.fixture(scope="module")
def views(tiny, seen):
    """How closely the router looks at them."""
    return choose(tiny[0], seen, Looking())


@pytest.fixture(scope="module")
def prepared(tiny, seen, views):
    """The language model's input."""
    return compose(tiny[0], seen, views)


@pytest.mark.parametrize("n", range(3), ids=["wide", "tall", "square"])
def test_each_of_several_images_is_routed_by_itself_with_the_same_text(tiny, seen, views, n):
    model, _ = tiny
    crops = make_crops(PHOTOS[n], model.config)
    logits = model.route(model.encode(crops), seen.text)
    view = views[n]
    assert np.allclose(view.routing.logits, logits.tolist(), atol=1e-5)
    assert view.granularity == model.config.granularities[int(mx.argmax(logits).item())]
    assert view.source == "router"
    assert (view.crops, view.crop_grid) == (len(crops), crops.crop_grid)


def test_another_question_about_the_same_images_needs_no_vision(tiny, seen, monkeypatch):
    model, tokenizer = tiny
    question = "Which <image>, <image> or <image>?"
    expected = see(model, tokenizer, question, PHOTOS, Looking())
    score(model, seen)
    monkeypatch.setattr(type(model.vision_tower), "__call__", lambda *_: pytest.fail("the tower ran"))
    again = ask_again(model, tokenizer, seen, question)
    assert (again.ids, again.vision_calls) == (expected.ids, 0)
    assert mx.array_equal(again.text, expected.text)
    assert again.features is seen.features
    assert (again.seconds.vision, again.seconds.router) == (seen.seconds.vision, 0.0)
    assert choose(model, again, Looking()) == choose(model, expected, Looking())


def test_each_image_may_be_looked_at_in_its_own_way(tiny, seen, views, monkeypatch):
    model, routed = tiny[0], []
    route = type(model).route
    monkeypatch.setattr(type(model), "route", lambda self, f, text: routed.append(f) or route(self, f, text))
    mixed = choose(model, seen, [Looking(granularity=16), Looking(), Looking(granularity=1)])
    assert [view.granularity for view in mixed] == [16, views[1].granularity, 1]
    assert [view.source for view in mixed] == ["forced", "router", "forced"]
    assert [features is seen.features[1] for features in routed] == [True]


def test_swapped_images_swap_their_views(tiny):
    forth, back = (route(*tiny, "Which?", photos) for photos in ([WIDE, TALL], [TALL, WIDE]))
    assert forth[0] != forth[1]
    for one, same in zip(forth, back[::-1], strict=True):
        assert dataclasses.replace(one, routing=None) == dataclasses.replace(same, routing=None)
        # OpenBLAS sums a row of a batch in an order that depends on its place: a few roundings of float32.
        assert np.allclose(one.routing.logits, same.routing.logits, atol=1e-5)
    assert BLAS == "OpenBLAS" or forth == back[::-1]


def test_the_question_has_a_say(tiny):
    questions = ("Why?", "Read the text on the sign.")
    ours, theirs = (route(*tiny, question, SQUARE, system_prompt=".")[0].routing for question in questions)
    assert not np.allclose(ours.logits, theirs.logits, atol=1e-3)


def test_probabilities_are_the_softmax_of_the_logits(views):
    for view in views:
        exponentials = np.exp(view.routing.logits)
        assert np.allclose(view.routing.probabilities, exponentials / exponentials.sum(), atol=1e-6)
        assert view.routing.granularities == (1, 2, 4, 8, 16)
        assert view.routing.choice == view.routing.granularities[int(np.argmax(view.routing.logits))]


def test_visual_tokens_are_counted_as_they_are_packed(tiny, seen, views):
    model, _ = tiny
    for view, features, crops in zip(views, seen.features, seen.crops, strict=True):
        assert view.visual_tokens == len(model.pack(features, view.granularity, crops))
        assert view.visual_tokens_finest == len(model.pack(features, 16, crops))


def test_each_image_enters_at_its_placeholder(tiny, seen, views, prepared):
    model, _ = tiny
    expected, text, images = [], iter(seen.text), iter(range(3))
    for id in seen.ids:
        if id == PLACEHOLDER_ID:
            n = next(images)
            expected += list(model.pack(seen.features[n], views[n].granularity, seen.crops[n]))
        else:
            embedding = next(text)
            assert mx.array_equal(embedding, model.language_model.model.embed_tokens(mx.array(id)))
            expected.append(embedding)
    assert mx.array_equal(prepared.embeddings, mx.stack(expected))
    assert prepared.layout.positions == len(prepared.embeddings)


def test_position_ids_have_a_filler_for_every_visual_token(prepared):
    counts = iter(view.visual_tokens for view in prepared.layout.views)
    expected = []
    for id in prepared.layout.ids:
        expected += [-1] * next(counts) if id == PLACEHOLDER_ID else [id]
    assert prepared.layout.position_ids(-1) == expected
    assert len(expected) == prepared.layout.positions


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


scores = st.lists(st.floats(-20, 20, width=32), min_size=5, max_size=5)
costs = st.one_of(st.just(0.0), st.floats(0, 100), st.floats(0, 1e-3))


@given(logits=scores, prices=st.lists(costs, min_size=2, max_size=4), budget=st.integers(0, 400) | st.none())
def test_the_dial(tiny, logits, prices, budget):
    """By definition, the router itself at 0, and monotone: a higher price never takes more tokens."""
    config, crops = tiny[0].config, make_crops(SQUARE, tiny[0].config)
    routing = Routing.of(config, mx.array(logits))
    counts = {g: config.visual_tokens(g, crops.image_size) for g in config.granularities}
    fitting = [g for g in counts if budget is None or counts[g] <= budget]
    assume(fitting)
    taken = []
    for price in sorted(prices):
        view = view_image(config, crops, routing, Looking(max_visual_tokens=budget, token_cost=price))
        value = {g: score - price * counts[g] / counts[16] for g, score in zip(counts, routing.logits, strict=True)}
        assert value[view.granularity] == max(value[g] for g in fitting)
        assert (view.source == "budget") == (max(value, key=value.get) != view.granularity)
        assert (view.source == "router") == (view.source != "budget" and view.granularity == routing.choice)
        taken.append(view.visual_tokens)
        if price == 0:
            assert view == view_image(config, crops, routing, Looking(max_visual_tokens=budget))
    assert taken == sorted(taken, reverse=True)


@pytest.mark.parametrize("photo", PHOTOS, ids=["wide", "tall", "square"])
def test_a_high_token_cost_takes_the_fewest_tokens_everywhere(tiny, ranked, photo):
    """They are not always the coarsest granularity's: as trained, unpadding cuts more away at some."""
    model, tokenizer = tiny
    counts = {g: model.config.visual_tokens(g, (photo.height, photo.width)) for g in ranked}
    cheapest = min(ranked, key=counts.__getitem__)
    free, dear = ({"token_cost": cost, "max_tokens": 1} for cost in (0, 1e6))
    source = "router" if ranked[0] == cheapest else "cost"
    session = ChatSession(model, tokenizer)
    [*_, last] = session.ask("Why?", photo, **dear)
    [(_, batched)] = stream_batch(model, tokenizer, [Request("Why?", photo, **dear)])
    answers = [generate(model, tokenizer, "Why?", photo, **dear), last.answer, batched]
    views = [*route(model, tokenizer, "Why?", photo, token_cost=1e6), *(answer.views[0] for answer in answers)]
    assert {(view.granularity, view.source) for view in views} == {(cheapest, source)}
    assert generate(model, tokenizer, "Why?", photo, **free).views[0].granularity == ranked[0]


@pytest.mark.parametrize("granularity", [1, 2, 4, 8, 16])
def test_a_forced_granularity_needs_no_router(tiny, granularity, monkeypatch):
    model, tokenizer = tiny
    monkeypatch.setattr(type(model), "route", lambda *_: pytest.fail("it was routed"))
    looking = Looking(granularity=granularity)
    for view in choose(model, see(model, tokenizer, "Which?", [WIDE, TALL], looking), looking):
        assert (view.granularity, view.source, view.routing) == (granularity, "forced", None)


@pytest.fixture
def reconfigured(tiny, monkeypatch):
    """`reconfigured(*granularities)`: the tiny model without its router, with other granularities."""

    def change(*granularities: int):
        config = dataclasses.replace(tiny[0].config, has_router=False, granularities=granularities)
        monkeypatch.setattr(tiny[0], "config", config)
        monkeypatch.setattr(type(tiny[0]), "route", lambda *_: pytest.fail("it was routed"))
        return tiny

    return change


@pytest.mark.parametrize("photo", PHOTOS, ids=["wide", "tall", "square"])
def test_without_a_router_the_finest_is_taken_that_fits_a_budget(reconfigured, photo):
    model, tokenizer = reconfigured(4, 16, 8, 1)
    counts = {g: model.config.visual_tokens(g, (photo.height, photo.width)) for g in (16, 8, 4, 1)}
    for budget in (None, 1000, *counts.values()):
        (view,) = route(model, tokenizer, "Why?", photo, max_visual_tokens=budget)
        assert view.granularity == next(g for g in counts if budget is None or counts[g] <= budget)
        assert view.source == ("finest" if view.granularity == 16 else "budget")
        assert (view.visual_tokens, view.visual_tokens_finest) == (counts[view.granularity], counts[16])
        assert view.routing is None
    with pytest.raises(InputError, match=f"takes at least {counts[1]}"):
        route(model, tokenizer, "Why?", photo, max_visual_tokens=counts[1] - 1)
    with pytest.raises(InputError, match="token_cost weighs what the router thinks, but this model has none"):
        generate(model, tokenizer, "Why?", photo, token_cost=0.1)
    with pytest.raises(InputError, match="granularity is 2; choose auto or one of this model's: 1, 4, 8, 16"):
        generate(model, tokenizer, "Why?", photo, granularity=2)


@pytest.mark.parametrize("own", [16, 4])
def test_a_model_with_one_granularity_can_be_forced_to_any_that_its_patches_pool_to(reconfigured, own):
    model, tokenizer = reconfigured(own)
    (view,) = generate(model, tokenizer, "Why?", WIDE, max_tokens=1).views
    assert (view.granularity, view.source) == (own, "finest")
    for granularity in (1, 2, 4, 8, 16):
        answer = generate(model, tokenizer, "Why?", WIDE, granularity=granularity, max_tokens=1)
        (view,) = answer.views
        assert (view.granularity, view.source) == (granularity, "forced")
        tokens = {g: model.config.visual_tokens(g, (WIDE.height, WIDE.width)) for g in (granularity, own)}
        assert (view.visual_tokens, view.visual_tokens_finest) == (tokens[granularity], tokens[max(tokens)])
        assert answer.prompt_tokens == len(answer.prompt_token_ids) - 1 + view.visual_tokens
    with pytest.raises(InputError, match="granularity is 3; choose auto or one of this model's: 1, 2, 4, 8, 16"):
        generate(model, tokenizer, "Why?", WIDE, granularity=3)


def test_text_needs_neither_image_nor_router(tiny, monkeypatch):
    model, tokenizer = tiny
    monkeypatch.setattr(type(model), "route", lambda *_: pytest.fail("it was routed"))
    seen = see(model, tokenizer, "Why?", None, Looking())
    views = choose(model, seen, Looking())
    assert views == seen.crops == seen.features == ()
    prepared = compose(model, seen, views)
    assert prepared.layout.positions == len(seen.ids) == len(seen.text)
    assert mx.array_equal(prepared.embeddings, seen.text)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"granularity": 3}, "granularity is 3; .*auto.* 1, 2, 4, 8, 16"),
        ({"granularity": "fine"}, "granularity is 'fine'; .*auto.* 1, 2, 4, 8, 16"),
        ({"granularity": 4, "max_visual_tokens": 50}, "granularity 4 .* max_visual_tokens"),
        ({"granularity": 4, "token_cost": 0.5}, "granularity 4 .* token_cost"),
        ({"token_cost": -1}, "token_cost is -1; expected a number from 0"),
        ({"token_cost": float("nan")}, "token_cost is nan"),
        ({"token_cost": float("inf")}, "token_cost is inf"),
        ({"max_visual_tokens": 1}, "no granularity fits into 1 visual tokens; this image takes at least 7"),
        ({"max_pixels": 100}, "above the limit"),
    ],
)
def test_options_that_are_refused(tiny, options, words):
    with pytest.raises(InputError, match=words):
        generate(*tiny, "Why?", SQUARE, **options)


@pytest.fixture
def blind(monkeypatch):
    """Images cannot be read; whoever tries has not refused the options before."""
    monkeypatch.setattr("avg_mlx.inference.steps.read_image", lambda *_: pytest.fail("an image was read"))


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("max_tokns", "max_tokens"), ("granularty", "granularity"), ("temp", "choose from"), ("images", "choose from")],
)
def test_an_unknown_option_fails_at_once_and_names_the_nearest(tiny, blind, name, nearest):
    """At the call itself: neither an image nor the first segment has been asked for."""
    for function in (generate, stream_generate, ChatSession(*tiny).ask):
        arguments = ["Why?", SQUARE] if function not in (generate, stream_generate) else [*tiny, "Why?", SQUARE]
        with pytest.raises(OptionError, match=f"{name} is not an option.*{nearest}") as error:
            function(*arguments, **{name: 3})
        assert isinstance(error.value, TypeError)
    with pytest.raises(OptionError, match=r"batch_sise is not an option.*batch_size"):
        stream_batch(*tiny, [], batch_sise=3)


@pytest.mark.parametrize("option", ["granularity", "max_tokens", "sampler"])
def test_routing_has_no_options_of_answering(tiny, blind, option):
    with pytest.raises(OptionError, match=f"{option} is not an option"):
        route(*tiny, "Why?", SQUARE, **{option: 16})


@pytest.mark.parametrize(
    "options",
    [
        {"granularity": 4, "max_visual_tokens": 50},
        {"granularity": 3},
        {"token_cost": -1},
        {"kv_bits": 4, "max_kv_size": 64},
        {"max_tokens": 0},
        {"prefill_step_size": 0},
    ],
    ids=str,
)
def test_options_are_checked_before_the_first_segment_is_asked_for(tiny, blind, options):
    with pytest.raises(InputError, match=next(iter(options))):
        stream_generate(*tiny, "Why?", SQUARE, **options)
    with pytest.raises(InputError, match=next(iter(options))):
        ChatSession(*tiny).ask("Why?", SQUARE, **options)


def test_every_option_has_a_default_and_a_place():
    """The names that are checked are those of the dataclasses that hold defaults."""
    fields = {field.name for kind in (Looking, Decoding) for field in dataclasses.fields(kind)}
    assert set(GenerateOptions.__annotations__) == fields
    assert set(RouteOptions.__annotations__) == {"max_visual_tokens", "token_cost", "system_prompt", "max_pixels"}
    assert set(AskOptions.__annotations__) == fields - {"system_prompt", "max_pixels"}


def test_a_prompt_beyond_the_context_is_refused_with_its_length(tiny, tiny_folder):
    _, tokenizer = tiny
    keys = read_json(tiny_folder / "config.json")
    looking = Looking(granularity=16)
    layout = prepare(*tiny, "Why?", SQUARE, looking).layout
    fits = load_model(tiny_folder, keys | {"max_position_embeddings": layout.positions})
    assert prepare(fits, tokenizer, "Why?", SQUARE, looking).layout.positions == layout.positions
    short = load_model(tiny_folder, keys | {"max_position_embeddings": layout.positions - 1})
    words = (
        rf"takes {layout.positions} positions \({len(layout.ids) - 1} for text, .*\) but the model has "
        rf"{layout.positions - 1}; shorten it, or look less closely"
    )
    with pytest.raises(InputError, match=words):
        prepare(short, tokenizer, "Why?", SQUARE, looking)


def test_best_of_looks_only_at_what_is_allowed():
    routing = Routing((36, 72, 144), (0.5, -1.0, 2.0), (0.2, 0.1, 0.7))
    assert routing.choice == 144
    for size in (1, 2, 3):
        for allowed in itertools.permutations((36, 72, 144), size):
            expected = next(g for g in (144, 36, 72) if g in allowed)
            assert routing.best_of(allowed) == expected


def test_views_are_not_to_be_changed(views):
    with pytest.raises(dataclasses.FrozenInstanceError):
        views[0].granularity = 1


def test_the_stopwatch_evaluates_what_it_clocks():
    stopwatch = Stopwatch()
    gc.collect()
    before = mx.get_active_memory()
    array = mx.random.normal((1000, 1000))
    assert stopwatch.lap(array) > 0
    assert mx.get_active_memory() - before >= array.nbytes
    assert stopwatch.lap() >= 0
