"""kill -9 at random moments, then the same command again: the same files as if nothing had happened."""

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import RECORDS, write_samples

from avg_mlx import load
from avg_mlx.cli.train import main as train
from avg_mlx.evaluation.results import read_results

pytestmark = pytest.mark.slow

ROUNDS = 5


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Ten samples with one image each."""
    records = [record for record in RECORDS if isinstance(record.get("image"), str)]
    records = [record | {"id": f"{record['id']} {n}"} for n in range(3) for record in records][:10]
    return write_samples(tmp_path_factory.mktemp("data"), records)


@pytest.fixture(scope="module")
def adapters(tiny_folder, data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "adapters"
    options = ["--model", tiny_folder, "--data", data, "--adapter-path", folder, "--iters", 1, "--batch-size", 1]
    assert train(["instruct", *map(str, options)]) == 0
    return folder


def run(command: list) -> None:
    """To its end."""
    done = subprocess.run(python(command), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def python(command: list) -> list[str]:
    return [sys.executable, "-m", "avg_mlx", *map(str, command)]


def kill(command: list, moment: Callable[[], bool], delay: float) -> bool:
    """Kill a command `delay` seconds after `moment` has come; whether it was alive then."""
    process = subprocess.Popen(python(command), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None and not moment():
        time.sleep(0.0005)
    time.sleep(delay)
    process.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode in (0, -9), err
    return process.returncode == -9


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def lines_of(file: Path) -> list[dict]:
    """Whole lines."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def log_of(folder: Path) -> list[tuple]:
    return [(line["step"], line["loss"], line["learning_rate"]) for line in lines_of(folder / "log.jsonl")]


@pytest.mark.parametrize("stage", ["instruct", "router"])
def test_training(stage, tiny_folder, data, tmp_path):
    options = ["--model", tiny_folder, "--data", data, "--iters", 12, "--save-every", 2, "--resume"]
    extra = {
        "instruct": ["--batch-size", 2, "--granularities-per-step", 1, "--lora-dropout", 0.2, "--train-projector"],
        "router": ["--batch-size", 4, "--fresh-router", "--feature-cache", tmp_path / "cache"],
    }
    command = ["train", stage, *options, *extra[stage], "--adapter-path"]
    whole, folder = tmp_path / "whole" / "run", tmp_path / "killed" / "run"  # loss.png tells the name
    run([*command, whole])
    rng, steps, killed = random.Random(stage), [], 0
    for step in sorted(rng.sample(range(1, 12), ROUNDS)):
        # A moment after a step is logged: within the next one, or within what is saved after every other.
        killed += kill([*command, folder], lambda step=step: len(log_of(folder)) >= step, rng.uniform(0, 0.05))
        steps.append(len(log_of(folder)))
        checkpoints = list(folder.glob("checkpoint-*"))
        for file in ["adapters.safetensors", *(f"{c.name}/{part}.safetensors" for c in checkpoints for part in PARTS)]:
            if checkpoints:
                assert mx.load(str(folder / file))
    assert killed >= 2, steps
    run([*command, folder])
    assert log_of(folder) == log_of(whole)
    ended, expected = files_of(folder), files_of(whole)
    assert ended.keys() == expected.keys()
    for name in expected.keys() - {"log.jsonl"}:  # it tells speeds
        assert ended[name] == expected[name], name


PARTS = ("model", "optimizer")


def test_both_stages_of_training(tiny_stage3, data, tmp_path):
    command = ["train", "rglf", "--model", tiny_stage3, "--data", data, "--iters", 6, "--router-iters", 6]
    command += ["--batch-size", 2, "--lora-dropout", 0.2, "--grad-checkpoint", "--save-every", 2]
    command += ["--resume", "--adapter-path"]
    whole, folder = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    files = ("instruct/log.jsonl", "feedback.jsonl", "log.jsonl")
    run([*command, whole])
    assert [len(lines_of(whole / file)) for file in files] == [6, 10, 6]
    rng, killed = random.Random("rglf"), 0
    for file, count in ((files[0], 3), (files[0], 6), (files[1], 4), (files[2], 1), (files[2], 4)):
        moment = lambda file=file, count=count: len(lines_of(folder / file)) >= count  # noqa: E731
        killed += kill([*command, folder], moment, rng.uniform(0, 0.05))
    assert killed >= 4
    run([*command, folder])
    assert log_of(folder) == log_of(whole)
    assert log_of(folder / "instruct") == log_of(whole / "instruct")
    ended, expected = files_of(folder), files_of(whole)
    assert ended.keys() == expected.keys()
    for name in expected:
        assert ended[name] == expected[name] or name.endswith("log.jsonl"), name


def test_feedback(tiny_folder, data, tmp_path):
    command = ["feedback", "--model", tiny_folder, "--data", data, "--output"]
    run([*command, tmp_path / "whole.jsonl"])
    file = tmp_path / "killed.jsonl"
    rng, killed = random.Random(0), 0
    for count in sorted(rng.sample(range(1, 10), ROUNDS)):
        killed += kill([*command, file], lambda count=count: len(lines_of(file)) >= count, rng.uniform(0, 0.02))
        assert len(lines_of(file)) >= count
    assert killed >= 2
    run([*command, file])
    assert file.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_evaluation(tiny_folder, data, tmp_path):
    command = ["evaluate", "--model", tiny_folder, "--data", data, "-m", 4, "--output"]
    run([*command, tmp_path / "whole"])
    folder = tmp_path / "killed"

    def count() -> int:
        file = folder / "answers.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    rng, killed = random.Random(0), 0
    for enough in sorted(rng.sample(range(1, 15), ROUNDS)):
        killed += kill([*command, folder], lambda enough=enough: count() >= enough, rng.uniform(0, 0.1))
        assert count() >= enough
    assert killed >= 2
    run([*command, folder])
    whole, ended = (read_results(tmp_path / name / "answers.jsonl") for name in ("whole", "killed"))
    assert [result.key for result in ended] == [result.key for result in whole]
    assert [[a.answer for a in result.attempts] for result in ended] == [
        [a.answer for a in result.attempts] for result in whole
    ]
    assert len(ended) == 15
    assert files_of(folder).keys() == files_of(tmp_path / "whole").keys()


@pytest.mark.parametrize("verb", ["fuse", "export"])
def test_a_folder_appears_whole_or_not_at_all(verb, tiny_folder, adapters, tmp_path):
    command = [verb, "--model", tiny_folder, *(["--adapter-path", adapters] if verb == "fuse" else []), "--save-path"]
    run([*command, tmp_path / "whole"])
    expected = files_of(tmp_path / "whole")
    folder = tmp_path / "killed"
    rng, killed = random.Random(verb), 0
    for begun in range(ROUNDS):
        # When as many of its files are begun, or a little later.
        delay = rng.uniform(0, 0.003)
        killed += kill([*command, folder], lambda n=begun: len(list(newest(tmp_path))) >= n, delay)
        if folder.exists():
            assert files_of(folder) == expected
            folder.rename(tmp_path / f"finished {begun}")
        for partial in tmp_path.glob(".killed.*.partial"):  # hidden, and no rerun takes it for its own
            partial.rename(tmp_path / f"left {begun}")
    assert killed >= 2
    assert any(files_of(left) != expected for left in tmp_path.glob("left *"))  # killed in the middle
    run([*command, folder])
    assert files_of(folder) == expected
    if verb == "fuse":
        load(folder)


def newest(home: Path):
    """Files of the folder that is being written, itself among them."""
    for partial in home.glob(".killed.*.partial"):
        yield partial
        yield from partial.iterdir()
