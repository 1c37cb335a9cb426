"""`avg-mlx benchmark` on made-up data for the paper's eleven benchmarks, and on what goes wrong."""

import json
import shutil

import pytest
from lmms_runs import avg_mlx, lmms_eval, rows_of
from made_up import OWNER, picture, write_task

from avg_mlx import load
from avg_mlx.benchmark.paper import PAPER
from avg_mlx.inputs.prompt import build_messages, encode_messages

pytestmark = pytest.mark.slow

COARSEST, FINEST = (str(end(load("demo")[0].config.granularities)) for end in (min, max))
MODES = ["adaptive", COARSEST, FINEST]
TASKS = [benchmark.task for benchmark in PAPER]


@pytest.fixture(scope="module")
def run(data_root, tmp_path_factory):
    """All eleven, in three modes: the command as it ended, and its folder."""
    output = tmp_path_factory.mktemp("results") / "run"
    options = ["--tasks", "paper", "--data-root", data_root, "--modes", *MODES, "--output", output]
    done = avg_mlx("benchmark", "--model", "demo", *options)
    assert done.returncode == 0, done.stderr
    return done, output


@pytest.fixture(scope="module")
def summary(run):
    return json.loads((run[1] / "summary.json").read_text())


@pytest.mark.parametrize(("mode", "granularity"), [("adaptive", "auto"), (FINEST, FINEST)])
def test_scores_are_lmms_evals_own(mode, granularity, summary, data_root, tmp_path):
    """In the folder of the data, load_dataset finds it by the names that the tasks have: nothing of ours has a part."""
    how = {"model_args": f"pretrained=demo,granularity={granularity}", "cwd": data_root}
    own = lmms_eval(tmp_path, "--tasks", ",".join(TASKS), **how)["results"]
    assert summary["benchmarks"].keys() == set(TASKS)
    for benchmark in PAPER:
        scales = {metric.name: metric.scale for metric in benchmark.metrics}
        found = summary["benchmarks"][benchmark.task]["modes"][mode]["scores"]
        assert scales.keys() <= found.keys()
        for name, score in found.items():
            (theirs,) = (value for key, value in own[benchmark.task].items() if key.partition(",")[0] == name)
            assert score["score"] == pytest.approx(scales.get(name, 1) * theirs), (benchmark.task, name)


def test_each_question_is_answered_once_in_all_modes(run):
    rows = rows_of(run[1] / "answers.jsonl")
    assert [row["task"] for row in rows] == sorted((row["task"] for row in rows), key=TASKS.index)
    assert len({row["key"] for row in rows}) == len(rows) == 4 * 9 + 3 + 3
    for row in rows:
        assert list(row["attempts"]) == MODES
        assert row["attempts"][COARSEST]["visual_tokens"] < row["attempts"][FINEST]["visual_tokens"]


def test_the_tables_name_every_benchmark_and_the_papers_figures(run):
    done, output = run
    table = (output / "table.md").read_text()
    assert done.stdout == table
    for benchmark in PAPER:
        assert benchmark.title in table
        assert f"{benchmark.metrics[0].avg_llava:.1f}" in table
    assert {"summary.json", "table.md", "scores.png", "choices.png"} <= {file.name for file in output.iterdir()}


def test_it_says_where_the_data_comes_from_before_it_starts(run, data_root):
    done, _ = run
    for line, name in zip(done.stderr.splitlines(), TASKS, strict=False):
        assert line.startswith(f"{name}: {OWNER}/")
        assert str(data_root) in line


def test_more_questions_and_tasks_go_into_the_same_folder(data_root, tmp_path):
    options = ["--model", "demo", "--data-root", data_root, "--output", tmp_path / "run", "--modes", COARSEST]
    assert avg_mlx("benchmark", *options, "--tasks", "pope", "--limit", 2).returncode == 0
    first = rows_of(tmp_path / "run" / "answers.jsonl")
    assert avg_mlx("benchmark", *options, "--tasks", "pope", "mme", "--limit", 3).returncode == 0
    rows = rows_of(tmp_path / "run" / "answers.jsonl")
    assert rows[:2] == first
    assert [row["task"] for row in rows[2:]] == ["pope", *["mme"] * 4]  # which are scored in pairs


def test_an_unknown_task_names_the_nearest(tmp_path):
    done = avg_mlx("benchmark", "--model", "demo", "--tasks", "chartqaa", "--output", tmp_path / "run")
    assert done.returncode == 2
    assert "chartqaa" in done.stderr
    assert "did you mean chartqa?" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_data_set_that_cannot_be_had_leaves_the_others_running(data_root, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(data_root / OWNER / "POPE", root / "POPE")  # without an owner, and without a card
    (root / "POPE" / "README.md").unlink()
    output = tmp_path / "run"
    done = avg_mlx("benchmark", "--model", "demo", "--tasks", "gqa", "pope", "--data-root", root, "--output", output)
    assert done.returncode == 0, done.stderr
    summary = json.loads((output / "summary.json").read_text())
    assert list(summary["benchmarks"]) == ["pope"]
    [failed] = summary["failed"]
    assert failed in done.stderr
    assert f"hf download --repo-type dataset {OWNER}/GQA --local-dir {root}/{OWNER}/GQA" in failed
    assert failed in done.stdout


@pytest.fixture
def broken(tmp_path):
    """A task whose first and third images are damaged, and whose last question fits the context only at COARSEST."""
    model, tokenizer = load("demo")
    short, longer = (len(encode_messages(tokenizer, build_messages("a circle? " * n, 1))) for n in (1, 11))
    close = "a circle? " * (1 + 10 * (model.config.context_length - short - 20) // (longer - short))
    content = [("yes?", b"nothing"), ("a circle?", picture(1)), ("no?", b"nothing"), (close, picture(2))]
    questions = [{"question": question, "answer": "yes", "image": image} for question, image in content]
    return write_task(tmp_path / "tasks", "broken", questions)


def test_damaged_images_are_counted_or_end_the_run(broken, tmp_path):
    output = tmp_path / "run"
    options = ["--model", "demo", "--tasks", "broken", "--include-path", broken, "--output", output]
    options += ["--modes", COARSEST, FINEST]
    done = avg_mlx("benchmark", *options)
    assert done.returncode == 2
    assert "0 of broken" in done.stderr.splitlines()[-1]
    assert "--skip-bad" in done.stderr
    done = avg_mlx("benchmark", *options, "--skip-bad")
    assert done.returncode == 0, done.stderr
    modes = json.loads((output / "summary.json").read_text())["benchmarks"]["broken"]["modes"]
    assert {mode: one["unanswered"] for mode, one in modes.items()} == {COARSEST: 2, FINEST: 3}
    assert [row["doc_id"] for row in rows_of(output / "answers.jsonl")] == [1, 3]
