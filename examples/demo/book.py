"""Draws what the model learns: pictures, and conversations about them in LLaVA's format.

    python examples/demo/book.py build/demo

writes mix.json, late.json, last.json, wide.json, free.json, many.json, broad.json and chat.json for the language
model, router.json for the router, and their pictures.
"""

import json
import math
import sys
from multiprocessing import Pool
from pathlib import Path
from random import Random
from typing import NamedTuple

from backgrounds import PLAIN, STRANGE, SWIRLED, TRAIN_PHOTOS, VARIED, Maker, Size
from easy_vqa_data import easy_vqa, easy_vqa_image
from pictures import OTHER_FONTS, SHAPES, TESTED_FONTS, Scene, draw_scene, font_of, some_size
from PIL import Image
from questions import Asker, Pair
from wordings import ANYHOW, CHATTING, FREELY, HURRIED, LEARN, PATTERNS
from words import some_longer_text, some_text

SEED = 0
FOR_THE_ROUTER = 300  # of easy-VQA's training images: the language model does not learn them
TURNS = 5  # of easy-VQA's questions in a conversation
REGULAR, BOLD, SERIF, MONO = TESTED_FONTS
THIN = (REGULAR, REGULAR, BOLD, SERIF, SERIF, MONO, MONO, MONO)  # thin strokes take longer to learn than bold ones


class Book(NamedTuple):
    """What shares of its pages show a text alone, a text and shapes, and shapes alone; the others show nothing."""

    name: str
    pages: int
    text: float
    both: float
    shapes: float
    talk: float = 1.0  # how much is asked about shapes
    describe: float = 0.3  # how often a description is asked for
    fonts: tuple[str, ...] = TESTED_FONTS  # of two texts in three, drawn evenly
    behind: tuple[Maker, Maker] = PLAIN  # the backgrounds
    wide: bool = False  # with room for long texts
    part: str = LEARN  # of the wordings
    longer: float = 0.35  # how often, in a wide book, the longer one of two texts is taken
    crowds: tuple[int, ...] = (1, 1, 1, 2, 2, 3)  # shapes on a page that has any
    outside: float = 0.25  # how often something outside the demo's world is asked for
    broad: float = 0.0  # of the pictures, those about two or three times as wide as they are high


MIX = Book("mix", 60_000, 0.38, 0.2, 0.35)
LATE = Book("late", 40_000, 0.6, 0.25, 0.08, talk=0.5)  # reading takes longer to learn than the rest
LAST = Book("last", 44_000, 0.45, 0.33, 0.15, talk=0.5, describe=0.6, fonts=THIN)
WIDE = Book("wide", 48_000, 0.42, 0.25, 0.2, talk=0.6, describe=0.5, behind=VARIED, wide=True, part=PATTERNS)
FREE = WIDE._replace(name="free", pages=60_000, part=FREELY, longer=0.6, crowds=(1, 1, 2, 2, 3, 3))
MANY = FREE._replace(name="many", part=ANYHOW, talk=0.9, outside=0.45, longer=0.75)
# Where a picture is divided into crops, letters are cut in two, and shapes are easily counted twice.
BROAD = MANY._replace(
    name="broad",
    pages=90_000,
    both=0.26,
    talk=0.5,
    describe=0.45,
    behind=STRANGE,
    part=HURRIED,
    crowds=(1, 2, 2, 3, 3),
    outside=0.25,
    broad=0.55,
)
# One shape is as likely as more, or one that is there would be counted twice.
CHAT = BROAD._replace(
    name="chat",
    pages=76_000,
    text=0.37,
    both=0.27,
    shapes=0.24,
    talk=0.7,
    describe=0.5,
    behind=SWIRLED,
    part=CHATTING,
    crowds=(1, 1, 1, 2, 2, 3),
    outside=0.35,
    broad=0.45,
)
# What a picture shows must not tell what will be asked.
ROUTER = Book("router", 4_000, 0.15, 0.6, 0.2, behind=VARIED, wide=True, part=CHATTING, broad=0.35)


ABOUT_SHAPES = {"shape": 0.7, "color": 0.7, "present": 1.0, "is": 0.6, "count": 0.5}


def learning_scene(book: Book, rng: Random) -> Scene:
    """A text alone, shapes alone, both, or neither."""
    kind = rng.random()
    if book.wide and kind < book.text:
        return roomy_scene(book, rng)
    texts: list[str] = []
    if kind < book.text + book.both:
        texts = [some_longer_text(rng, book.longer) if book.wide else some_text(rng)]
    shapes: list[str] = []
    if book.text <= kind < book.text + book.both + book.shapes:
        shapes = [rng.choice(SHAPES) for _ in range(rng.choice(book.crowds))]
    fonts = book.fonts if rng.random() < 0.65 else OTHER_FONTS
    shares = (0.2, 0.4) if rng.random() < 0.6 else (0.13, 0.55)
    size = broad_size(rng) if is_broad(book, rng) else some_size(rng)
    return draw_scene(rng, size, shapes, texts, TRAIN_PHOTOS, fonts=fonts, shares=shares, behind=book.behind)


def is_broad(book: Book, rng: Random) -> bool:
    """Whether the next picture of a book is a broad one."""
    return bool(book.broad) and rng.random() < book.broad


def broad_size(rng: Random, needed: float = 1.0) -> Size:
    """About two or three times as wide as high, or as `needed` for a text; a third of them are as small as may be."""
    ratio = max(needed, rng.uniform(1.6, 3.2))
    if rng.random() < 0.35:
        height = rng.uniform(64, 90)
    else:
        height = math.exp(rng.uniform(math.log(64), math.log((512 if rng.random() < 0.85 else 1024) / ratio)))
    return round(height * ratio), round(height)


def roomy_scene(book: Book, rng: Random) -> Scene:
    """A text alone, in a picture that is wide enough for it."""
    font = rng.choice(book.fonts if rng.random() < 0.65 else OTHER_FONTS)
    text, share = some_longer_text(rng, book.longer), rng.uniform(*((0.2, 0.36) if rng.random() < 0.6 else (0.13, 0.5)))
    needed = 1.06 * font_of(font, 100).getlength(text) / 100 * share
    size = broad_size(rng, min(needed, 4)) if is_broad(book, rng) else roomy_size(rng, needed)
    return draw_scene(rng, size, [], [text], TRAIN_PHOTOS, fonts=(font,), shares=(share, share), behind=book.behind)


def roomy_size(rng: Random, needed: float) -> Size:
    """Of any proportion, and as wide as `needed` for a text."""
    ratio = min(max(needed, rng.choice([0.7, 1, 1, 4 / 3, 3 / 2, 2, 3, rng.uniform(1, 3)])), 4)
    height = math.exp(rng.uniform(math.log(64), math.log((512 if rng.random() < 0.9 else 1024) / ratio)))
    return max(64, round(height * ratio)), max(64, round(height))


def learning_pairs(scene: Scene, rng: Random, book: Book = MIX) -> list[Pair]:
    """A conversation, in any order."""
    talk = book.talk
    often = {"describe": book.describe, "outside": book.outside, "text present": 0.12}
    if scene.shapes:
        often |= {kind: share * talk for kind, share in ABOUT_SHAPES.items()} | {"read": 0.08, "text color": 0.04}
    if scene.texts:
        often |= {"read": 1.0, "text color": 0.25}
    if scene.texts and not scene.shapes:
        often |= {"present": 0.15, "shape": 0.06, "color": 0.06, "count": 0.1}
    if not scene.texts and not scene.shapes:
        often |= {"present": 0.5, "shape": 0.4, "color": 0.4, "count": 0.4, "read": 0.5, "text color": 0.2}
        often |= {"describe": 0.8}
    kinds = [kind for kind, share in often.items() if rng.random() < share]
    if scene.shapes:
        kinds += rng.choices(["present", "is", "shape", "color"], k=round(2 * talk))
    rng.shuffle(kinds)
    asker = Asker(scene, rng, book.part)
    return [asker.ask(kind) for kind in kinds or ["describe"]]


def page(folder: Path, book: Book, number: int) -> dict:
    """A picture in the folder, and the conversation about it; they depend on the book and the number alone."""
    rng = Random(f"{book.name} {SEED} {number}")
    scene = learning_scene(book, rng)
    file = save_picture(scene.image, folder, f"{book.name}/{number // 1000:03}/{number}", rng)
    return conversation(f"{book.name}-{number}", file, learning_pairs(scene, rng, book))


def save_picture(image: Image.Image, folder: Path, stem: str, rng: Random) -> str:
    """Small pictures as they are, large ones mostly as JPEG; returns the file's name within the folder."""
    as_jpeg = image.width * image.height > 30_000 and rng.random() < 0.7
    file = f"{stem}.jpg" if as_jpeg else f"{stem}.png"
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    image.save(folder / file, **({"quality": rng.randint(80, 95)} if as_jpeg else {"compress_level": 1}))
    return file


def conversation(id: str, file: str, pairs: list[Pair]) -> dict:
    turns = []
    for n, (question, answer) in enumerate(pairs):
        turns.append({"from": "human", "value": question if n else f"<image>\n{question}"})
        turns.append({"from": "gpt", "value": answer})
    return {"id": id, "image": file, "conversations": turns}


def easy_vqa_pages(folder: Path, numbers: list[int], turns: int, rng: Random) -> list[dict]:
    """easy-VQA's questions about some of its training images, `turns` of them to a conversation."""
    asked, samples = easy_vqa("train"), []
    (folder / "easy_vqa").mkdir(parents=True, exist_ok=True)
    for number in numbers:
        file = f"easy_vqa/{number}.png"
        easy_vqa_image("train", number).save(folder / file)
        pairs = rng.sample(asked[number], len(asked[number]))
        for start in range(0, len(pairs), turns):
            samples.append(conversation(f"easy_vqa-{number}-{start}", file, pairs[start : start + turns]))
    return samples


def pages(folder: Path, book: Book) -> list[dict]:
    """All of a book's pages, drawn by all processors."""
    with Pool() as pool:
        return pool.starmap(page, [(folder, book, number) for number in range(book.pages)], chunksize=250)


def single_questions(sample: dict) -> list[dict]:
    """A conversation's questions, each by itself."""
    turns = sample["conversations"]
    questions = [turn["value"].removeprefix("<image>\n") for turn in turns[::2]]
    return [
        {
            **sample,
            "id": f"{sample['id']}-{n}",
            "conversations": [{"from": "human", "value": f"<image>\n{question}"}, turns[2 * n + 1]],
        }
        for n, question in enumerate(questions)
    ]


def build(folder: Path) -> None:
    rng = Random(f"easy-VQA {SEED}")
    numbers = sorted(easy_vqa("train"))
    known, others = numbers[:-FOR_THE_ROUTER], numbers[-FOR_THE_ROUTER:]
    easy = easy_vqa_pages(folder, known, TURNS, rng)
    save(folder / "mix.json", easy + pages(folder, MIX))
    router = easy_vqa_pages(folder, others, TURNS, rng) + pages(folder, ROUTER)
    save(folder / "router.json", [one for sample in router for one in single_questions(sample)[:3]])
    save(folder / "late.json", easy[::2] + pages(folder, LATE))
    save(folder / "last.json", easy[1::2] + pages(folder, LAST))
    save(folder / "wide.json", easy[::4] + pages(folder, WIDE))
    save(folder / "free.json", easy[2::4] + pages(folder, FREE))
    save(folder / "many.json", easy[3::4] + pages(folder, MANY))
    save(folder / "broad.json", easy[1::4] + pages(folder, BROAD))
    save(folder / "chat.json", easy[1::8] + pages(folder, CHAT))


def save(file: Path, samples: list[dict]) -> None:
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(json.dumps(samples))
    partial.rename(file)
    print(f"{file.name}: {len(samples)} samples")


if __name__ == "__main__":
    build(Path(sys.argv[1]))
