"""The parts of examples/demo that say what is true of a picture, and its option files."""

import importlib
import re
from random import Random

import numpy as np
import pictures
import pytest
import questions
import start
import teach_vision
import words
import yaml
from conftest import ROOT
from pictures import COLORS, INKS, SHAPES, SIDE, Thing
from PIL import Image, ImageChops

from avg_mlx.cli.train import instruct_parser, router_parser

RECIPE = ROOT / "examples" / "demo"  # on the path: pyproject.toml


@pytest.mark.parametrize("patches", [4, 8])
def test_the_labels_of_a_patch_are_shares_of_it(patches):
    side = SIDE / patches
    things = [Thing("A", "red", (0, 0, side, side / 2)), Thing("B", "blue", (1.5 * side, side, 3 * side, 2 * side))]
    names, inks, centers = teach_vision.labels(things, patches)
    for x in (names, inks, centers):
        assert x.shape[0] == patches**2
        assert np.allclose(x.sum(axis=1), 1)
    at = {name: teach_vision.NAMES.index(name) for name in ("nothing", "A", "B")}
    assert names[0, [at["A"], at["nothing"]]] == pytest.approx([0.5, 0.5])
    assert names[patches : patches + 3, at["B"]] == pytest.approx([0, 0.5, 1])
    assert inks[patches + 2, teach_vision.COVERS.index("blue")] == pytest.approx(1)
    assert np.flatnonzero(centers[:, at["A"]]).tolist() == [0]
    assert np.flatnonzero(centers[:, at["B"]]).tolist() == [patches + 2]
    assert centers[:, at["nothing"]].sum() == patches**2 - 2


@pytest.mark.parametrize("text", ["7", "408", "WORD", "MWMWM"])
@pytest.mark.parametrize("scale", [1, 2])
def test_a_text_is_written_where_it_says(text, scale):
    writer = pictures.Writer()
    for seed in range(20):
        before = Image.new("RGB", (SIDE * scale, SIDE * scale), pictures.pale(Random(seed)))
        image, half = before.copy(), SIDE * scale // 2
        things = writer.write(image, Random(seed), text, half, 2 * half, scale)
        assert "".join(thing.name for thing in things) == text
        assert len({thing.color for thing in things}) == 1
        left, top, right, bottom = ImageChops.difference(before, image).getbbox()
        assert half <= things[0].box[1] - 1 <= top
        assert bottom <= things[0].box[3] + 1
        assert things[0].box[0] - 1 <= left
        assert right <= things[-1].box[2] + 1
        ink = np.array(INKS[things[0].color])
        assert (np.asarray(image) == ink).all(axis=-1).any()
        assert np.abs(ink - np.asarray(before)[0, 0]).max() >= pictures.CONTRAST


@pytest.mark.parametrize("ask", [questions.shape_questions, questions.color_questions])
def test_what_is_asked_about_a_shape_is_true(ask):
    """Answers found again in the words of the question."""
    asked = ask(Random(0), "teal", "circle", 400)
    for question, answer in asked:
        if answer in ("yes", "no"):
            kinds = [shape for shape in SHAPES if f"{shape}" in question]
            inks = [color for color in COLORS if f" {color} " in question]
            here = (not kinds or kinds == ["circle"]) and (not inks or inks == ["teal"])
            denied = re.search(r"\bnot?\b", question) is not None
            assert answer == ("yes" if here != denied else "no"), question
        else:
            assert answer == ("teal" if "color" in question else "circle"), question
    assert {answer for _, answer in asked} == {"yes", "no", "teal", "circle"}


def test_a_color_is_there_as_often_as_not():
    asked = questions.color_questions(Random(0), "teal", "circle", 2000)
    there = [
        (answer == "yes") != (re.search(r"\bnot?\b", question) is not None)
        for question, answer in asked
        if answer in ("yes", "no") and " shape" in question
    ]
    assert len(there) > len(asked) / 2
    assert 0.45 < sum(there) / len(there) < 0.55


def test_a_text_is_asked_for_as_what_it_is():
    ways = {
        text: {questions.reading_questions(Random(n), text, "red")[0] for n in range(99)}
        for text in ("12", "ALSO", "Q7")
    }
    for text, pairs in ways.items():
        assert {answer for _, answer in pairs} == {text}
        named = {word for question, _ in pairs for word in ("number", "word") if word in question}
        assert named == {"12": {"number"}, "ALSO": {"word"}, "Q7": set()}[text]


def test_words_held_out_are_never_learned():
    assert not set(words.HELD_OUT) & set(words.LEARNED)
    assert len(words.HELD_OUT) > 50
    assert {len(word) for word in words.WORDS} == {3, 4, 5}
    assert not set(pictures.TRAIN_PHOTOS) & set(pictures.TEST_PHOTOS)


def test_the_tokenizer_has_whole_words_and_spells_the_rest(tmp_path):
    from tokenizers import Tokenizer

    size = start.write_tokenizer(tmp_path, ["what", "circle"])
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == size
    for text, tokens in {"what circle": 2, " circle": 1, "WORD": 4, " 408": 4, "é": 2}.items():
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert (len(ids), tokenizer.decode(ids)) == (tokens, text)


@pytest.mark.parametrize("name", ["instruct", "together", "longer", "colors", "polish", "router"])
def test_the_options_are_those_of_the_command(name):
    parser = router_parser("p") if name == "router" else instruct_parser("p")
    file = RECIPE / f"{name}.yaml"
    args = vars(parser.parse_args(["--config", str(file), "--model", "m", "--data", "d", "--adapter-path", "a"]))
    options = yaml.safe_load(file.read_text())
    assert options == {option: args[option.replace("-", "_")] for option in options}
    assert args["batch_size"] == 32


@pytest.mark.parametrize("script", sorted(file.stem for file in RECIPE.glob("*.py")))
def test_every_script_finds_what_it_uses(script):
    """Scripts that no test runs, because that takes hours, at least import what the package has today."""
    importlib.import_module(script)
