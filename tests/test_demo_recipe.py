"""The parts of examples/demo that make the model: labels, tokenizer, arithmetic, weights, option files."""

import importlib
import math

import beginning
import book
import exam
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import quick
import start
import teach_vision
import yaml
from conftest import ROOT
from pictures import Thing
from PIL import Image

from avg_mlx import load
from avg_mlx.cli.train import instruct_parser, router_parser
from avg_mlx.config import Config
from avg_mlx.inputs.image import make_crops
from avg_mlx.model.inventory import tensors_of

RECIPE = ROOT / "examples" / "demo"  # on the path: pyproject.toml
SIDE = start.CROP


@pytest.fixture(scope="module")
def config():
    return Config.from_dict({**start.CONFIG, "vocab_size": 300})


def test_the_labels_of_a_patch_are_shares_of_it():
    patches, side = 10, SIDE / 10
    things = [
        Thing("A", "red", (0, 0, side, side / 2)),
        Thing("b", "blue", (1.5 * side, side, 3 * side, 2 * side)),
        Thing("c", "blue", (-3 * side, side, -side, 2 * side)),  # outside
    ]
    labels = teach_vision.labels(things, patches, SIDE)
    names, colors, left, right, *_ = labels
    assert [x.shape[1] for x in labels] == [len(classes) for classes in teach_vision.HEADS.values()]
    for x in labels:
        assert x.shape[0] == patches**2
        assert np.allclose(x.sum(axis=1), 1)
    at = {name: teach_vision.NAMES.index(name) for name in ("nothing", "A", "b", "c")}
    assert names[0, [at["A"], at["nothing"]]] == pytest.approx([0.5, 0.5])
    assert names[patches : patches + 3, at["b"]] == pytest.approx([0, 0.5, 1])
    assert colors[patches + 2, teach_vision.COVERS.index("blue")] == pytest.approx(1)
    assert np.flatnonzero(right[:, at["A"]]).tolist() == [0]
    assert np.flatnonzero(left[:, at["b"]]).tolist() == [patches + 2]
    assert left[:, at["nothing"]].sum() + right[:, at["nothing"]].sum() == 2 * patches**2 - 2
    assert not any(x[:, at["c"]].any() for x in (names, left, right))


def test_places_are_counted_from_the_first_character_that_a_crop_shows():
    patches, side = 10, SIDE / 10
    word = [Thing("NOON"[i], "red", ((2 * i - 3) * side, 0, (2 * i - 1) * side, side), i + 1) for i in range(4)]
    number = [Thing("47"[i], "red", (i * side, side, (i + 1) * side, 2 * side), i + 1) for i in range(2)]
    *_, left, right = teach_vision.labels([*word, *number, Thing("circle", "red", (0, 60, 90, 90))], patches, SIDE)
    placed = {(patch, place) for x in (left, right) for patch, place in np.argwhere(x[:, 1:])}
    assert placed == {(0, 0), (2, 1), (4, 2), (patches, 0), (patches + 1, 1)}  # the first N is beyond the edge


@pytest.mark.parametrize("size", [(120, 120), (64, 64), (300, 150), (90, 200), (400, 300), (1024, 512)])
def test_what_a_crop_shows_is_where_its_labels_say(config, size):
    """A red rectangle, found again in every crop's pixels."""
    image = Image.new("RGB", size, (255, 255, 255))
    width, height = size
    box = round(width * 0.4), round(height * 0.3), round(width * 0.9), round(height * 0.8)
    image.paste((255, 0, 0), box)
    scene = teach_vision.Scene(image, shapes=[Thing("rectangle", "red", box)])
    crops = make_crops(image, config)
    for number, pixels in enumerate(crops.pixels):
        rows, columns = np.nonzero((pixels[..., 0] > 0) & (pixels[..., 1] < 0))
        left, top, right, bottom = teach_vision.things_in_crop(scene, number, crops.crop_grid, SIDE)[0].box
        inside = [max(0, left), max(0, top), min(SIDE, right), min(SIDE, bottom)]
        if len(rows) == 0:
            assert inside[0] >= inside[2]
        else:
            found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert np.abs(np.array(found) - inside).max() <= 2


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (quick.quick_gelu, lambda x: x * mx.sigmoid(1.702 * x)),
        (quick.silu, nn.silu),
        (quick.gelu, nn.gelu),
        (quick.softmax, lambda x: mx.softmax(x, axis=-1)),
    ],
)
def test_quick_arithmetic_is_the_same_but_for_rounding(ours, theirs):
    x, change = mx.random.normal((3, 7, 50)) * 5, mx.random.normal((3, 7, 50))
    (y,), (slope,) = mx.vjp(ours, [x], [change])
    (expected,), (expected_slope,) = mx.vjp(theirs, [x], [change])
    assert mx.allclose(y, expected, atol=1e-5)
    assert mx.allclose(slope, expected_slope, atol=1e-5)


@pytest.mark.parametrize("mask", [None, "causal"])
def test_quick_attention_is_the_same_but_for_rounding(mask):
    q, k, v = (mx.random.normal((2, 4, 9, 8)) for _ in range(3))
    theirs = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask)
    assert mx.allclose(quick.attention(q, k, v, scale=0.3, mask=mask), theirs, atol=1e-5)


def test_a_patch_embedding_is_a_matrix_product():
    pixels, weight = mx.random.normal((2, 24, 36, 3)), mx.random.normal((5, 12, 12, 3))
    expected = mx.conv2d(pixels, weight, stride=12)
    assert mx.allclose(quick.patch_products(pixels, weight, 12), expected, atol=1e-4)


def test_the_cross_entropy_of_shares():
    scores, shares = mx.random.normal((4, 6)), mx.softmax(mx.random.normal((4, 6)), axis=-1)

    def plain(x):
        return -(shares * nn.log_softmax(x, axis=-1)).sum()

    value, slope = mx.value_and_grad(lambda x: quick.cross_entropy(x, shares).sum())(scores)
    expected, expected_slope = mx.value_and_grad(plain)(scores)
    assert mx.allclose(value, expected, atol=1e-5)
    assert mx.allclose(slope, expected_slope, atol=1e-5)


def test_the_tokenizer_folds_questions_and_spells_what_is_read(tmp_path):
    from transformers import AutoTokenizer

    size = start.write_tokenizer(tmp_path, start.vocabulary())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == size

    def asked(question):
        messages = [{"role": "user", "content": question}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    assert asked("What Color IS it?") == asked("what color is it?") == "USER:_what_color_is_it? ASSISTANT:"
    assert asked("<image>\nRead it.") == "USER:_<image>_read_it. ASSISTANT:"
    tokens = {"_what_color": 2, " a red circle": 3, " WORD": 5, " 408": 4, " color": 6, "_zyx": 4, " I see no text.": 5}
    for text, count in tokens.items():
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert (len(ids), tokenizer.decode(ids)) == (count, text)


def test_random_weights_depend_on_their_names_alone():
    weight = mx.zeros((8, 4))
    a, b, again = (start.initial(f"language_model.{name}.weight", weight) for name in "aba")
    assert mx.array_equal(a, again)
    assert not mx.array_equal(a, b)
    assert math.isclose(mx.var(start.initial("projector.x.weight", mx.zeros((64, 64)))).item(), 1 / 64, rel_tol=0.2)


def test_a_new_router_weighs_the_places_of_words_alike_and_changes_nothing_else(tmp_path):
    start.write_model(tmp_path / "start")
    start.write_wider(tmp_path / "start", tmp_path / "wider")
    start.write_router(tmp_path / "wider", tmp_path / "with_router")
    (first, _), (before, _), (model, _) = (load(tmp_path / folder) for folder in ("start", "wider", "with_router"))
    assert set(before.config.grid_pinpoints) - set(first.config.grid_pinpoints) == {(start.CROP, 3 * start.CROP)}
    assert model.config.has_router
    assert not before.config.has_router
    places, words = mx.split(model.router.voter[:, 0], [model.config.voter_size - model.config.filtered_text_num])
    assert mx.all(words == 1)
    assert 0.7 < mx.std(places) < 1.3
    rest = {name: array for name, array in tensors_of(model).items() if not name.startswith("router.")}
    assert rest.keys() == tensors_of(before).keys()
    assert all(mx.array_equal(array, rest[name]) for name, array in tensors_of(before).items())


def test_more_words_are_tokens_and_nothing_else_changes(tmp_path):
    start.write_model(tmp_path / "start")
    start.write_worded(tmp_path / "start", tmp_path / "worded")
    (before, old), (after, new) = (load(tmp_path / folder) for folder in ("start", "worded"))
    question = "USER:_indicate_the_shape_that_is_colored_red. ASSISTANT: 408"
    spelled, whole = (tokenizer.encode(question, add_special_tokens=False) for tokenizer in (old, new))
    assert len(whole) < len(spelled) - len("colored")
    assert old.decode(spelled) == new.decode(whole) == question
    a, b = tensors_of(before), tensors_of(after)
    name = "language_model.model.embed_tokens.weight"
    assert after.config.vocab_size == len(b[name]) > len(a[name]) + 1000
    assert mx.array_equal(b[name][: len(a[name])], a[name])
    assert a.keys() == b.keys()
    assert all(mx.array_equal(a[other], b[other]) for other in a if other != name)
    start.write_chatty(tmp_path / "worded", tmp_path / "chatty")
    assert load(tmp_path / "chatty")[0].config.vocab_size > after.config.vocab_size + 100


def test_heads_begin_by_looking_at_neighbours():
    side, D, width = 10, 128, 32
    x = beginning.places(mx.zeros((side**2 + 1, D)))[1:]
    queries, keys = (
        mx.unflatten(x @ beginning.looking(mx.zeros((D, D)), offsets).T, -1, (4, width)).swapaxes(0, 1)
        for offsets in (beginning.OFFSETS, [(0, 0)] * 4)
    )
    seen = (queries @ keys.swapaxes(-1, -2)).argmax(axis=-1)
    for head, (down, right) in enumerate(beginning.OFFSETS):
        for row, column in ((1, 1), (5, 4), (8, 8)):
            assert divmod(seen[head, row * side + column].item(), side) == (row + down, column + right)


@pytest.mark.parametrize("name", ["instruct", "together", "longer", "wide", "free", "many", "broad", "chat", "router"])
def test_the_options_are_those_of_the_command(name):
    parser = router_parser("p") if name == "router" else instruct_parser("p")
    file = RECIPE / f"{name}.yaml"
    args = vars(parser.parse_args(["--config", str(file), "--model", "m", "--data", "d", "--adapter-path", "a"]))
    options = yaml.safe_load(file.read_text())
    assert options == {option: args[option.replace("-", "_")] for option in options}
    assert args["batch_size"] == 32


def test_seeds_stand_in_the_files():
    assert (start.SEED, book.SEED, exam.SEED) == (0, 0, 1)


@pytest.mark.parametrize("script", sorted(file.stem for file in RECIPE.glob("*.py")))
def test_every_script_finds_what_it_uses(script):
    """Scripts that no test runs, because that takes hours, at least import what the package has today."""
    importlib.import_module(script)
