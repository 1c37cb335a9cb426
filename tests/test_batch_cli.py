"""`avg-mlx generate --batch`: every question answered once, whatever comes between."""

import json

import pytest
from conftest import RECORDS, write_samples
from PIL import Image

from avg_mlx import generate, load
from avg_mlx.cli.generate import main
from avg_mlx.inference import batch

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
    look = batch.look
    monkeypatch.setattr(batch, "look", lambda *args, **kw: prompts.append(args[2]) or look(*args, **kw))
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
    stream = batch.stream_batch

    def press(*args, **kwargs):
        for n, answer in enumerate(stream(*args, **kwargs)):
            if n == 2:
                raise KeyboardInterrupt
            yield answer

    with monkeypatch.context() as patch:
        patch.setattr(batch, "stream_batch", press)
        assert run("--batch-size", 2) == (130, ["", "generate.py: interrupted"])
    first = rows(folder)
    assert len(first) == 2
    del asked[:]
    assert run("--batch-size", 2) == (0, [])
    assert len(asked) == 3
    assert rows(folder).keys() == {question["id"] for question in QUESTIONS}
    assert {id: rows(folder)[id] for id in first} == first


BAD = [
    ("{", "not JSON ("),
    ('"text"', "a str, expected an object with id, image and prompt"),
    ({"image": "wide.png", "prompt": "?"}, "id is None, expected a text or a whole number"),
    ({"id": True, "prompt": "?"}, "id is True, expected a text or a whole number"),
    ({"id": "wide", "prompt": "?"}, "id 'wide' is line 1's already; choose another"),
    ({"id": "a"}, "prompt is None, expected a text"),
    ({"id": "a", "prompt": 5}, "prompt is 5, expected a text"),
    ({"id": "a", "prompt": ""}, "the prompt is empty; ask something"),
    ({"id": "a", "prompt": "\ud800"}, "not JSON ("),
    ({"id": "a", "prompt": "?", "image": 5}, "image is 5, expected a path, URL or data URI, or a list of them"),
    ({"id": "a", "prompt": "?", "image": "absent.png"}, "absent.png; give a path"),
    ({"id": "a", "prompt": "?", "image": "data.json"}, "data.json is not an image"),
    ({"id": "a", "prompt": "?", "image": "data:,"}, "the data URI is empty"),
    ({"id": "a", "prompt": "?", "granularity": 5}, "granularity is 5, but this model has auto and 1, 2, 4, 8, 16"),
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
    assert summary == (
        f"generate.py: 1 lines of {folder / 'questions.jsonl'} have no answer, all others do; mend them and run this "
        "again"
    )
    assert rows(folder).keys() == {"wide", "tall"}
    write(folder, [QUESTIONS[0], "", {"id": "a", "prompt": "Mended?"}, QUESTIONS[3]])
    del asked[:]
    assert run() == (0, [])
    assert asked == ["Mended?"]


@pytest.fixture
def answered(run, folder):
    """The folder with all answers; whatever is refused then must leave them as they are."""
    run()
    before = (folder / "answers.jsonl").read_bytes()
    yield folder
    assert (folder / "answers.jsonl").read_bytes() == before


def refusal(folder, line=1) -> str:
    return (
        f"generate.py: {folder / 'answers.jsonl'}, line {line}: not this model's answer to a question of "
        f"{folder / 'questions.jsonl'} with these options; choose another --output"
    )


def test_another_models_answers_are_refused(run, answered, tiny_four_bits):
    assert run(model=tiny_four_bits) == (2, [refusal(answered)])


@pytest.mark.parametrize(
    "options", [["--temp", 1], ["--system-prompt", "Be brief."], ["-m", 5], ["--seed", 1]], ids=str
)
def test_answers_with_other_options_are_refused(run, answered, options):
    assert run(*options) == (2, [refusal(answered)])


def test_options_that_change_no_answer_may_change(run, answered):
    assert run("--batch-size", 3, "--prefill-step-size", 7, "--quiet") == (0, [])


@pytest.mark.parametrize("change", [{"prompt": "Who?"}, {"image": "tall.png"}, {"granularity": 8}, {"id": "new"}])
def test_an_answer_to_another_question_is_refused(run, answered, change):
    line = next(n for n, id in enumerate(rows(answered), 1) if id == "wide")
    write(answered, [QUESTIONS[0] | change, *QUESTIONS[1:]])
    assert run() == (2, [refusal(answered, line)])


@pytest.mark.parametrize("content", [b"{}\n", b"[1]\n", b"mine\n", b'{"id": [], "key": ""}\n', b"\xff\n", b"\n"])
def test_a_file_of_something_else_is_refused_and_left_alone(run, folder, content):
    (folder / "answers.jsonl").write_bytes(content + b"more")
    assert run() == (2, [refusal(folder)])
    assert (folder / "answers.jsonl").read_bytes() == content + b"more"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--batch", "q.jsonl"], "--batch answers into a file; name it with --output"),
        (["--batch", "q.jsonl", "--output", "a.jsonl", "--image", "x.png"], "--image is for one question"),
        (["--batch", "q.jsonl", "--output", "a.jsonl", "--kv-bits", "4"], "--batch has a plain KV cache"),
        (["--batch", "q.jsonl", "--output", "a.jsonl", "--max-kv-size", "9"], "--batch has a plain KV cache"),
        (["--batch", "absent.jsonl", "--output", "a.jsonl"], "cannot read absent.jsonl (No such file or directory)"),
        (["--batch", "empty.jsonl", "--output", "a.jsonl"], "empty.jsonl has no questions; expected JSON Lines"),
        (["--batch", "bad.jsonl", "--output", "a.jsonl"], "bad.jsonl, line 2: not JSON"),
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
    monkeypatch.setattr("avg_mlx.load", lambda *_, **__: pytest.fail("it was loaded"), raising=False)
    assert words in refused(main, *options)
    assert not (tmp_path / "a.jsonl").exists()


def test_an_output_that_cannot_be_written_is_told(refused, folder, monkeypatch):
    monkeypatch.setattr("avg_mlx.load", lambda *_, **__: pytest.fail("it was loaded"), raising=False)
    output = folder / "nowhere" / "answers.jsonl"
    line = refused(main, "--batch", folder / "questions.jsonl", "--output", output, status=1)
    assert (
        line
        == f"generate.py: cannot write {output} (No such file or directory); see to that and run it again: it goes on"
    )


def test_ids_and_texts_may_be_of_any_language(run, folder, tiny_folder):
    Image.new("RGB", (30, 30)).save(folder / "été.png")
    write(folder, [{"id": "问题", "image": "été.png", "prompt": "Où est-ce ?"}])
    assert run() == (0, [])
    assert (
        rows(folder)["问题"]["text"]
        == generate(*load(tiny_folder), "Où est-ce ?", folder / "été.png", max_tokens=4).text
    )
