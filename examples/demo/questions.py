"""What is asked about a picture, and the answers, which follow from what was drawn."""

from collections import Counter
from random import Random

from palette import NAMES as COLORS
from pictures import SHAPES, Scene, Thing
from wordings import EMPTY, LEARN, OUTSIDE, ask, ask_outside, filled, some_wording
from words import DIGITS

Pair = tuple[str, str]  # question and answer
ASKED = ("shape", "color", "present", "is", "count", "read", "text color", "text present", "describe", "outside")


class Asker:
    """Asks about one picture, in the wordings of one part."""

    def __init__(self, scene: Scene, rng: Random, part: str = LEARN):
        self.shapes, self.texts, self.rng, self.part = scene.shapes, scene.texts, rng, part

    def ask(self, kind: str) -> Pair:
        """A question of one of the kinds ASKED."""
        return getattr(self, f"_{kind.replace(' ', '_')}")()

    def _say(self, kind: str, answer: str, **names: str) -> Pair:
        return ask(self.rng, kind, self.part, **names), answer

    def _none(self, thing: str) -> str:
        """The answer about something that is not there."""
        return f"I see no {thing}." if self.shapes or self.texts else EMPTY

    def _shape(self) -> Pair:
        """Which shape the only one is, or the only one of a colour."""
        rng = self.rng
        here = sorted({shape.color for shape in self.shapes})
        color = rng.choice(here) if here and rng.random() < 0.9 else rng.choice(COLORS)
        found = [shape.name for shape in self.shapes if shape.color == color]
        if len(self.shapes) > 1 or rng.random() < 0.25:
            answer = listed(found) if found else self._none(f"{color} shape")
            return self._say("shape of color", answer, color=color)
        return self._say("shape", listed([shape.name for shape in self.shapes]) or self._none("shape"))

    def _color(self) -> Pair:
        """The colour of the only shape, or the only one of a kind."""
        rng = self.rng
        kinds = [shape.name for shape in self.shapes]
        kind = rng.choice(kinds) if kinds and rng.random() < 0.85 else rng.choice(SHAPES)
        found = [shape.color for shape in self.shapes if shape.name == kind]
        if len(kinds) > 1 or rng.random() < 0.5:
            return self._say("color of shape", listed(found) or self._none(kind), shape=kind)
        return self._say("color", listed([shape.color for shape in self.shapes]) or self._none("shape"))

    def _present(self) -> Pair:
        """Whether something is there, which it is as often as not; sometimes denied, as easy-VQA does."""
        here = {way for shape in self.shapes for way in ways_to_call(shape.name, shape.color)}
        away = sorted({way for name in SHAPES for color in COLORS for way in ways_to_call(name, color)} - here)
        if here and self.rng.random() < 0.6:  # one of its properties is there
            words = {word for way in here for word in way.split()} - {"shape"}
            away = [way for way in away if words & set(way.split())] or away
        is_here = bool(here) and self.rng.random() < 0.5
        thing = self.rng.choice(sorted(here) if is_here else away)
        if self.rng.random() < 0.15:
            return self._say("absent", yes_or_no(not is_here), thing=thing)
        return self._say("present", yes_or_no(is_here), thing=thing)

    def _is(self) -> Pair:
        """Whether the only shape, or the only one of its kind, is what it is said to be."""
        rng = self.rng
        alone = [shape for shape in self.shapes if [s.name for s in self.shapes].count(shape.name) == 1]
        if not alone:
            return self._present()
        shape = rng.choice(alone)
        kind = "is color" if len(self.shapes) > 1 or rng.random() < 0.4 else "is shape"
        question, said = some_wording(rng, kind, self.part), {"shape": shape.name, "color": shape.color}
        told = [name for name in said if f"{{{name}}}" in question and (kind, name) != ("is color", "shape")]
        true = rng.random() < 0.5
        if not true:
            wrong = rng.choice(told)
            said[wrong] = other_than(rng, {"shape": SHAPES, "color": COLORS}[wrong], said[wrong])
        return filled(rng, question, self.part, **said), yes_or_no(true)

    def _count(self) -> Pair:
        """How many shapes there are, of any kind, of one, or of a colour."""
        if self.rng.random() < 0.5:
            return self._say("count", str(len(self.shapes)))
        names = Counter(shape.name for shape in self.shapes) + Counter(f"{s.color} shape" for s in self.shapes)
        thing = self.rng.choice([*names, self.rng.choice(SHAPES), f"{self.rng.choice(COLORS)} shape"])
        return self._say("count some", str(names[thing]), thing=thing)

    def _read(self) -> Pair:
        """What is written, sometimes asked for as the number or the word it is."""
        if not self.texts:
            return self._say("read", self._none("text"))
        text = self.texts[0].text
        kind = "number" if set(text) <= set(DIGITS) else "word" if text.isalpha() else None
        return self._say(f"read {kind}" if kind and self.rng.random() < 0.3 else "read", text)

    def _text_color(self) -> Pair:
        return self._say("text color", self.texts[0].color if self.texts else self._none("text"))

    def _text_present(self) -> Pair:
        return self._say("text present", yes_or_no(bool(self.texts)))

    def _describe(self) -> Pair:
        return self._say("describe", described(self.shapes, [text.text for text in self.texts]))

    def _outside(self) -> Pair:
        return ask_outside(self.rng, self.part), OUTSIDE


def described(shapes: list[Thing], texts: list[str]) -> str:
    """Shapes from left to right, then texts."""
    parts = [f"{article(shape.color)} {shape.color} {shape.name}" for shape in shapes]
    return listed(parts + [f"the text {text}" for text in texts]) or EMPTY


def ways_to_call(name: str, color: str) -> tuple[str, str, str]:
    """A shape by its kind, by its colour, by both."""
    return name, f"{color} shape", f"{color} {name}"


def listed(parts: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(part for part in (", ".join(parts[:-1]), *parts[-1:]) if part)


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def yes_or_no(true: bool) -> str:
    return "yes" if true else "no"


def other_than(rng: Random, names: tuple[str, ...], name: str) -> str:
    return rng.choice([other for other in names if other != name])
