"""`avg-mlx generate --batch`: every question answered once, whatever comes between."""

import base64
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from conftest import RECORDS, write_samples
from faults import rude_server
from PIL import Image

from avg_mlx import FileOptions, Request, Sampling, answer_file, generate, load
from avg_mlx.cli.generate import main
from avg_mlx.inference import batch, batch_file
from avg_mlx.inference.batch_file import read_requests
from avg_mlx.journal import Journal

QUESTIONS = [
    {"id": "wide", "image": "wide.png", "prompt": "What is this?"},
    {"id": 2, "image": ["small.png", "wide.png"], "question": "Are they the same?", "granularity": 2},
    {"id": "text", "prompt": "Tell me a story.", "max_tokens": 5, "answers": ["kept out"]},
    {"id": "tall", "image": "tall.png", "prompt": "A dog?", "granularity": "auto", "max_tokens": 2},
    {"id": "two", "image": "wide.png", "prompt": "Where is <image> taken?"},
]


@pytest.fixture
def folder(tmp_path):
    """Questions, and the noise images that they name beside them."""
    write_samples(tmp_path, RECORDS)
    return write(tmp_path, QUESTIONS)


def write(folder, questions):
    lines = [q if isinstance(q, str) else json.dumps(q) for q in questions]
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def run(tiny_folder, folder, capfd):
    """`run(*options)` answers the folder's questions: exit status, and stderr's lines."""

    def run(*options, model=tiny_folder) -> tuple[int, list[str]]:
        files = ("--batch", folder / "questions.jsonl", "--output", folder / "answers.jsonl")
        status = main([str(word) for word in ("--model", model, *files, "-m", 4, *options)])
        out, err = capfd.readouterr()
        assert out == ""
        return status, err.splitlines()

    return run


@pytest.fixture
def asked(monkeypatch):
    """The prompts that are put to the model, as they come."""
    prompts = []
    prepare = batch.prepare
    monkeypatch.setattr(batch, "prepare", lambda *args: prompts.append(args[2]) or prepare(*args))
    return prompts


def rows(folder) -> dict:
    """{id: answer}, after it is seen that each stands there once."""
    found = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in found}) == len(found)
    return {row["id"]: row for row in found}


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_each_question_has_the_answer_that_generate_gives(run, folder, tiny, batch_size):
    assert run("--batch-size", batch_size) == (0, [])
    answers = rows(folder)
    for question in QUESTIONS:
        images = question.get("image", [])
        images = [folder / name for name in (images if isinstance(images, list) else [images])]
        expected = generate(
            *tiny,
            question.get("prompt", question.get("question")),
            images,
            granularity=question.get("granularity", "auto"),
            max_tokens=question.get("max_tokens", 4),
        )
        row = answers.pop(question["id"])
        assert (row["text"], tuple(row["token_ids"])) == (expected.text, expected.token_ids)
        assert row["finish_reason"] == expected.finish_reason
        assert row["prompt_token_ids"] == list(expected.prompt_token_ids)
        assert row["granularity_source"] == (expected.views[0].source if images else None)
    assert answers == {}


def test_the_options_of_generate_hold_for_all_questions(run, folder, tiny):
    run("--system-prompt", "Be brief.", "--max-visual-tokens", 20, "--repetition-penalty", 1.5)
    system = tiny[1].encode("Be brief.")
    answers = rows(folder)
    assert all(row["prompt_token_ids"][: len(system) - 1] == system[:-1] for row in answers.values())
    assert answers["wide"]["visual_tokens"] <= 20
    assert answers[2]["granularity"] == [2, 2]  # forced by its line


def test_what_is_answered_is_not_asked_again(run, folder, asked):
    run()
    before = (folder / "answers.jsonl").read_bytes()
    del asked[:]
    assert run() == (0, [])
    assert asked == []
    assert (folder / "answers.jsonl").read_bytes() == before


@pytest.mark.parametrize("kept", [0, 1, 3])
@pytest.mark.parametrize("cut", [0, 1, 20], ids=lambda cut: f"{cut} bytes of the next")
def test_it_goes_on_where_it_was_cut_off(run, folder, asked, kept, cut):
    run()
    whole = rows(folder)
    lines = (folder / "answers.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "answers.jsonl").write_bytes(b"".join(lines[:kept]) + lines[kept][:cut])
    del asked[:]
    assert run() == (0, [])
    assert len(asked) == len(QUESTIONS) - kept
    assert (folder / "answers.jsonl").read_bytes().startswith(b"".join(lines[:kept]))
    assert {id: row["token_ids"] for id, row in rows(folder).items()} == {id: whole[id]["token_ids"] for id in whole}


def test_ctrl_c_loses_nothing_and_repeats_nothing(run, folder, asked, monkeypatch):
    stream = batch_file.stream_batch

    def press(*args, **kwargs):
        for n, answer in enumerate(stream(*args, **kwargs)):
            if n == 2:
                raise KeyboardInterrupt
            yield answer

    with monkeypatch.context() as patch:
        patch.setattr(batch_file, "stream_batch", press)
        status, (_, told) = run("--batch-size", 2)
        assert status == 130
        assert "2 of 5 answers are in" in told
        assert "the same command resumes" in told
    first = rows(folder)
    assert len(first) == 2
    del asked[:]
    assert run("--batch-size", 2) == (0, [])
    assert len(asked) == 3
    assert rows(folder).keys() == {question["id"] for question in QUESTIONS}
    assert {id: rows(folder)[id] for id in first} == first


BAD = [
    ("{", "not valid JSON ("),
    ('"text"', "a str, expected an object with id, image and prompt"),
    ({"image": "wide.png", "prompt": "?"}, "id is None, expected a text or a whole number"),
    ({"id": True, "prompt": "?"}, "id is True, expected a text or a whole number"),
    ({"id": "wide", "prompt": "?"}, "id 'wide' is the id of line 1 too; choose another"),
    ({"id": "a"}, "prompt is None, expected a text"),
    ({"id": "a", "prompt": 5}, "prompt is 5, expected a text"),
    ({"id": "a", "prompt": ""}, "the prompt is empty; ask something"),
    ({"id": "a", "prompt": "\ud800"}, "not UTF-8 text"),
    ({"id": "a", "prompt": "?", "image": 5}, "image is 5, expected a path, URL or data URI, or a list of them"),
    ({"id": "a", "prompt": "?", "image": "absent.png"}, "absent.png; give a path"),
    ({"id": "a", "prompt": "?", "image": "data.json"}, "data.json is not an image"),
    ({"id": "a", "prompt": "?", "image": "data:,"}, "the data URI is empty"),
    (
        {"id": "a", "prompt": "?", "granularity": 5},
        "granularity is 5; choose auto or one of this model's: 1, 2, 4, 8, 16",
    ),
    ({"id": "a", "prompt": "?", "max_tokens": "5"}, "max_tokens is '5', expected a whole number"),
    ({"id": "a", "prompt": "?", "max_tokens": 0}, "max_tokens is 0; expected 1 or more"),
    ({"id": "a", "prompt": "? " * 600}, "but the model has 512"),
]


@pytest.mark.parametrize(("bad", "words"), BAD, ids=range(len(BAD)))
def test_a_bad_line_is_told_with_its_number_and_the_rest_goes_on(run, folder, asked, bad, words):
    write(folder, [QUESTIONS[0], "", bad, QUESTIONS[3]])
    status, (told, summary) = run()
    assert status == 2
    assert told.startswith(f"{folder / 'questions.jsonl'}, line 3: ")
    assert words in told
    assert summary.startswith(f"generate.py: 1 lines of {folder / 'questions.jsonl'} have no answer")
    assert rows(folder).keys() == {"wide", "tall"}
    write(folder, [QUESTIONS[0], "", {"id": "a", "prompt": "Mended?"}, QUESTIONS[3]])
    del asked[:]
    assert run() == (0, [])
    assert asked == ["Mended?"]


RUDE = [
    b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\nabc",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nabc",
    b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
    b"HTTP/1.1 -1 \x1b[31m\r\n\r\n",
    b"",
]


@pytest.mark.parametrize("reply", RUDE, ids=range(len(RUDE)))
def test_a_rude_server_spoils_its_own_line_alone(run, folder, monkeypatch, reply):
    monkeypatch.setenv("no_proxy", "*")
    with rude_server(reply) as address:
        write(folder, [QUESTIONS[0], {"id": "a", "prompt": "?", "image": address}, QUESTIONS[3]])
        status, (told, _) = run()
    assert status == 2
    assert told.startswith(f"{folder / 'questions.jsonl'}, line 2: {address} ")
    assert told.isprintable()
    assert rows(folder).keys() == {"wide", "tall"}


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/full", "pipe", "sparse", "~nobody-of-this-name/a.png", "\0"])
def test_a_path_that_is_no_images_spoils_its_own_line_alone(run, folder, path):
    os.mkfifo(folder / "pipe")
    with (folder / "sparse").open("wb") as file:
        file.truncate(10 << 30)
    write(folder, [QUESTIONS[0], {"id": "a", "prompt": "?", "image": path}, QUESTIONS[3]])
    status, (told, _) = run()
    assert status == 2
    assert told.startswith(f"{folder / 'questions.jsonl'}, line 2: ")
    assert told.isprintable()
    assert rows(folder).keys() == {"wide", "tall"}


@pytest.mark.parametrize("key", ["id", "image", "prompt", "granularity", "max_tokens"])
def test_values_that_nobody_can_print_spoil_their_own_line_alone(run, folder, key):
    deep = "[" * 900 + '"\\u001b[31m"' + "]" * 900
    bad = json.dumps({"id": "a", "prompt": "?"})[:-1] + f', "{key}": {deep}}}'
    write(folder, [QUESTIONS[0], bad, {"id": "long", "prompt": "?", key: ["\x1b" * 100_000]}])
    status, told = run()
    assert status == 2
    assert len(told) == 3
    assert all(line.isprintable() and len(line) < 1100 for line in told)
    assert rows(folder).keys() == {"wide"}


# Where images may lie


@pytest.fixture
def outside(folder, tmp_path_factory):
    """The path of an image outside of the folder; `link.png` in the folder leads to it, `inner.png` to one inside."""
    outside = tmp_path_factory.mktemp("outside") / "secret.png"
    shutil.copy(folder / "wide.png", outside)
    (folder / "link.png").symlink_to(outside)
    (folder / "inner.png").symlink_to("wide.png")
    (folder / "linked").symlink_to(outside.parent)
    return outside


@pytest.mark.parametrize(
    "name", ["{outside}", "../{parent}/secret.png", "link.png", "linked/secret.png", "{folder}/wide.png"]
)
def test_strict_paths_keep_images_in_the_folder(run, folder, outside, name):
    name = name.format(outside=outside, parent=outside.parent.name, folder=folder)
    write(folder, [QUESTIONS[0], {"id": "a", "prompt": "?", "image": ["wide.png", name]}, QUESTIONS[3]])
    status, (told, _) = run("--strict-paths")
    assert status == 2
    assert told.startswith(f"{folder / 'questions.jsonl'}, line 2: the image {name} is outside of {folder}")
    assert rows(folder).keys() == {"wide", "tall"}
    assert run() == (0, [])
    assert rows(folder).keys() == {"wide", "tall", "a"}


def test_strict_paths_fetch_nothing(run, folder):
    write(folder, [QUESTIONS[0], {"id": "a", "prompt": "?", "image": "HTTPS://me:secret@127.0.0.1:9/x.png"}])
    status, (told, _) = run("--strict-paths")
    assert status == 2
    assert "line 2: HTTPS://…@127.0.0.1:9/x.png is an address, which " in told


def test_strict_paths_leave_alone_what_lies_in_the_folder(run, folder, outside):
    data = f"data:image/png;base64,{base64.b64encode((folder / 'wide.png').read_bytes()).decode()}"
    names = ["wide.png", "../" + folder.name + "/wide.png", "inner.png", data]
    write(folder, [{"id": n, "prompt": "?", "image": name} for n, name in enumerate(names)])
    assert run("--strict-paths") == (0, [])
    assert len({row["text"] for row in rows(folder).values()}) == 1


def test_strict_paths_lead_nobody_home():
    """Where the folder has no name that stands in front of the ~."""
    lines = b'{"id": 0, "prompt": "?"}\n{"id": 1, "prompt": "?", "image": "./~root/x.png"}'
    _, problems = read_requests("q", lines, Path(), Request(""), strict_paths=True)
    assert problems[0].startswith("q, line 2: the image ./~root/x.png is outside of .")


def test_strict_paths_are_for_batches(refused):
    assert "--strict-paths is for the images that the lines of --batch name" in refused(
        main, "-p", "?", "--strict-paths"
    )


@pytest.fixture
def answered(run, folder):
    """The folder with all answers; whatever is refused then must leave them as they are."""
    run()
    before = (folder / "answers.jsonl").read_bytes()
    yield folder
    assert (folder / "answers.jsonl").read_bytes() == before


def refuses(outcome, folder, line: int | str = 1) -> bool:
    """Whether a run was refused because a line of its output is not an answer of this run."""
    status, (told,) = outcome
    file = folder / "answers.jsonl"
    found = re.fullmatch(rf"generate\.py: {re.escape(str(file))}, line {line}: .*; choose another output", told)
    return status == 2 and found is not None


def test_another_models_answers_are_refused(run, answered, tiny_four_bits):
    assert refuses(run(model=tiny_four_bits), answered)


@pytest.mark.parametrize(
    "options", [["--temp", 1], ["--system-prompt", "Be brief."], ["-m", 5], ["--seed", 1]], ids=str
)
def test_answers_with_other_options_are_refused(run, answered, options):
    assert refuses(run(*options), answered, line=r"\d+")


def test_options_that_change_no_answer_may_change(run, answered):
    assert run("--batch-size", 3, "--prefill-step-size", 7, "--quiet") == (0, [])


@pytest.mark.parametrize("change", [{"prompt": "Who?"}, {"image": "tall.png"}, {"granularity": 8}, {"id": "new"}])
def test_an_answer_to_another_question_is_refused(run, answered, change):
    line = next(n for n, id in enumerate(rows(answered), 1) if id == "wide")
    write(answered, [QUESTIONS[0] | change, *QUESTIONS[1:]])
    assert refuses(run(), answered, line)


@pytest.mark.parametrize("content", [b"{}\n", b"[1]\n", b"mine\n", b'{"id": [], "key": ""}\n', b"\xff\n", b"\n"])
def test_a_file_of_something_else_is_refused_and_left_alone(run, folder, content):
    (folder / "answers.jsonl").write_bytes(content + b"more")
    assert refuses(run(), folder)
    assert (folder / "answers.jsonl").read_bytes() == content + b"more"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--batch", "q.jsonl"], "name it with --output, or print them with --output -"),
        (["--batch", "q.jsonl", "--output", "a.jsonl", "--image", "x.png"], "--image is for one question"),
        (["--batch", "q.jsonl", "--output", "a.jsonl", "--kv-bits", "4"], "--batch has a plain KV cache"),
        (["--batch", "q.jsonl", "--output", "a.jsonl", "--max-kv-size", "9"], "--batch has a plain KV cache"),
        (["--batch", "absent.jsonl", "--output", "a.jsonl"], "cannot read absent.jsonl (No such file or directory)"),
        (["--batch", "empty.jsonl", "--output", "a.jsonl"], "empty.jsonl has no questions; expected JSON Lines"),
        (["--batch", "bad.jsonl", "--output", "a.jsonl"], "bad.jsonl, line 2: not valid JSON"),
        (["--batch", "q.jsonl", "-p", "Why?"], "argument --prompt/-p: not allowed with argument --batch"),
        (["--batch", "q.jsonl", "--output", "a.jsonl", "--batch-size", "0"], "argument --batch-size: 0 is not a whole"),
    ],
    ids=range(9),
)
def test_what_cannot_be_is_refused_before_the_model_is_loaded(refused, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.jsonl").write_text('{"id": 1, "prompt": "Why?"}')
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "bad.jsonl").write_text("\n{\n")
    monkeypatch.setattr("avg_mlx.weights.checkpoint.load", lambda *_, **__: pytest.fail("it was loaded"))
    assert words in refused(main, *options)
    assert not (tmp_path / "a.jsonl").exists()


def test_an_output_that_cannot_be_written_is_told(refused, folder, monkeypatch):
    monkeypatch.setattr("avg_mlx.weights.checkpoint.load", lambda *_, **__: pytest.fail("it was loaded"))
    output = folder / "wide.png" / "answers.jsonl"  # in a file, not a folder
    line = refused(main, "--batch", folder / "questions.jsonl", "--output", output, status=1)
    assert line.startswith(f"generate.py: cannot write {output} (")
    assert line.endswith("; choose another output, or make room")


def test_ids_and_texts_may_be_of_any_language(run, folder, tiny_folder):
    Image.new("RGB", (30, 30)).save(folder / "été.png")
    write(folder, [{"id": "问题", "image": "été.png", "prompt": "Où est-ce ?"}])
    assert run() == (0, [])
    assert (
        rows(folder)["问题"]["text"]
        == generate(*load(tiny_folder), "Où est-ce ?", folder / "été.png", max_tokens=4).text
    )


def test_a_second_process_is_refused_while_the_first_one_writes(run, folder):
    with Journal(folder / "answers.jsonl"):
        status, (told,) = run()
    assert status == 2
    assert f"another process is writing {folder / 'answers.jsonl'}; wait" in told
    assert run() == (0, [])


def test_questions_may_come_from_standard_input_and_answers_go_to_standard_output(
    run, folder, tiny_folder, monkeypatch, capfd
):
    run()
    questions = (folder / "questions.jsonl").read_bytes()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(questions + b"{")))
    before = sorted(folder.iterdir())
    assert main(["--model", str(tiny_folder), "--batch", "-", "--output", "-", "-m", "4"]) == 2
    out, err = capfd.readouterr()
    printed = {row["id"]: row["token_ids"] for row in map(json.loads, out.splitlines())}
    assert printed == {id: row["token_ids"] for id, row in rows(folder).items()}
    assert [line.partition(": ")[0] for line in err.splitlines()] == ["-, line 6", "generate.py"]
    assert sorted(folder.iterdir()) == before


def test_the_questions_are_not_overwritten(refused, folder):
    before = (folder / "questions.jsonl").read_bytes()
    line = refused(main, "--batch", folder / "questions.jsonl", "--output", folder / "questions.jsonl")
    assert "the file of questions itself; choose another" in line
    assert (folder / "questions.jsonl").read_bytes() == before


def test_a_mistyped_file_of_questions_is_named_when_its_answers_are_there(refused, folder):
    (folder / "answers.jsonl").write_text("")
    line = refused(main, "--batch", folder / "question.jsonl", "--output", folder / "answers.jsonl")
    assert "question.jsonl" in line


def test_python_users_have_the_same(run, folder, tiny, tmp_path):
    run()
    write(folder, [*QUESTIONS, {"id": "bad", "prompt": ""}])
    told, seen = [], []
    output = tmp_path / "python" / "answers.jsonl"
    problems = answer_file(
        *tiny,
        folder / "questions.jsonl",
        output,
        defaults=Request("", max_tokens=4),
        options=FileOptions(sampling=Sampling()),
        tell=told.append,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert problems == told == [f"{folder / 'questions.jsonl'}, line 6: the prompt is empty; ask something"]
    assert (seen[0], seen[-1]) == ((0, 6), (6, 6))
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert {row["id"]: row["text"] for row in written} == {id: row["text"] for id, row in rows(folder).items()}
