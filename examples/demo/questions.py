"""The demo's questions: easy-VQA's, and reading.

    python examples/demo/questions.py build/demo

writes mix.json, colors.json, more.json and lines.json, to train the model on, router.json and validation.jsonl, for its
router, and files of questions never trained on.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from pictures import (
    COLORS,
    SHAPES,
    SIDE,
    TEST_PHOTOS,
    TRAIN_PHOTOS,
    Writer,
    any_color,
    draw_shape,
    package_folder,
    pale,
    photo_crop,
    photos,
)
from PIL import Image
from words import HELD_OUT, LEARNED, WORDS

READ_NUMBER = ("what number is written?", "what number is in the image?", "which number is it?", "read the number.")
READ_WORD = ("what word is written?", "what word is in the image?", "which word is it?", "read the word.")
READ_TEXT = ("what is written?", "what does it say?", "read the text.", "what is the text in the image?")
TEXT_COLOR = ("what color is the text?", "what is the color of the text?")
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
SIZES = ((128, 128), (128, 128), (128, 64), (64, 128))  # (width, height) of one picture in ten
FOR_THE_ROUTER = 300  # of easy-VQA's training images: the language model does not learn them
SEED = 0

Pairs = list[tuple[str, str]]  # questions and answers


def easy_vqa(part: str) -> dict[int, Pairs]:
    """{number of the image: what is asked about it}."""
    asked: dict[int, Pairs] = {}
    for question, answer, image in json.loads((_easy_vqa_folder(part) / "questions.json").read_text()):
        asked.setdefault(image, []).append((question, answer))
    return asked


def easy_vqa_image(part: str, number: int) -> Image.Image:
    return Image.open(_easy_vqa_folder(part) / "images" / f"{number}.png").convert("RGB")


def _easy_vqa_folder(part: str) -> Path:
    return package_folder("easy_vqa") / "data" / part


def shape_questions(rng: Random, color: str, shape: str, count: int) -> Pairs:
    """Questions as easy-VQA asks them."""
    pairs = []
    for _ in range(count):
        kind = rng.random()
        if kind < 0.25:
            ways = ("what shape is in the image?", "what shape does the image contain?", "what shape is present?")
            pairs.append((rng.choice([*ways, f"what is the {color} shape?"]), shape))
        elif kind < 0.5:
            thing = rng.choice([shape, "shape"])
            pairs.append((rng.choice([f"what color is the {thing}?", f"what is the color of the {thing}?"]), color))
        else:
            others = rng.choice(SHAPES), f"{rng.choice(list(COLORS))} shape"
            thing = rng.choice([others[0], shape, others[1], f"{color} shape"])
            pairs.append(presence_question(rng, thing, thing in (shape, f"{color} shape")))
    return pairs


def color_questions(rng: Random, color: str, shape: str, count: int) -> Pairs:
    """Mostly whether there is a shape of some colour, which there is as often as not."""
    pairs = []
    for _ in range(count):
        if rng.random() < 0.3:
            pairs += shape_questions(rng, color, shape, 1)
        else:
            asked = color if rng.random() < 0.5 else rng.choice([other for other in COLORS if other != color])
            pairs.append(presence_question(rng, f"{asked} shape", asked == color))
    return pairs


def presence_question(rng: Random, thing: str, here: bool) -> tuple[str, str]:
    negated = rng.random() < 0.4
    no = "not " if negated else ""
    ways = (
        f"is there {no}a {thing}?",
        f"is there {no}a {thing} in the image?",
        f"does the image {no}contain a {thing}?",
        f"is {'no' if negated else 'a'} {thing} present?",
    )
    return rng.choice(ways), "yes" if here != negated else "no"


def reading_questions(rng: Random, text: str, color: str) -> Pairs:
    kind = READ_NUMBER if text.isdigit() else READ_WORD if text in WORDS else ()
    pairs = [(rng.choice(READ_TEXT + kind), text)]
    return pairs + ([(rng.choice(TEXT_COLOR), color)] if rng.random() < 0.3 else [])


def short_text(rng: Random, words: list[str]) -> str:
    """A number of one to four digits, or a word."""
    return str(rng.randint(0, 10 ** rng.randint(1, 4) - 1)) if rng.random() < 0.5 else rng.choice(words)


def random_text(rng: Random, lengths: Sequence[int] = (2, 3, 4, 5)) -> str:
    """Letters and digits that mean nothing: what is read, not guessed."""
    return "".join(rng.choices(ALPHABET, k=rng.choice(lengths)))


class Book:
    """Pictures with the conversations about them, in a folder and a JSON file of one name."""

    def __init__(self, folder: Path, name: str, photo_names: tuple[str, ...], words: list[str]):
        self.folder, self.name, self.words = folder, name, words
        self.rng, self.writer, self.photos = Random(f"{name} {SEED}"), Writer(), photos(photo_names)
        self.samples: list[dict] = []
        (folder / name).mkdir(parents=True, exist_ok=True)

    def easy_vqa_pages(self, numbers: list[int], turns: int) -> None:
        """easy-VQA's questions about some of its training images, `turns` of them to a conversation."""
        asked = easy_vqa("train")
        (self.folder / "easy_vqa").mkdir(exist_ok=True)
        for number in numbers:
            file = f"easy_vqa/{number}.png"
            easy_vqa_image("train", number).save(self.folder / file)
            pairs = self.rng.sample(asked[number], len(asked[number]))
            for start in range(0, len(pairs), turns):
                self._tell(file, pairs[start : start + turns])

    def shape_page(self, questions: int, ask: Callable[[Random, str, str, int], Pairs] = shape_questions) -> None:
        """A shape by itself."""
        size, color, shape = self._size(), self.rng.choice(list(COLORS)), self.rng.choice(SHAPES)
        image = Image.new("RGB", size, pale(self.rng))
        draw_shape(image, self.rng, color, shape, 0, size[1], scale_of(size))
        self._add(image, ask(self.rng, color, shape, questions))

    def mixed_page(self, questions: int) -> None:
        """A shape and a text, and questions about both in any order."""
        image, shape, ink, color, text = self._mixed(self._size())
        pairs = shape_questions(self.rng, color, shape, questions) + reading_questions(self.rng, text, ink)
        self._add(image, self.rng.sample(pairs, len(pairs)))

    def twofold_page(self, small: bool = False) -> None:
        """A shape and a text, a question about the one and a question about the other."""
        image, shape, ink, color, text = self._mixed((SIDE, SIDE) if small else self._size())
        pairs = shape_questions(self.rng, color, shape, 1) + reading_questions(self.rng, text, ink)[:1]
        self._add(image, pairs)

    def _mixed(self, size: tuple[int, int]) -> tuple[Image.Image, str, str, str, str]:
        """(picture, shape, the text's colour, the shape's, text)."""
        rng = self.rng
        color, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
        image, half = Image.new("RGB", size, pale(rng)), size[1] // 2
        text, above = short_text(rng, self.words), rng.random() < 0.5
        halves = [(0, half), (half, size[1])]
        draw_shape(image, rng, color, shape, *halves[above], scale=scale_of(size))
        ink = self.writer.write(image, rng, text, *halves[not above], scale=scale_of(size))[0].color
        return image, shape, ink, color, text

    def reading_page(self, lines: int = 1, meaningless: float = 0.0) -> None:
        """One or more lines of text, to be read from top to bottom; so many of them are random."""
        rng, size = self.rng, self._size()
        image, texts, height = self._background(size), [], size[1] // lines
        for line in range(lines):
            texts.append(random_text(rng) if rng.random() < meaningless else short_text(rng, self.words))
            place = line * height, (line + 1) * height
            color = self.writer.write(image, rng, texts[-1], *place, scale=scale_of(size))[0].color
        if lines == 1:
            self._add(image, reading_questions(rng, texts[0], color))
        else:
            self._add(image, [(rng.choice(READ_TEXT), " ".join(texts))])

    def word_page(self) -> None:
        """A word in a small square picture."""
        image, word = self._background((SIDE, SIDE)), self.rng.choice(self.words)
        color = self.writer.write(image, self.rng, word, 0, SIDE)[0].color
        self._add(image, reading_questions(self.rng, word, color))

    def save(self) -> None:
        (self.folder / f"{self.name}.json").write_text(json.dumps(self.samples))
        print(f"{self.name}: {len(self.samples)} samples")

    def _add(self, image: Image.Image, pairs: Pairs) -> None:
        file = f"{self.name}/{len(self.samples)}.png"
        image.save(self.folder / file, compress_level=1)
        self._tell(file, pairs)

    def _tell(self, file: str, pairs: Pairs) -> None:
        turns = []
        for n, (question, answer) in enumerate(pairs):
            turns.append({"from": "human", "value": question if n else f"<image>\n{question}"})
            turns.append({"from": "gpt", "value": answer})
        self.samples.append({"id": f"{self.name}-{len(self.samples)}", "image": file, "conversations": turns})

    def _background(self, size: tuple[int, int]) -> Image.Image:
        if self.rng.random() < 0.5:
            return photo_crop(self.rng.choice(self.photos), self.rng, size)
        return Image.new("RGB", size, pale(self.rng) if self.rng.random() < 0.6 else any_color(self.rng))

    def _size(self) -> tuple[int, int]:
        """(width, height): mostly small and square."""
        return (SIDE, SIDE) if self.rng.random() < 0.9 else self.rng.choice(SIZES)


def scale_of(size: tuple[int, int]) -> int:
    """How much larger than in a small picture things are drawn."""
    return round((size[0] * size[1]) ** 0.5 / SIDE)


def build_mix(folder: Path, name: str, color_pages: int = 0) -> None:
    """What the model learns."""
    book = Book(folder, name, TRAIN_PHOTOS, LEARNED)
    book.easy_vqa_pages(sorted(easy_vqa("train"))[:-FOR_THE_ROUTER], 5)
    for _ in range(10000):
        book.mixed_page(4)
    for _ in range(8000):
        book.shape_page(6)
    for _ in range(24000):
        book.reading_page(book.rng.choice([1, 1, 2, 2, 3]), meaningless=0.6)
    for _ in range(color_pages):
        book.shape_page(8, color_questions)
    book.rng.shuffle(book.samples)
    book.save()


def build_colors(folder: Path) -> None:
    """Colours to compare, and some reading, lest it be forgotten."""
    book = Book(folder, "colors", TRAIN_PHOTOS, LEARNED)
    for _ in range(8000):
        book.shape_page(8, color_questions)
    for _ in range(2500):
        book.reading_page(book.rng.choice([1, 1, 2, 2, 3]), meaningless=0.6)
    book.rng.shuffle(book.samples)
    book.save()


def build_lines(folder: Path) -> None:
    """Single lines above all, and some of everything else, lest it be forgotten."""
    book = Book(folder, "lines", TRAIN_PHOTOS, LEARNED)
    book.easy_vqa_pages(sorted(easy_vqa("train"))[:2000], 5)
    for _ in range(30000):
        book.reading_page(meaningless=0.4)
    for _ in range(3000):
        book.reading_page(book.rng.choice([2, 3]), meaningless=0.4)
    for _ in range(6000):
        book.mixed_page(4)
    for _ in range(3000):
        book.shape_page(6)
    for _ in range(5000):
        book.shape_page(8, color_questions)
    book.rng.shuffle(book.samples)
    book.save()


def build_router(folder: Path) -> None:
    """What the router learns: one question a sample, about pictures that are new to the language model.

    Half of them come in pairs about one picture, so that the picture alone does not tell how closely to look.
    """
    book = Book(folder, "router", TRAIN_PHOTOS, LEARNED)
    book.easy_vqa_pages(sorted(easy_vqa("train"))[-FOR_THE_ROUTER:], 1)
    for _ in range(1000):
        book.reading_page()
    for _ in range(2000):
        book.twofold_page()
    book.samples = [one for sample in book.samples for one in single_questions(sample)]
    book.rng.shuffle(book.samples)
    book.save()


def question_of(turn: dict) -> str:
    return turn["value"].removeprefix("<image>\n")


def single_questions(sample: dict) -> list[dict]:
    """A conversation's questions, each by itself."""
    turns = sample["conversations"]
    return [
        {
            **sample,
            "id": f"{sample['id']}-{n // 2}",
            "conversations": [{"from": "human", "value": f"<image>\n{question_of(turns[n])}"}, turns[n + 1]],
        }
        for n in range(0, len(turns), 2)
    ]


def build_validation(folder: Path) -> None:
    """Questions to choose the router's token cost by: as the tests', over the photographs that are trained on."""
    book = Book(folder, "validation", TRAIN_PHOTOS, LEARNED)
    for _ in range(400):
        book.reading_page()
    asked = [_question(sample, "word") for sample in book.samples]
    for _ in range(400):
        book.twofold_page()
        asked += [_question(book.samples[-1], about) for about in ("shape", "text")]
    write_lines(folder / "validation.jsonl", asked)


def build_tests(folder: Path) -> None:
    """Questions never trained on, over other photographs; `new word` are words that no training picture shows."""
    shapes = []
    (folder / "easy_vqa_test").mkdir(parents=True, exist_ok=True)
    for number, pairs in sorted(easy_vqa("test").items()):
        file = f"easy_vqa_test/{number}.png"
        easy_vqa_image("test", number).save(folder / file)
        for question, answer in pairs:
            category = "yes/no" if answer in ("yes", "no") else "shape" if answer in SHAPES else "color"
            shapes.append({"image": file, "question": question, "answer": answer, "category": category})
    known = Book(folder, "reading_test", TEST_PHOTOS, LEARNED)
    for _ in range(800):
        known.reading_page()
    new = Book(folder, "new_words_test", TEST_PHOTOS, HELD_OUT)
    for _ in range(200):
        new.word_page()
    reading = [_question(sample, "word") for sample in known.samples]
    reading += [_question(sample, "new word") for sample in new.samples]
    write_lines(folder / "test_easy_vqa.jsonl", shapes)
    write_lines(folder / "test_reading.jsonl", reading)
    twofold = Book(folder, "twofold_test", TEST_PHOTOS, LEARNED)
    for _ in range(300):
        twofold.twofold_page(small=True)
    asked = [_question(sample, about) for sample in twofold.samples for about in ("shape", "text")]
    write_lines(folder / "test_twofold.jsonl", asked)
    write_lines(folder / "test.jsonl", shapes + reading)  # last: the Makefile takes it for the sign that all is there


def _question(sample: dict, category: str) -> dict:
    first = 2 if category == "text" else 0  # of a twofold page
    turns = sample["conversations"][first : first + 2]
    question, answer = question_of(turns[0]), turns[1]["value"]
    if category == "word" and answer.isdigit():
        category = "number"
    return {"image": sample["image"], "question": question, "answer": answer, "category": category}


def write_lines(file: Path, records: list[dict]) -> None:
    lines = [json.dumps({"id": f"{file.stem}-{n}", **record}) for n, record in enumerate(records)]
    file.write_text("\n".join(lines) + "\n")
    print(f"{file.name}: {len(records)} questions")


def vocabulary() -> list[str]:
    """Words that are one token each; all else is spelled."""
    texts = [*READ_NUMBER, *READ_WORD, *READ_TEXT, *TEXT_COLOR, "white describe USER ASSISTANT"]
    texts += [f"{question} {answer}" for pairs in easy_vqa("train").values() for question, answer in pairs]
    return sorted({word for text in texts for word in text.replace("?", "").replace(".", "").split()})


if __name__ == "__main__":
    target = Path(sys.argv[1])
    build_mix(target, "mix")
    build_colors(target)
    build_mix(target, "more", color_pages=8000)
    build_lines(target)
    build_router(target)
    build_validation(target)
    build_tests(target)
