"""How things are asked: the wordings that are learned, those of the validation set, and those of the tests."""

import re
from collections import Counter
from functools import cache
from pathlib import Path
from random import Random

import yaml
from palette import NAMES as COLORS
from words import common_words

LEARN, TRIAL, TEST = "learn", "trial", "test"
NEITHER = "neither"  # neither learned nor asked: learned, but for a contraction
PATTERNS = "patterns"  # what is learned, and more of patterns.yaml
FREELY = "freely"  # more again, of more_patterns.yaml, and words that change nothing
ANYHOW = "anyhow"  # most of it from many_patterns.yaml, the rest as before
HURRIED = "hurried"  # the same, now and then with an apostrophe left out, or a slip of the fingers
CHATTING = "chatting"  # half of it from chat_patterns.yaml, with more before a question and after it
BY_MANY = (ANYHOW, HURRIED, CHATTING)
PATTERNED = (PATTERNS, FREELY, *BY_MANY)
POLITE = {FREELY: 0.25, ANYHOW: 0.25, HURRIED: 0.25, CHATTING: 0.35}  # how often something stands before a question
FOLLOWED = {ANYHOW: 0.15, HURRIED: 0.15, CHATTING: 0.3}  # and how often after it
SHAPE_NAMES = ("circle", "rectangle", "triangle")
EMPTY = "I see no shape or text that I know."
OUTSIDE = "I only know shapes, colours and short texts."
ANSWER_WORDS = sorted(
    {*COLORS, *SHAPE_NAMES, "ASSISTANT", "yes", "no", "a", "an", "and", "the", "text", "I", "see", "only", "shape"}
    | {"or", "that", "know", "shapes", "colours", "short", "texts"}
)


@cache
def asked_in(name: str) -> dict:
    """What a file says: {kind: {part: wordings}}."""
    return yaml.safe_load((Path(__file__).parent / name).read_text())


def some_wording(rng: Random, kind: str, part: str) -> str:
    """A way to ask a kind of question, of one part."""
    if part not in PATTERNED:
        return rng.choice(kinds()[kind][part])
    file = _some_file(rng, kind, part)
    while file:
        wording = expanded(rng, rng.choice(asked_in(file)[kind]))
        if not _is_held_out(bare(wording), part):
            return wording
    return rng.choice(kinds()[kind][LEARN])


def _is_held_out(wording: str, part: str) -> bool:
    """Whether a bare wording is not learned; the last part does not say its contraction either."""
    return wording in held_out() or (part == CHATTING and contracted(wording) in held_out_contracted())


def _some_file(rng: Random, kind: str, part: str) -> str | None:
    """The file of patterns that a wording is taken from, if it is not one of wordings.yaml or outside.yaml."""
    if part == CHATTING and rng.random() < 0.5:
        return "chat_patterns.yaml"
    if part in BY_MANY and rng.random() < 0.75:
        return "many_patterns.yaml"
    if rng.random() < (0.35 if part == PATTERNS else 0.2):
        return None
    freely = part != PATTERNS and kind in asked_in("more_patterns.yaml") and rng.random() < 0.6
    return "more_patterns.yaml" if freely else "patterns.yaml"


@cache
def kinds() -> dict:
    """What wordings.yaml and outside.yaml say, but for the nouns."""
    return {
        kind: parts
        for file in ("wordings.yaml", "outside.yaml")
        for kind, parts in asked_in(file).items()
        if kind != "nouns"
    }


def expanded(rng: Random, pattern: str) -> str:
    """One of the wordings that a pattern stands for."""
    phrases = asked_in("patterns.yaml")["phrases"] | asked_in("more_patterns.yaml")["phrases"]
    while found := re.search(r"<(\w+)>|\[([^\[\]<>]*)\]", pattern):
        name, choices = found.groups()
        if name:
            phrase = phrases[name]
            chosen = phrase if isinstance(phrase, str) else rng.choice(phrase)
        else:
            chosen = rng.choice(choices.split("|"))
        pattern = pattern[: found.start()] + chosen + pattern[found.end() :]
    return pattern


def bare(wording: str) -> str:
    """A wording without what is varied: case, spelling, marks."""
    return re.sub(r"[^a-z{} ]", "", wording.lower().replace("colour", "color")).strip()


@cache
def held_out() -> set[str]:
    """What is not learned: the bare wordings of the validation set and the tests, and those that are asked nowhere."""
    return {bare(way) for parts in kinds().values() for part in (TRIAL, TEST, NEITHER) for way in parts.get(part, [])}


def contracted(wording: str) -> str:
    """A bare wording, as it is asked in three of ten cases."""
    return re.sub(r"^(what|who|where) is\b", r"\1s", wording)


@cache
def held_out_contracted() -> set[str]:
    """The same, each in its contracted form."""
    return {contracted(wording) for wording in held_out()}


@cache
def nouns(part: str) -> list[str]:
    """What a question outside the demo's world may be about."""
    named = asked_in("outside.yaml")["nouns"]
    if part not in PATTERNED:
        return named[part]
    files = ["patterns.yaml"]
    if part in BY_MANY:
        files.append("many_patterns.yaml")
    if part == CHATTING:
        files.append("chat_patterns.yaml")
    known = named[LEARN] + [noun for file in files for noun in asked_in(file)["nouns"]]
    return [noun for noun in known if noun not in named[TRIAL] + named[TEST]]


def ask(rng: Random, kind: str, part: str, **names: str) -> str:
    """A question of a kind about the names."""
    return filled(rng, some_wording(rng, kind, part), part, **names)


def ask_outside(rng: Random, part: str) -> str:
    """A question outside the demo's world."""
    kind = rng.choice(["about a noun", "about what is drawn", "other", "other"])
    names = {"noun": rng.choice(nouns(part)), "shape": rng.choice(SHAPE_NAMES), "color": rng.choice(COLORS)}
    return filled(rng, some_wording(rng, kind, part), part, **names)


def filled(rng: Random, wording: str, part: str, **names: str) -> str:
    """A wording with its names put in, and the article that fits them, as somebody may write it."""
    for name, value in names.items():
        wording = wording.replace(f"{{{name}}}", value)
    return _varied(rng, re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", wording), part)


def _varied(rng: Random, question: str, part: str) -> str:
    """Sometimes "colour", sometimes politely, sometimes without its mark."""
    if rng.random() < 0.5:
        question = question.replace("color", "colour")
    if rng.random() < 0.3:
        question = re.sub(r"^(what|who|where) is\b", r"\1's", question, flags=re.IGNORECASE)
    if rng.random() < POLITE.get(part, 0.12):
        polite = some_wording(rng, "politeness", part)
        question = polite + question[0].lower() + question[1:]
    if question[-1] in "?." and rng.random() < 0.35:
        question = question[:-1] + rng.choice(["", "", "?", ".", "!", " ?"])
    if part in (TRIAL, TEST) and rng.random() < 0.15:
        question = rng.choice([str.upper, str.lower])(question)
    if part == FREELY and rng.random() < 0.4:
        return with_aside(rng, question)
    if part in (HURRIED, CHATTING):
        question = hurried(rng, question)
    if part == CHATTING and rng.random() < 0.1:
        return with_aside(rng, question)
    return followed(rng, question, part) if part in FOLLOWED and rng.random() < FOLLOWED[part] else question


def hurried(rng: Random, question: str) -> str:
    """A question as it was typed: one in eight without its apostrophes, one in twenty with two letters swapped."""
    if rng.random() < 0.12:
        question = question.replace("'", "")
    words = [word for word in re.finditer(r"[a-z]{5,}", question) if word[0].rstrip("s") not in (*COLORS, *SHAPE_NAMES)]
    if words and rng.random() < 0.05:
        word = rng.choice(words)
        at = rng.randint(word.start() + 1, word.end() - 2)
        question = question[:at] + question[at + 1] + question[at] + question[at + 2 :]
    return question


def with_aside(rng: Random, question: str) -> str:
    """A question with words that change nothing: an aside at its end or anywhere, or a word that no question has."""
    asked, mark = re.fullmatch(r"(.*?)( ?[?.!]?)", question).groups()
    words = asked.split(" ")
    if rng.random() < 0.3:
        words.insert(rng.randint(0, len(words)), rng.choice(strays()))
    else:
        at_end = rng.random() < 0.6
        place = len(words) if at_end else rng.randint(0, len(words))
        words.insert(place, rng.choice(asked_in("more_patterns.yaml")["asides"]))
        if at_end and rng.random() < 0.4:
            words[-2] += ","
    return " ".join(words) + mark


def followed(rng: Random, question: str, part: str) -> str:
    """A question, and something that is said after it."""
    chatting = part == CHATTING and rng.random() < 0.7
    after = rng.choice(asked_in("chat_patterns.yaml" if chatting else "many_patterns.yaml")["after"])
    if after[0] != ",":
        return question + after
    asked, mark = re.fullmatch(r"(.*?)( ?[?.!]?)", question).groups()
    return asked + after + mark


@cache
def strays() -> list[str]:
    """Common words that stand nowhere in the pattern files, nor in another question that is learned."""
    said = set(question_words())
    for file in ("patterns.yaml", "more_patterns.yaml"):
        said |= set(re.findall("[a-z]+", (Path(__file__).parent / file).read_text()))
    return [word for word in common_words() if word not in said]


@cache
def pattern_words(files: tuple[str, ...]) -> list[str]:
    """The words that files of patterns say at least twice, in lower case."""
    said: Counter[str] = Counter()
    for file in files:
        for kind, patterns in asked_in(file).items():
            if kind != "nouns":
                texts = patterns.values() if kind == "phrases" else patterns
                said.update(re.findall("[a-z]+", re.sub(r"\{\w+\}|<\w+>", " ", str([*texts])).lower()))
    words = {word for word, times in said.items() if times > 1}
    return sorted(words | {word.replace("color", "colour") for word in words})


def question_words() -> list[str]:
    """All words of the questions that are learned, in lower case."""
    texts = [text for kind in asked_in("wordings.yaml").values() for text in kind[LEARN]]
    texts += [text for kind, parts in asked_in("outside.yaml").items() if kind != "nouns" for text in parts[LEARN]]
    texts += [*COLORS, *SHAPE_NAMES, "colour colours colors shapes", *(f"{name}s" for name in SHAPE_NAMES)]
    texts = [re.sub(r"\{\w+\}", " ", text) for text in texts] + [text.replace("color", "colour") for text in texts]
    return sorted({word for text in texts for word in re.findall(r"[a-z]+", text.lower())})
