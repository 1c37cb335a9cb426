"""Exact match after the normalization of the public VQA evaluation."""

import re
from collections.abc import Iterable

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBER_WORDS)}
ARTICLES = ("a", "an", "the")
PUNCTUATION = re.compile(r"""[]["(){}<>;/\\=+_\-@`,?!]""")
# Left out are those that are other words without their apostrophe: its, lets, well, were, ill, shell, …
CONTRACTED = """
    ain't aren't can't couldn't couldn't've could've didn't doesn't don't hadn't hadn't've hasn't haven't isn't
    mightn't mightn't've might've mustn't must've needn't not've oughtn't shan't shouldn't shouldn't've should've
    wasn't weren't won't wouldn't wouldn't've would've he'd he'd've he's how'd how'll how's i'd've i'm i've
    it'd it'd've it'll she'd've somebody'd somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've we'd've we've what'll what're what's what've when's where'd
    where's where've who'd who'd've who'll who's who've why'll why're why's you'd you'd've you'll you're you've
    y'all y'all'd've y'all'll ma'am o'clock 'twas
"""
CONTRACTIONS = {word.replace("'", ""): word for word in CONTRACTED.split()}


def normalize(answer: str) -> str:
    """Normalize an answer as the VQA evaluation does (https://visualqa.org/evaluation.html).

    Everything is lower case. Periods go unless they are decimal points, commas within numbers go, and PUNCTUATION
    becomes spaces. Number words become digits, articles go, and contractions get their apostrophe. An answer that would
    vanish ("A", "?") is kept.
    """
    text = answer.lower().replace("’", "'")
    bare = re.sub(r"(?<=\d),(?=\d)", "", text)
    bare = PUNCTUATION.sub(" ", re.sub(r"\.(?!\d)", "", bare))
    words = [NUMBERS.get(word, word) for word in bare.split()]
    words = [word for word in words if word not in ARTICLES] or words or text.split()
    return " ".join(CONTRACTIONS.get(word.replace("'", ""), word) for word in words)


def matches(answer: str, accepted: Iterable[str]) -> bool:
    """Whether an answer equals an accepted one after normalization."""
    return normalize(answer) in map(normalize, accepted)
