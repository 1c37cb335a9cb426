"""Made-up data for the paper's eleven benchmarks, in folders as the Hub has them, and for a task of our own."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lmms_runs  # noqa: F401  # before datasets, which looks where it runs
import numpy as np
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pillow

OWNER = "lmms-lab-encoder"
QUESTIONS = 4  # of each benchmark

TEXT, NUMBER, TEXTS = Value("string"), Value("int64"), List(Value("string"))


def picture(n: int) -> Pillow.Image:
    """Noise of another size and shape for each number."""
    height, width = 40 + 13 * n % 90, 40 + 29 * n % 110
    return Pillow.fromarray(np.random.default_rng(n).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write(folder: Path, splits: Mapping[tuple[str, str], tuple[Features, list[dict[str, Any]]]]) -> None:
    """Write {(config, split): (features, rows)} as Parquet files, with the card that lists them."""
    card = ["---", "configs:"]
    for (config, split), (features, rows) in splits.items():
        place = "data" if config == "default" else config
        file = folder / place / f"{split}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows, features).to_parquet(file)
        files = [f"  - split: {split}", f"    path: {place}/{split}-*"]
        card += [f"- config_name: {config}", "  data_files:", *files]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))


def write_all(root: Path) -> None:
    """Write the data of all eleven benchmarks into `root`."""
    for name, splits in benchmarks():
        write(root / OWNER / name, splits)


def rows(**columns: Any) -> list[dict[str, Any]]:
    """Rows of lists and of what is the same in all rows."""
    return [
        {name: value[n] if isinstance(value, list) else value for name, value in columns.items()}
        for n in range(QUESTIONS)
    ]


def numbers() -> list[str]:
    return [str(n) for n in range(QUESTIONS)]


def pictures() -> list[Pillow.Image]:
    return [picture(n) for n in range(QUESTIONS)]


ASKED = ["is there a circle?", "what shape is in the image?", "is the triangle red?", "what is written?"]
YES_NO = ["Is there a circle?", "Is there a red car?", "Is it black?", "Is there a dog?"]


def benchmarks() -> Iterator[tuple[str, dict[tuple[str, str], tuple[Features, list[dict[str, Any]]]]]]:
    """The name of each dataset, and what is in it."""
    instructions = Features({"id": TEXT, "imageId": TEXT, "question": TEXT, "answer": TEXT})
    images = Features({"id": TEXT, "image": Image()})
    answers = ["yes", "circle", "no", "5185"]
    yield (
        "GQA",
        {
            ("testdev_balanced_instructions", "testdev"): (
                instructions,
                rows(id=numbers(), imageId=["1", "0", "1", "2"], question=ASKED, answer=answers),
            ),
            ("testdev_balanced_images", "testdev"): (images, rows(id=numbers(), image=pictures())),
        },
    )
    features = Features({"image": Image(), "question": TEXT, "choices": TEXTS, "answer": NUMBER, "hint": TEXT})
    choices = [["yes", "no"]] * QUESTIONS
    hints = ["The picture was drawn.", "", "", "Look twice."]
    content = rows(image=pictures(), question=ASKED, choices=choices, answer=[0, 1, 0, 1], hint=hints)
    yield "ScienceQA", {("ScienceQA-IMG", "test"): (features, content)}

    features = Features({"question_id": TEXT, "image": Image(), "question": TEXT, "answers": TEXTS, "category": TEXT})
    told = [["yes"] * 3 + ["no"] * 7, ["circle"] * 10, ["no"] * 9 + ["yes"], ["unanswerable"] * 10]
    content = rows(question_id=numbers(), image=pictures(), question=ASKED, answers=told, category="other")
    yield "VizWiz-VQA", {("default", "val"): (features, content)}

    features = Features(
        {"question_id": NUMBER, "image": Image(), "question": TEXT, "answers": TEXTS, "ocr_tokens": TEXTS}
    )
    tokens = [["5185"]] * QUESTIONS
    content = rows(question_id=[1, 2, 3, 4], image=pictures(), question=ASKED, answers=told, ocr_tokens=tokens)
    yield "textvqa", {("default", "validation"): (features, content)}

    features = Features({"type": TEXT, "question": TEXT, "answer": TEXT, "image": Image()})
    kinds = ["human_test", "augmented_test"] * 2
    yield (
        "ChartQA",
        {("default", "test"): (features, rows(type=kinds, question=ASKED, answer=answers, image=pictures()))},
    )

    features = Features({"questionId": TEXT, "question": TEXT, "image": Image(), "answers": TEXTS})
    content = rows(
        questionId=numbers(), question=ASKED, image=pictures(), answers=[["yes"], ["a circle"], ["no"], ["51"]]
    )
    yield "DocVQA", {("DocVQA", "validation"): (features, content)}

    features = Features({"question": TEXT, "options": TEXTS, "answer": TEXT, "image": Image()})
    content = rows(question=ASKED, options=choices, answer=["0", "1", "0", "1"], image=pictures())
    yield "ai2d", {("default", "test"): (features, content)}

    features = Features({"question_id": TEXT, "image": Image(), "question": TEXT, "answer": TEXT, "category": TEXT})
    asked = [f"{question} Please answer yes or no." for question in YES_NO]
    signs = [picture(0), picture(0), picture(1), picture(1)]
    content = rows(
        question_id=["color/1.png"] * 2 + ["code_reasoning/2.png"] * 2,
        image=signs,
        question=asked,
        answer=["Yes", "No", "Yes", "No"],
        category=["color"] * 2 + ["code_reasoning"] * 2,
    )
    yield "MME", {("default", "test"): (features, content)}

    names = ("question", "hint", "answer", "A", "B", "C", "D", "category", "source", "L2-category", "split")
    features = Features({"index": NUMBER, "image": Image(), **dict.fromkeys(names, TEXT)})
    content = [
        {
            "index": index,
            "image": picture(index % 1_000_000),
            "question": question,
            "hint": hint,
            "answer": "A",
            "A": "yes",
            "B": "no",
            "C": "nan",
            "D": "nan",
            "category": "colour",
            "source": "made up",
            "L2-category": "drawn",
            "split": "dev",
        }
        for index, question, hint in ((1, ASKED[0], "nan"), (2, ASKED[1], "Look twice."), (1_000_001, ASKED[0], "nan"))
    ]
    yield "MMBench", {("en", "dev"): (features, content)}

    features = Features({"question_id": TEXT, "question": TEXT, "answer": TEXT, "image": Image(), "category": TEXT})
    content = rows(
        question_id=numbers(), question=YES_NO, answer=["yes", "no"] * 2, image=pictures(), category="popular"
    )
    yield "POPE", {("default", "test"): (features, content)}

    pictured = {f"image_{n}": Image() for n in range(1, 8)}
    features = Features(
        {"id": TEXT, "question": TEXT, "options": TEXT, "answer": TEXT, "question_type": TEXT} | pictured
    )
    none: dict[str, Any] = dict.fromkeys(pictured)
    questions = [
        ("Art", "What do <image 1> and <image 2> show?", "['a circle', 'a square']", "B", "multiple-choice", 2),
        ("Math", "<image 1> How many?", "['one', 'two', 'three']", "A", "multiple-choice", 1),
        ("Math", "How many are in <image 1>?", "[]", "3", "open", 1),
    ]
    content = [
        {"id": f"validation_{subject}_{n}", "question": question, "options": options, "answer": answer}
        | {"question_type": kind, **none, **{f"image_{i}": picture(i) for i in range(1, count + 1)}}
        for n, (subject, question, options, answer, kind, count) in enumerate(questions)
    ]
    yield "MMMU", {("default", "validation"): (features, content)}


TASK = """\
task: {name}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_visual: image
doc_to_text: question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: {max_new_tokens}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


def write_task(folder: Path, name: str, questions: list[dict[str, Any]], max_new_tokens: int = 8) -> Path:
    """Write a task into a folder: its questions have `question`, `answer` and `image`, which may be bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.parquet"
    features = Features({"question": TEXT, "answer": TEXT, "image": Image()})
    images = [one["image"] for one in questions]
    held = [{"bytes": image, "path": None} if isinstance(image, bytes) else image for image in images]
    content = [one | {"image": image} for one, image in zip(questions, held, strict=True)]
    Dataset.from_list(content, features).to_parquet(file)
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=file, max_new_tokens=max_new_tokens))
    return folder
