"""Question files: what is read from each form, and what is said of the rest."""

import json
from pathlib import Path

import pytest
from conftest import conversation, write_samples

from avg_mlx import InputError, Question, read_questions
from avg_mlx.cli.evaluate import main
from avg_mlx.evaluation import questions as questions_module

SIMPLE = {"image": "wide.png", "question": "What is it?", "answer": "a cat"}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with images."""
    write_samples(tmp_path, [])
    return tmp_path


@pytest.fixture
def write(folder):
    """`write(*records)`: a JSON Lines file beside the images; texts are lines as they stand."""

    def write(*records, name: str = "questions.jsonl") -> Path:
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        (folder / name).write_text("\n".join(lines) + "\n")
        return folder / name

    return write


def read(*arguments, **options) -> list[Question]:
    questions, bad = read_questions(*arguments, **options)
    assert bad == []
    return questions


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (SIMPLE, [("1", "What is it?", ("a cat",), None)]),
        (SIMPLE | {"id": "q7", "category": "pets"}, [("q7", "What is it?", ("a cat",), "pets")]),
        (SIMPLE | {"id": 0, "category": 3}, [("0", "What is it?", ("a cat",), "3")]),
        (SIMPLE | {"answer": ["a cat", "cat"]}, [("1", "What is it?", ("a cat", "cat"), None)]),
        (SIMPLE | {"answers": ["a cat", "pet"]}, [("1", "What is it?", ("a cat", "pet"), None)]),
        (SIMPLE | {"image": ["wide.png"]}, [("1", "What is it?", ("a cat",), None)]),
        (SIMPLE | {"question": " <image>\nWhat is it? "}, [("1", "What is it?", ("a cat",), None)]),
        (
            {"id": "c", "image": "wide.png", "conversations": conversation("<image>\nA dog?", "no"), "category": "x"},
            [("c", "A dog?", ("no",), "x")],
        ),
        (
            {"id": "c", "image": "wide.png", "conversations": conversation("A dog?\n<image>", "no", "A car?", "Yes.")},
            [("c-1", "A dog?", ("no",), None), ("c-2", "A car?", ("Yes.",), None)],
        ),
    ],
)
@pytest.mark.parametrize("form", ["lines", "list"])
def test_every_form_gives_its_questions(form, record, expected, write, folder):
    file = write(record) if form == "lines" else write(json.dumps([record], indent=2), name="questions.json")
    questions = read(file)
    assert [(q.id, q.question, q.answers, q.category) for q in questions] == expected
    assert {(q.image, q.file) for q in questions} == {("wide.png", folder / "wide.png")}


def test_images_lead_from_the_image_folder(folder, tmp_path_factory):
    file = tmp_path_factory.mktemp("elsewhere") / "questions.jsonl"
    file.write_text("\n" + json.dumps(SIMPLE) + "\n\n")
    [question] = read(file, folder)
    assert question.file == folder / "wide.png"
    with pytest.raises(InputError, match=r"line 2: there is no image .*wide\.png;.*image folder"):
        read_questions(file)


def test_without_an_id_a_question_has_the_number_of_its_line(write):
    assert [q.id for q in read(write(SIMPLE, "", SIMPLE | {"question": "Why?"}))] == ["1", "3"]


def test_the_limit_ends_the_reading(write):
    two = {"id": "c", "image": "wide.png", "conversations": conversation("A dog?", "no", "A car?", "Yes.")}
    file = write(SIMPLE, two, "nonsense")
    assert [q.id for q in read(file, limit=1)] == ["1"]
    assert [q.id for q in read(file, limit=2)] == ["1", "c-1"]
    assert [q.id for q in read(file, limit=3)] == ["1", "c-1", "c-2"]
    with pytest.raises(InputError, match="line 3"):
        read_questions(file, limit=4)


def test_a_key_tells_everything_apart_but_the_folder(folder, write, tmp_path_factory):
    other = write_samples(tmp_path_factory.mktemp("other"), []).parent
    changes = ({}, {"id": "x"}, {"image": "tall.png"}, {"question": "Who?"}, {"answer": "dog"}, {"category": "y"})
    keys = [read(write(SIMPLE | change))[0].key for change in changes]
    assert len(set(keys)) == len(changes)
    assert read(write(SIMPLE), other)[0].key == keys[0]
    (folder / "wide.png").write_bytes((folder / "wide.png").read_bytes() + b"more")
    assert read(write(SIMPLE))[0].key != keys[0]


EXAMPLE = '{"image": "1.png", "question": "What is it?", "answer": "a cat"}'
BAD = [  # a record, and what a message names: what was found, and what to do
    ("{'image': 1}", "not valid JSON", "column 2"),
    ("null", "nothing", EXAMPLE),
    ("[1, 2]", "[1, 2]", EXAMPLE),
    ({"image": "wide.png", "answer": "x"}, "question '2'", EXAMPLE),
    (SIMPLE | {"question": " <image>\n"}, "question '2'", EXAMPLE),
    (SIMPLE | {"question": ["What?"]}, "question '2'", EXAMPLE),
    (
        {"id": "q", "image": "wide.png", "question": "What?"},
        "question 'q' has nothing as its answer",
        "expected a text",
    ),
    (SIMPLE | {"answer": None}, "question '2' has nothing as its answer", "expected a text"),
    (SIMPLE | {"answer": " "}, "question '2' has [\" \"]", "expected a text"),
    (SIMPLE | {"answer": 7}, "question '2' has 7", "expected a text"),
    (SIMPLE | {"answers": []}, "question '2' has nothing as its answer", "expected a text"),
    (SIMPLE | {"answers": ["x", None]}, "question '2' has [\"x\", null]", "expected a text"),
    (SIMPLE | {"image": None}, "question '2' has nothing as its image", "expected the name of one file"),
    (SIMPLE | {"image": ["a.png", "b.png"]}, '["a.png", "b.png"]', "expected the name of one file"),
    (SIMPLE | {"image": "gone.png"}, "there is no image {folder}/gone.png", "image folder"),
    (SIMPLE | {"image": "text.png"}, "{folder}/text.png is not an image", "PNG"),
    (SIMPLE | {"image": "empty.png"}, "{folder}/empty.png is empty", "give"),
    (SIMPLE | {"question": "\ud800?"}, "half a character", "UTF-8"),
    (SIMPLE | {"id": "first", "question": "Who?"}, "question 'first'", "remove one"),
    ({"image": "wide.png", "conversations": []}, "nothing", "expected human and gpt"),
    ({"image": "wide.png", "conversations": conversation("A dog?")}, '["human"]', "expected human and gpt"),
    ({"image": "wide.png", "conversations": ["A dog?", "no"]}, '["A dog?", "no"]', "expected human and gpt"),
    ({"image": "wide.png", "conversations": conversation("A dog?", "")}, "question '2' has [\"\"]", "expected a text"),
]


@pytest.mark.parametrize(("record", "found", "remedy"), BAD)
def test_a_record_that_cannot_be_used_is_one_line_before_the_model_is_loaded(
    record, found, remedy, refused, write, folder
):
    first = SIMPLE | {"id": "first", "question": "Who?"}
    (folder / "text.png").write_text("no image")
    (folder / "empty.png").touch()
    file = write(first, record, SIMPLE)
    arguments = ("--model", "no such model", "--data", file, "--output", folder / "out")
    line = refused(main, *arguments)
    assert line.startswith(f"avg-mlx evaluate: {file}, line 2: ")
    for told in (found.replace("{folder}", str(folder)), remedy, "--skip-bad"):
        assert told in line
    assert not (folder / "out").exists()
    questions, bad = read_questions(file, skip_bad=True)
    assert [q.id for q in questions] == ["first", "3"]
    [told] = bad
    assert line.startswith(f"avg-mlx evaluate: {told}; ")


def test_of_several_the_first_is_told_and_the_others_are_counted(write):
    file = write(SIMPLE, "x", SIMPLE | {"image": "gone.png"}, "y")
    with pytest.raises(InputError, match=r"line 2: not valid JSON \(.*\) \(and 2 more\);.*skip_bad"):
        read_questions(file)


@pytest.mark.parametrize(
    ("content", "found", "remedy"),
    [
        (b"", "no question", EXAMPLE),
        (b" \n\n", "no question", EXAMPLE),
        (b"[]", "no question", EXAMPLE),
        (b"no json\n", "no question", EXAMPLE),
        (b"[{},\n{]", "not valid JSON", "line 2, column 2"),
        (b"\xff\xfe", "no question", EXAMPLE),
    ],
)
def test_a_file_without_questions_is_one_line_even_if_bad_ones_may_be_skipped(
    content, found, remedy, refused, tmp_path
):
    file = tmp_path / "questions.jsonl"
    file.write_bytes(content)
    arguments = ("--model", "no such model", "--data", file, "--output", tmp_path / "out", "--skip-bad")
    line = refused(main, *arguments)
    for told in (str(file), found, remedy):
        assert told in line


@pytest.mark.parametrize("name", ["nowhere.jsonl", "."])
def test_a_file_that_is_not_there_is_one_line(name, refused, tmp_path):
    line = refused(main, "--model", "m", "--data", tmp_path / name, "--output", tmp_path / "out")
    assert str(tmp_path / name) in line


def test_a_byte_order_mark_is_no_content(folder):
    (folder / "questions.jsonl").write_text(json.dumps(SIMPLE), encoding="utf-8-sig")
    assert len(read(folder / "questions.jsonl")) == 1


def test_strict_paths_keep_images_in_the_folder(write, folder, tmp_path_factory):
    elsewhere = write_samples(tmp_path_factory.mktemp("elsewhere"), []).parent
    (folder / "link.png").symlink_to(elsewhere / "wide.png")
    names = [f"../{elsewhere.name}/wide.png", str(elsewhere / "wide.png"), str(folder / "wide.png"), "link.png"]
    file = write(SIMPLE, *(SIMPLE | {"image": name} for name in names))
    assert len(read(file)) == 5
    questions, bad = read_questions(file, skip_bad=True, strict_paths=True)
    assert [question.image for question in questions] == ["wide.png"]
    assert len(bad) == len(names)
    for n, (told, name) in enumerate(zip(bad, names, strict=True), 2):
        assert told.startswith(f"{file}, line {n}: the image {name} is outside of {folder}")


def test_strict_paths_on_the_command_line(write, folder, refused):
    file = write(SIMPLE | {"image": str(folder / "wide.png")})
    line = refused(main, "--model", "m", "--data", file, "--output", folder / "out", "--strict-paths")
    assert "is outside of" in line
    assert "--strict-paths forbids" in line


@pytest.mark.parametrize("key", ["id", "image", "question", "answer", "category", "conversations", "other"])
@pytest.mark.parametrize("depth", [100, *range(940, 1000, 3), 100_000])
def test_deep_nesting_spoils_its_own_line_alone(key, depth, write):
    deep = f'{{"image": "wide.png", "question": "?", "answer": "x", "id": "d", "{key}": {"[" * depth}{"]" * depth}}}'
    questions, bad = read_questions(write(SIMPLE, deep, SIMPLE | {"question": "Why?"}), skip_bad=True)
    assert [q.id for q in questions if len(q.id) == 1 and q.id != "d"] == ["1", "3"]
    assert all(": " in told and told.isprintable() and len(told) < 1100 for told in bad)


def test_whatever_an_image_does_spoils_its_own_line_alone(write, monkeypatch):
    size = questions_module.read_image_size
    monkeypatch.setattr(questions_module, "read_image_size", lambda file: fail() if "tall" in file.name else size(file))

    def fail():
        raise MemoryError

    file = write(SIMPLE, SIMPLE | {"image": "tall.png"}, SIMPLE | {"question": "Why?"})
    questions, [told] = read_questions(file, skip_bad=True)
    assert [q.id for q in questions] == ["1", "3"]
    assert told.startswith(f"{file}, line 2: this takes more memory than there is")
