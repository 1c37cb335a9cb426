"""kill -9 in the middle, then the same command again: no answer is lost and none is given twice."""

import json
import sys

import pytest
from lmms_runs import avg_mlx, killed, lmms_eval, lmms_eval_command, rows_of
from made_up import picture, write_task

pytestmark = pytest.mark.slow

COUNT = 60


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    questions = [{"question": f"is {n} written?", "answer": "yes", "image": picture(n)} for n in range(COUNT)]
    return write_task(tmp_path_factory.mktemp("tasks"), "many", questions)


def answers_of(rows: list[dict]) -> dict[int, dict]:
    return {row["doc_id"]: {mode: one["answer"] for mode, one in row["attempts"].items()} for row in rows}


def test_a_benchmark(tasks, tmp_path):
    options = ["--model", "demo", "--tasks", "many", "--include-path", tasks, "--modes", "adaptive", 1, "--output"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert avg_mlx("benchmark", *options, whole).returncode == 0
    before = killed([sys.executable, "-m", "avg_mlx", "benchmark", *map(str, options), str(broken)], broken / FILE, 7)
    assert 7 <= len(before) < COUNT
    assert not (broken / "summary.json").exists()
    assert avg_mlx("benchmark", *options, broken).returncode == 0
    after = rows_of(broken / FILE)
    assert after[: len(before)] == before
    assert [row["doc_id"] for row in after] == list(range(COUNT))
    assert answers_of(after) == answers_of(rows_of(whole / FILE))
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in (whole, broken))
    for mode in ("adaptive", "1"):
        assert scores_of(first, mode) == scores_of(second, mode)


FILE = "answers.jsonl"


def scores_of(summary: dict, mode: str) -> dict:
    return summary["benchmarks"]["many"]["modes"][mode]["scores"]


def test_lmms_evals_own_command(tasks, tmp_path):
    options = ("--include_path", tasks, "--tasks", "many")
    journal = tmp_path / "journal"
    how = {"model_args": f"pretrained=demo,journal={journal}"}
    before = killed(lmms_eval_command(tmp_path / "first", *options, **how), journal / FILE, 7)
    assert 7 <= len(before) < COUNT
    found = lmms_eval(tmp_path / "second", *options, **how)
    after = rows_of(journal / FILE)
    assert after[: len(before)] == before
    assert [row["doc_id"] for row in after] == list(range(COUNT))
    logged = [sample["filtered_resps"] for sample in found["samples"]["many"]]
    assert logged == [row["attempts"]["adaptive"]["answer"].strip() for row in after]
