"""easy-VQA's pictures and questions, which come with its package."""

import json
from pathlib import Path

from backgrounds import package_folder
from PIL import Image
from questions import Pair


def easy_vqa(part: str) -> dict[int, list[Pair]]:
    """{number of the image: what is asked about it}; the parts are "train" and "test"."""
    asked: dict[int, list[Pair]] = {}
    for question, answer, image in json.loads((_folder(part) / "questions.json").read_text()):
        asked.setdefault(image, []).append((question, answer))
    return asked


def easy_vqa_image(part: str, number: int) -> Image.Image:
    return Image.open(_folder(part) / "images" / f"{number}.png").convert("RGB")


def _folder(part: str) -> Path:
    return package_folder("easy_vqa") / "data" / part
