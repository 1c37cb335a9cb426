"""What examples/demo draws and asks: answers follow from the pictures, and no test is like a lesson."""

import itertools
import re
from collections import Counter
from functools import cache
from random import Random

import book
import numpy as np
import palette
import pytest
from backgrounds import PLAIN, STRANGE, SWIRLED, TEST_PHOTOS, TRAIN_PHOTOS, VARIED
from exam import COUNTS, LETTERS, Exam, descriptions
from pictures import SHAPES, TESTED_FONTS, Text, Thing, draw_scene, draw_shape, draw_text, some_size
from PIL import Image, ImageChops
from questions import Asker, described, listed
from wordings import (
    CHATTING,
    EMPTY,
    LEARN,
    NEITHER,
    OUTSIDE,
    PATTERNED,
    TEST,
    TRIAL,
    ask,
    ask_outside,
    asked_in,
    bare,
    contracted,
    expanded,
    filled,
    held_out,
    hurried,
    kinds,
    nouns,
    some_wording,
)
from words import ALPHABET, HELD_OUT, LEARNED, LONGEST, WORDS, some_longer_text, some_text

pytest.importorskip("skimage", reason="photographs: pip install -e '.[demo]'")
LESSONS = range(400)


@cache
def drawn(pages):
    """(scene, its questions and answers) of some of a book's pages."""
    lessons = []
    for number in LESSONS:
        rng = Random(f"{pages.name} {book.SEED} {number}")
        scene = book.learning_scene(pages, rng)
        lessons.append((scene, book.learning_pairs(scene, rng, pages)))
    return lessons


@pytest.fixture(params=[book.MIX, book.WIDE, book.FREE, book.MANY, book.BROAD, book.CHAT], ids=lambda pages: pages.name)
def lessons(request):
    return drawn(request.param)


@pytest.fixture(scope="module")
def exam(tmp_path_factory):
    """(the test's recipe, a few questions of each category)."""
    test = Exam(tmp_path_factory.mktemp("exam"), "test", TEST, TEST_PHOTOS, palette.TEST_PAINTS, HELD_OUT)
    return test, list(test.questions(dict.fromkeys(COUNTS, 12)))


QUESTIONS = [kind for kind in kinds() if kind != "politeness"]


def test_no_wording_of_the_tests_is_learned_or_tried():
    said = {
        part: {contracted(bare(way)) for kind in QUESTIONS for way in kinds()[kind].get(part, [])}
        for part in (LEARN, TRIAL, TEST, NEITHER)
    }
    assert not said[LEARN] & (said[TRIAL] | said[TEST])
    assert not said[TRIAL] & said[TEST]
    assert len(said[TRIAL]) > 100
    assert len(said[TEST]) > 100
    assert not said[NEITHER] & (said[TRIAL] | said[TEST])
    assert {bare(way) for kind in QUESTIONS for way in kinds()[kind].get(NEITHER, [])} <= held_out()
    for part, other in itertools.combinations((CHATTING, TRIAL, TEST), 2):
        assert nouns(part)
        assert not set(nouns(part)) & set(nouns(other))


GREETINGS = {"hello", "good morning"}  # learned by themselves, and in the validation set before a question


@pytest.mark.parametrize("kind", QUESTIONS)
def test_patterns_say_what_they_are_for_and_no_wording_of_the_tests(kind):
    rng = Random(kind)
    many = asked_in("many_patterns.yaml")[kind]
    chat = asked_in("chat_patterns.yaml")[kind]
    assert len(many) == len(set(many)) > 100
    assert len(chat) == len(set(chat)) > 100
    for pattern in asked_in("patterns.yaml")[kind] + asked_in("more_patterns.yaml").get(kind, []) + many + chat:
        for _ in range(20 if pattern in many + chat else 200):
            wording = expanded(rng, pattern)
            assert not set("[]<>|") & set(wording), pattern
            assert set(re.findall(r"{(\w+)}", wording)) <= set(re.findall(r"{(\w+)}", " ".join(kinds()[kind][LEARN])))
    for part in PATTERNED:
        said = {bare(some_wording(rng, kind, part)) for _ in range(3000)}
        assert len(said) > 2 * len(kinds()[kind][LEARN])
        assert said & held_out() <= GREETINGS
        asked = {contracted(bare(way)) for test in (TRIAL, TEST) for way in kinds()[kind][test]}
        assert not {contracted(way) for way in said} & asked


DENIES = r"\b(no|not|cannot|none|nothing|nowhere|without|free|zero|0|gone|vain)\b|n't\b"
DENIES += r"|miss|absen|lack|omit|forg|skip|devoid|empty of|(left|leave) out"
ASKS = r"n't (it|there|that|he|she|you|i)\b|(ca|do)n't (see|look|find|remember)|or not|no otherwise|yes\W+(or )?no"


@pytest.mark.parametrize("file", ["many_patterns.yaml", "chat_patterns.yaml"])
def test_what_many_deny_is_denied(file):
    """In the last books, yes says of what is denied that it is not there, and of the rest that it is."""
    rng = Random(0)
    many = asked_in(file)
    denied = [re.search(DENIES, expanded(rng, pattern), re.I) for pattern in many["absent"] * 9]
    assert np.mean([bool(found) for found in denied]) > 0.98
    plain = [re.sub(ASKS, "", expanded(rng, pattern), flags=re.I) for pattern in many["present"] * 9]
    assert np.mean([bool(re.search(DENIES, wording, re.I)) for wording in plain]) < 0.03


def test_no_word_photograph_or_paint_of_the_tests_is_learned(lessons):
    assert not set(HELD_OUT) & set(LEARNED)
    assert len(HELD_OUT) > 100
    assert not set(TRAIN_PHOTOS) & set(TEST_PHOTOS)
    shades = [
        {shade for shades in paints.values() for shade in shades} for paints in (palette.PAINTS, palette.TEST_PAINTS)
    ]
    assert not shades[0] & shades[1]
    rng = Random(0)
    written = {make(rng).lower() for make in (some_text, some_longer_text) for _ in range(20000)}
    written |= {text.text.lower() for scene, _ in lessons for text in scene.texts}
    assert not written & set(HELD_OUT)


def test_what_the_tests_write_is_held_out(exam):
    words = [q["answer"] for q in exam[1] if q["category"].startswith("reading") and q["answer"].isalpha()]
    assert words
    assert {word.lower() for word in words} <= set(HELD_OUT)


def test_words_are_short_and_can_be_spelled():
    rng = Random(0)
    for text in [*WORDS, *(make(rng) for make in (some_text, some_longer_text) for _ in range(2000))]:
        assert 1 <= len(text) <= LONGEST
        assert set(text) <= set(ALPHABET)


@pytest.mark.parametrize("number", range(40))
def test_drawn_things_are_where_they_are_said_to_be(number):
    """Upon nothing but their background, within their boxes, in their colours."""
    rng = Random(f"where {number}")
    size = some_size(rng)
    before = draw_scene(Random(number), size, [], [], TRAIN_PHOTOS).image
    scene = draw_scene(Random(number), size, [], [], TRAIN_PHOTOS)
    assert np.array_equal(np.asarray(before), np.asarray(scene.image))
    drawn = draw_text(scene, rng, some_text(rng)) if number % 2 else draw_shape(scene, rng, rng.choice(SHAPES))
    changed = ImageChops.difference(before, scene.image).getbbox()
    assert (changed is not None) == drawn
    for thing in (*scene.shapes, *scene.texts):
        left, top, right, bottom = thing.box
        assert left - 2 <= changed[0] <= left + 0.5 * (right - left)
        assert top - 2 <= changed[1] <= top + 0.5 * (bottom - top)
        assert changed[2] <= right + 2
        assert changed[3] <= bottom + 2
        inside = np.asarray(scene.image.crop([round(edge) for edge in thing.box]), float).reshape(-1, 3)
        nearest = min(np.abs(inside - np.array(shade)).max(axis=1).min() for shade in palette.PAINTS[thing.color])
        assert nearest <= 12


def test_things_do_not_overlap(lessons):
    for scene, _ in lessons:
        for a, b in itertools.combinations([thing.box for thing in (*scene.shapes, *scene.texts)], 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def judge(question, shapes, texts):
    """The answer to a question, found again from its words; None where it cannot be."""
    asked = re.sub("^(yes|no), |, is (there|it) not|yes or no|i'm not sure|if you do not mind", "", question.lower())
    asked = f" {bare(asked)} "
    for aside in sorted(asked_in("more_patterns.yaml")["asides"], key=len, reverse=True):
        asked = asked.replace(f" {bare(aside)} ", " ")
    inks = [color for color in palette.NAMES if f" {color} " in asked]
    sorts = [shape for shape in SHAPES if re.search(rf" {shape}s? ", asked)]
    told = [s for s in shapes if (not inks or s.color in inks) and (not sorts or s.name in sorts)]
    if re.search("how many|count|add up|(number|amount|sum|total|count) of", asked):
        return str(len(told))
    if re.search(r" (not|no|nobody|missing|absent|lack|without) ", asked):
        return "no" if told else "yes"
    if re.search(r"\b(text|writing|written|letter|word|number|inscription|characters|read)", asked):
        return None
    return ("yes" if told else "no") if inks or sorts else None


@pytest.mark.parametrize("pages", [book.MIX, book.WIDE, book.FREE], ids=lambda pages: pages.name)
def test_yes_no_and_counts_are_true(pages):
    judged = Counter()
    for scene, pairs in drawn(pages):
        for question, answer in pairs:
            if answer in ("yes", "no") or (answer.isdigit() and len(answer) == 1 and "read" not in question):
                expected = judge(question, scene.shapes, scene.texts)
                if expected is not None and not (answer.isdigit() and not expected.isdigit()):
                    assert answer == expected, (question, scene.shapes)
                    judged[answer] += 1
    assert judged["yes"] > 50
    assert 0.7 < judged["yes"] / judged["no"] < 1.4


def test_readings_colors_and_shapes_are_those_drawn(lessons):
    seen = Counter()
    for scene, pairs in lessons:
        texts, colors = {t.text for t in scene.texts}, {s.color for s in scene.shapes} | {t.color for t in scene.texts}
        names = {s.name for s in scene.shapes}
        for question, answer in pairs:
            parts = re.split(r", | and ", answer)
            if answer in (EMPTY, OUTSIDE) or answer.startswith("I see no "):
                seen["none"] += 1
            elif set(parts) <= set(palette.NAMES):
                assert set(parts) <= colors, question
                seen["color"] += 1
            elif set(parts) <= set(SHAPES):
                assert set(parts) <= names, question
                seen["shape"] += 1
            elif answer in texts:
                seen["read"] += 1
            elif len(parts) > 1 or answer.startswith(("a", "the text ")):
                assert answer == described(scene.shapes, sorted(texts)), question
                seen["described"] += 1
            else:
                assert answer in ("yes", "no", *"0123"), question
    assert min(seen[kind] for kind in ("none", "color", "shape", "read", "described")) > 20


def test_what_is_not_there_is_said_not_to_be():
    rng = Random(0)
    circle, text = Thing("circle", "red", (0, 0, 9, 9)), Text("7", "blue", (0, 0, 9, 9), ())

    def answers(shapes, texts, kind):
        scene = draw_scene(rng, (64, 64), [], [], TRAIN_PHOTOS)
        scene.shapes, scene.texts = shapes, texts
        return {Asker(scene, rng).ask(kind)[1] for _ in range(60)}

    assert answers([], [], "describe") == answers([], [], "read") == answers([], [], "color") == {EMPTY}
    assert answers([], [], "count") == {"0"}
    assert answers([circle], [], "read") == answers([circle], [], "text color") == {"I see no text."}
    assert answers([circle], [], "describe") == {"a red circle"}
    assert {"circle"} < answers([circle], [], "shape") <= {"circle", *(f"I see no {c} shape." for c in palette.NAMES)}
    assert answers([], [text], "read") == {"7"}
    assert answers([], [text], "outside") == {OUTSIDE}
    assert answers([], [text], "text present") == {"yes"}


def test_parts_are_told_in_plain_english():
    assert listed([]) == ""
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b and c"
    things = [Thing("circle", "orange", (0, 0, 1, 1)), Thing("triangle", "red", (2, 0, 3, 1))]
    assert described(things, ["5185"]) == "an orange circle, a red triangle and the text 5185"
    assert filled(Random(3), "is there a {thing}?", LEARN, thing="orange circle").count("an orange") == 1


def test_drawing_depends_on_the_seed_alone(tmp_path):
    for number in range(3):
        first, again = (book.page(tmp_path / folder, book.MIX, number) for folder in "ab")
        assert first == again
        assert (tmp_path / "a" / first["image"]).read_bytes() == (tmp_path / "b" / again["image"]).read_bytes()
    assert book.page(tmp_path, book.MIX, 1)["conversations"] != book.page(tmp_path, book.ROUTER, 1)["conversations"]


def test_sizes_and_proportions_are_covered(lessons, exam):
    later = any(lessons is drawn(pages) for pages in (book.MANY, book.BROAD, book.CHAT))
    highest = 1463 if later else 1024  # a text alone may stand in a high picture: 1024 / 0.7
    for sizes, height in (
        ([scene.image.size for scene, _ in lessons], highest),
        ([Image.open(exam[0].folder / q["image"]).size for q in exam[1]], 1024),
    ):
        assert all(64 <= w <= 1024 and 64 <= h <= height for w, h in sizes)
        longest = [max(size) for size in sizes]
        ratios = [w / h for w, h in sizes]
        assert min(longest) < 100
        assert max(longest) > 600
        assert min(ratios) < 0.8
        assert max(ratios) > 2


def test_the_letters_of_the_tests_are_as_large_as_promised(exam):
    test = exam[0]
    for n in range(30):
        scene = test._page(Random(n), TESTED_FONTS[n % 4], LETTERS)
        if scene.texts and scene.texts[0].text.isdigit():
            _, top, _, bottom = scene.texts[0].box
            assert 0.13 < (bottom - top) / scene.image.height < 0.3  # a digit is 0.73 of its font's size


def test_descriptions_are_accepted_in_any_order():
    scene = draw_scene(Random(1), (200, 200), ["circle", "triangle"], ["A1"], TRAIN_PHOTOS)
    told = descriptions(scene)
    assert described(scene.shapes, [text.text for text in scene.texts]) in told
    assert len(told) == 6


def test_every_category_asks_what_it_is_for(exam):
    by_category = {}
    for question in exam[1]:
        by_category.setdefault(question["category"], []).append(question)
    assert set(by_category) == set(COUNTS)
    assert {q["answer"] for q in by_category["shape"]} <= set(SHAPES)
    assert {q["answer"] for q in by_category["color"]} <= set(palette.NAMES)
    assert {q["answer"] for q in by_category["yes/no"]} == {"yes", "no"}
    assert {q["answer"] for q in by_category["counting"]} <= set("0123")
    assert {q["answer"] for q in by_category["nothing"]} == {EMPTY}
    assert {q["answer"] for q in by_category["outside"]} == {OUTSIDE}
    assert any(q["question"] != q["question"].lower() for q in exam[1])


def test_outside_questions_are_of_their_part():
    rng = Random(0)
    asked = {part: {bare(ask_outside(rng, part)) for _ in range(500)} for part in (LEARN, *PATTERNED, TRIAL, TEST)}
    learned = set().union(*(asked[part] for part in (LEARN, *PATTERNED)))
    assert not asked[TEST] & (learned | asked[TRIAL])
    assert not asked[TRIAL] & learned
    assert "an orange" in ask(rng, "present", TEST, thing="orange circle").replace("An", "an")


def test_texts_alone_are_as_large_as_they_may_be():
    """A picture is made wide enough for its text, so that long texts are no smaller than short ones."""
    shares = {False: [], True: []}
    for number in range(300):
        rng = Random(f"roomy {number}")
        scene = book.roomy_scene(book.WIDE, rng)
        for text in scene.texts:
            shares[len(text.text) > 5].append((text.box[3] - text.box[1]) / scene.image.height)
    assert min(map(len, shares.values())) > 50
    assert np.mean(shares[True]) > 0.85 * np.mean(shares[False])


def test_a_book_is_mostly_of_pictures_that_are_divided():
    ratios = {
        pages.name: np.array([scene.image.width / scene.image.height for scene, _ in drawn(pages)])
        for pages in (book.MANY, book.BROAD)
    }
    broad = {name: np.mean((x > 1.55) & (x < 4.1)) for name, x in ratios.items()}
    assert broad["broad"] > 0.6 > broad["many"]
    assert max(ratios["broad"]) < 4.1
    sizes = [book.broad_size(Random(n)) for n in range(500)]
    assert np.mean([h <= 90 for _, h in sizes]) > 0.35
    assert all(64 <= h < w <= 1024 for w, h in sizes)


def test_what_is_typed_in_a_hurry_has_the_same_letters():
    """Only apostrophes are left out, and the letters of names stay in order, since the answer depends on them."""
    rng, asked = Random(0), "What's the colour of that purple triangle, isn't it there?"
    typed = [hurried(rng, asked) for _ in range(4000)]
    assert len(set(typed)) > 10
    for one in set(typed):
        assert sorted(one.replace("'", "")) == sorted(asked.replace("'", ""))
        assert "purple triangle" in one
        assert one[0] == "W"
    without = np.mean(["'" not in one for one in typed])
    slipped = np.mean([one.replace("'", "") != asked.replace("'", "") for one in typed])
    assert 0.1 < without < 0.14
    assert 0.04 < slipped < 0.06


@pytest.mark.parametrize("behind", [PLAIN, VARIED, STRANGE, SWIRLED])
def test_nothing_is_nothing_whatever_it_shows(behind):
    """Of all kinds of backgrounds, which differ, and a scene of them says that nothing is there."""
    seen = set()
    for number in range(30):
        scene = draw_scene(Random(number), (96, 64), [], [], TRAIN_PHOTOS, behind=behind)
        assert scene.image.size == (96, 64)
        assert not scene.things
        seen.add(scene.image.tobytes())
    assert len(seen) == 30
