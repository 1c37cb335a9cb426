"""Exact match after VQA's normalization."""

import pytest

from avg_mlx.evaluation.metric import CONTRACTIONS, matches, normalize


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        # The rules' own examples (https://visualqa.org/evaluation.html)
        ("dont", "don't"),
        ("girl's", "girl's"),
        ("2:50 pm", "2:50 pm"),
        ("100,978", "100978"),
        # Case, and white space
        ("  A red\n\tBall ", "red ball"),
        # Periods, but for decimal points
        ("Stop.", "stop"),
        ("U.S.A.", "usa"),
        ("3.5", "3.5"),
        ("costs .5", "costs .5"),
        ("7.", "7"),
        # Number words and articles
        ("none", "0"),
        ("zero one two three four five six seven eight nine ten", "0 1 2 3 4 5 6 7 8 9 10"),
        ("the cat and an ant on a mat", "cat and ant on mat"),
        ("eleven", "eleven"),
        ("someone", "someone"),
        ("theatre", "theatre"),
        # Punctuation
        ("t-shirt", "t shirt"),
        ("black/white", "black white"),
        ("yes, two", "yes 2"),
        ("1,234,567", "1234567"),
        ("1, 2", "1 2"),
        ('"hello" (really)?!', "hello really"),
        ("[a_b] {c} <d> e=f+g; h\\i @j `k`", "b c d e f g h i j k"),
        ("$5 & 50%", "$5 & 50%"),
        # Contractions, whole or in part, with any apostrophe
        ("Couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("I’m", "i'm"),
        ("its well, were ill", "its well were ill"),
        # What would vanish is kept
        ("A", "a"),
        ("The.", "the"),
        ("?", "?"),
        ("", ""),
    ],
)
def test_answers_are_normalized_by_the_rules(answer, expected):
    assert normalize(answer) == expected
    assert normalize(expected) == expected


def test_every_contraction_finds_its_apostrophe():
    assert len(CONTRACTIONS) > 90
    for bare, whole in CONTRACTIONS.items():
        assert "'" in whole
        assert bare == whole.replace("'", "")
        assert normalize(bare.capitalize()) == normalize(whole) == whole


@pytest.mark.parametrize(
    ("answer", "accepted", "right"),
    [
        ("The two dogs.", ["a cat", "2 dogs"], True),
        ("two", ["2", "3"], True),
        ("three", ["2"], False),
        ("dog", ["dogs"], False),
        ("2 dogs", ["2 dogs and a cat"], False),
        ("", ["a", "the", "?"], False),
        ("A", ["B", "C"], False),
        ("A", ["a."], True),
    ],
)
def test_an_answer_is_right_if_it_is_one_of_the_accepted(answer, accepted, right):
    assert matches(answer, accepted) is right
