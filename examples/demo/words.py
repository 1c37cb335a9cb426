"""The texts that are written into pictures."""

from functools import cache
from pathlib import Path
from random import Random

LETTERS = "abcdefghijklmnopqrstuvwxyz"
DIGITS = "0123456789"
ALPHABET = LETTERS.upper() + LETTERS + DIGITS
LONGEST = 8
CONSONANTS, VOWELS = "bcdfghjklmnprstvwyz", "aeiou"

WORDS = sorted({w for w in (Path(__file__).parent / "words.txt").read_text().split() if 2 <= len(w) <= LONGEST})
HELD_OUT = WORDS[::8]  # never seen in training
LEARNED = [word for word in WORDS if word not in HELD_OUT]


def cased(rng: Random, word: str) -> str:
    """A word in upper case, in lower case or with a capital."""
    return rng.choice([str.upper, str.lower, str.capitalize])(word)


def number(rng: Random) -> str:
    """Of one to eight digits, the shorter ones more often."""
    digits = rng.choice([1, 1, 2, 2, 3, 3, 4, 4, 5, 6, 7, 8])
    return str(rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1))


def made_up(rng: Random) -> str:
    """A word that could be one."""
    while True:
        syllables = [rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.randint(1, 3))]
        word = "".join(s + (rng.choice(CONSONANTS) if rng.random() < 0.4 else "") for s in syllables)
        if 3 <= len(word) <= LONGEST and word not in HELD_OUT:
            return word


def random_text(rng: Random) -> str:
    """Letters and digits that mean nothing: what is read, not guessed."""
    signs = rng.choice([LETTERS.upper(), LETTERS, LETTERS.upper() + DIGITS, ALPHABET])
    while True:
        text = "".join(rng.choices(signs, k=rng.randint(2, LONGEST)))
        if text.lower() not in HELD_OUT:
            return text


def some_text(rng: Random) -> str:
    """A text to learn from."""
    kind = rng.random()
    if kind < 0.3:
        return number(rng)
    if kind < 0.5:
        return cased(rng, rng.choice(LEARNED))
    return cased(rng, made_up(rng)) if kind < 0.75 else random_text(rng)


@cache
def common_words() -> list[str]:
    """The most common English words of two to eight letters, but for those of the tests."""
    from wordfreq import top_n_list

    words = top_n_list("en", 20_000)
    return [w for w in words if w.isascii() and w.isalpha() and 2 <= len(w) <= LONGEST and w not in HELD_OUT]


def some_longer_text(rng: Random, longer: float = 0.35) -> str:
    """A text to learn from, more often a real word; in a share of the cases, `longer`, it is the longer one of two."""
    return max((_word_or_number(rng) for _ in range(2 if rng.random() < longer else 1)), key=len)


def _word_or_number(rng: Random) -> str:
    kind = rng.random()
    if kind < 0.35:
        return number(rng)
    if kind < 0.75:
        word = cased(rng, rng.choice(common_words()))
        return "".join(rng.choice([c.upper(), c.lower()]) for c in word) if rng.random() < 0.1 else word
    return cased(rng, made_up(rng)) if kind < 0.83 else random_text(rng)
