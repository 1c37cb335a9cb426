"""Draws the tests, and a smaller validation set like them: files of questions in the format of avg-mlx evaluate.

    python examples/demo/exam.py build/demo

The tests ask in wordings, about words and over photographs that no training data has, in other paints. The validation
set, by which anything may be chosen, has wordings of its own, and the training's words and photographs. Both depend on
seeds alone.
"""

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from backgrounds import TEST_PHOTOS, TRAIN_PHOTOS, Size
from book import save_picture
from easy_vqa_data import easy_vqa, easy_vqa_image
from palette import PAINTS, TEST_PAINTS, Color
from pictures import SHAPES, TESTED_FONTS, Scene, draw_scene, font_of
from PIL import Image
from questions import Asker, Pair, article, listed
from wordings import EMPTY, OUTSIDE, TEST, TRIAL
from words import HELD_OUT, LEARNED, cased, number

SEED = 1
RATIOS = (1, 1, 4 / 3, 3 / 2, 2, 3)
FONTS = dict(zip(("regular", "bold", "serif", "mono"), TESTED_FONTS, strict=True))
LETTERS = (0.22, 0.34)  # of the picture's height, the size of their font
OTHER_LETTERS = (0.16, 0.5)
COUNTS = {
    **dict.fromkeys(("shape", "color", "counting", "description"), 300),
    **{f"reading {style}": 250 for style in FONTS},
    "yes/no": 400,
    **dict.fromkeys(("reading other sizes", "nothing", "outside"), 200),
    "missing": 100,
}
ASKED = {
    "shape": ("shape",),
    "color": ("color", "text color"),
    "yes/no": ("present", "present", "is", "is", "text present"),
    "counting": ("count",),
    "description": ("describe",),
    "nothing": ("describe", "describe", "shape", "color", "read"),
    "outside": ("outside",),
    "missing": ("read", "text color", "shape", "color"),
}


@dataclass(frozen=True)
class Exam:
    """Where its pictures and questions come from."""

    folder: Path
    name: str
    part: str
    photos: tuple[str, ...]
    paints: dict[str, tuple[Color, ...]]
    words: list[str]

    def questions(self, counts: dict[str, int]) -> Iterator[dict]:
        """So many of each category, each about a picture of its own."""
        for category, count in counts.items():
            for n in range(count):
                rng = Random(f"{self.name} {SEED} {category} {n}")
                scene, (question, answer) = self._drawn(category, rng)
                stem = f"{self.name}/{category.replace('/', '-').replace(' ', '-')}-{n}"
                record = {"image": save_picture(scene.image, self.folder, stem, rng), "question": question}
                if category == "description":
                    yield record | {"answers": descriptions(scene), "category": category}
                else:
                    yield record | {"answer": answer, "category": category}

    def twofold(self, count: int) -> Iterator[dict]:
        """Pictures of a shape and a text, a question about the one and a question about the other."""
        for n in range(count):
            rng = Random(f"{self.name} {SEED} twofold {n}")
            scene = Scene(Image.new("RGB", (1, 1)))
            while not (scene.shapes and scene.texts):
                scene = self._scene(rng, 1, [self._text(rng)], (0.2, 0.3))
            file = save_picture(scene.image, self.folder, f"{self.name}/twofold-{n}", rng)
            asker = Asker(scene, rng, self.part)
            for category, kind in (("shape", rng.choice(["shape", "color"])), ("text", "read")):
                question, answer = asker.ask(kind)
                while answer.startswith("I see"):
                    question, answer = asker.ask(kind)
                yield {"image": file, "question": question, "answer": answer, "category": category}

    def _drawn(self, category: str, rng: Random) -> tuple[Scene, Pair]:
        """A picture that the category can be asked about, and what is asked."""
        while True:
            scene = self._picture(category, rng)
            kind = "read" if category.startswith("reading") else rng.choice(ASKED[category])
            question, answer = Asker(scene, rng, self.part).ask(kind)
            if fits(category, scene, answer):
                return scene, (question, answer)

    def _picture(self, category: str, rng: Random) -> Scene:
        if category == "reading other sizes":
            return self._page(rng, rng.choice(TESTED_FONTS), OTHER_LETTERS)
        if category.startswith("reading"):
            return self._page(rng, FONTS[category.removeprefix("reading ")], LETTERS)
        if category == "nothing":
            return draw_scene(rng, some_exam_size(rng), [], [], self.photos)
        texts = [self._text(rng)] if rng.random() < 0.4 else []
        return self._scene(rng, rng.choice([0, 1, 1, 1, 2, 2, 3]), texts, (0.18, 0.34))

    def _scene(self, rng: Random, shapes: int, texts: list[str], shares: tuple[float, float]) -> Scene:
        kinds = [rng.choice(SHAPES) for _ in range(shapes)]
        return draw_scene(rng, some_exam_size(rng), kinds, texts, self.photos, paints=self.paints, shares=shares)

    def _page(self, rng: Random, font: str, shares: tuple[float, float]) -> Scene:
        """A text alone, in a picture that is wide enough for it."""
        text, share = self._text(rng), rng.uniform(*shares)
        needed = font_of(font, 100).getlength(text) / 100 * share * 1.06
        ratio = rng.choice([ratio for ratio in RATIOS if ratio >= needed] or [needed])
        size = sized(rng, ratio)
        return draw_scene(rng, size, [], [text], self.photos, paints=self.paints, fonts=(font,), shares=(share, share))

    def _text(self, rng: Random) -> str:
        """A number, or a word in upper, lower or mixed case."""
        if rng.random() < 0.45:
            return number(rng)
        word = cased(rng, rng.choice(self.words))
        return "".join(rng.choice([c.upper(), c.lower()]) for c in word) if rng.random() < 0.1 else word


def fits(category: str, scene: Scene, answer: str) -> bool:
    """Whether an answer is one that the category is for."""
    if category.startswith("reading"):
        return len(scene.texts) == 1
    if category == "nothing":
        return answer == EMPTY
    if category == "outside":
        return answer == OUTSIDE
    if category == "missing":
        return answer != EMPTY and answer.startswith("I see no")
    if category == "description":
        return bool(scene.shapes or scene.texts)
    single = category not in ("shape", "color") or len(answer.split()) == 1
    return single and not answer.startswith("I see")


def descriptions(scene: Scene) -> list[str]:
    """What is there, told in any order."""
    parts = [f"{article(shape.color)} {shape.color} {shape.name}" for shape in scene.shapes]
    parts += [f"the text {text.text}" for text in scene.texts]
    return sorted({listed(list(order)) for order in itertools.permutations(parts)})


def some_exam_size(rng: Random) -> Size:
    return sized(rng, rng.choice(RATIOS))


def sized(rng: Random, ratio: float) -> Size:
    """A picture of 64 to 1024 pixels; of the wider ones, which texts need, a few stand upright."""
    height = round(2 ** rng.uniform(6, 10) / ratio)
    height = max(64, height)
    width = min(1024, round(height * ratio))
    return (height, width) if 1 < ratio < 1.6 and rng.random() < 0.3 else (width, height)


def easy_vqa_questions(folder: Path) -> Iterator[dict]:
    """All 9,673 of easy-VQA's test questions."""
    (folder / "easy_vqa_test").mkdir(parents=True, exist_ok=True)
    for image, pairs in sorted(easy_vqa("test").items()):
        file = f"easy_vqa_test/{image}.png"
        easy_vqa_image("test", image).save(folder / file)
        for question, answer in pairs:
            category = "yes/no" if answer in ("yes", "no") else "shape" if answer in SHAPES else "color"
            yield {"image": file, "question": question, "answer": answer, "category": f"easy-VQA {category}"}


def write_lines(file: Path, records: list[dict]) -> None:
    lines = [json.dumps({"id": f"{file.stem}-{n}", **record}) for n, record in enumerate(records)]
    file.write_text("\n".join(lines) + "\n")
    print(f"{file.name}: {len(records)} questions")


def build(folder: Path) -> None:
    test = Exam(folder, "test", TEST, TEST_PHOTOS, TEST_PAINTS, HELD_OUT)
    trial = Exam(folder, "validation", TRIAL, TRAIN_PHOTOS, PAINTS, LEARNED)
    write_lines(folder / "validation.jsonl", list(trial.questions({name: n // 5 for name, n in COUNTS.items()})))
    write_lines(folder / "validation_twofold.jsonl", list(trial.twofold(100)))
    write_lines(folder / "test_twofold.jsonl", list(test.twofold(300)))
    write_lines(folder / "test_easy_vqa.jsonl", list(easy_vqa_questions(folder)))
    write_lines(folder / "test.jsonl", list(test.questions(COUNTS)))


if __name__ == "__main__":
    build(Path(sys.argv[1]))
