"""Every verb that writes, as a real process: a closing terminal, kill -9 and a full disk leave nothing half done."""

import importlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import RECORDS, make_adapters, write_samples

# Runs `avg-mlx VERB …`. When a function has been called for the first time, it says so and waits for a line of input;
# or the disk, from then on, takes no file of more than so many bytes.
STOPPED = """
import pkgutil, resource, signal, sys

import avg_mlx
from avg_mlx.__main__ import main

owner, name, room = sys.argv.pop(1), sys.argv.pop(1), sys.argv.pop(1)
owner, calls = pkgutil.resolve_name(owner), []
work = getattr(owner, name)


def stopped(*arguments, **options):
    result = work(*arguments, **options)
    calls.append(name)
    if len(calls) == 1 and room:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(room), resource.RLIM_INFINITY))
    elif len(calls) == 1:
        print("waiting", flush=True)
        sys.stdin.readline()
    return result


setattr(owner, name, stopped)
sys.exit(main())
"""
JOURNAL = ("avg_mlx.journal:Journal", "append")
TENSORS = ("mlx.core", "save_safetensors")
WHEN = {
    "convert": TENSORS,
    "fuse": TENSORS,
    "export": TENSORS,
    "instruct": ("avg_mlx.training.loop", "step_gradients"),
    "router": ("avg_mlx.training.loop", "step_gradients"),
    "feedback": JOURNAL,
    "evaluate": JOURNAL,
    "batch": JOURNAL,
    "bench": ("avg_mlx.bench.measure", "measure"),
}
# Bytes that are too few for a file which comes after that moment.
ROOM = dict.fromkeys(WHEN, 99) | {"instruct": 2000, "router": 2000, "feedback": 700, "evaluate": 2000, "batch": 1500}


def verbs(*fast: str, among=WHEN) -> list:
    """Verbs to test, of which only a few are not slow."""
    return [verb if verb in fast else pytest.param(verb, marks=pytest.mark.slow) for verb in among]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Training data, and a file of the same questions for batches beside it."""
    records = [record for record in RECORDS if isinstance(record.get("image"), str)]
    file = write_samples(tmp_path_factory.mktemp("data"), records)
    questions = [{"id": r["id"], "image": r["image"], "prompt": "What is this?"} for r in records]
    (file.parent / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    return file


@pytest.fixture(scope="module")
def command(tiny_folder, tiny_checkpoint, data, tmp_path_factory):
    """`command(verb, output)`: the words of a command that writes there."""
    adapters = make_adapters(tiny_folder, tmp_path_factory.mktemp("adapters") / "adapters", "lora")
    on_data = ["--model", tiny_folder, "--data", data]
    questions = ["--batch", data.parent / "questions.jsonl", "--batch-size", 1, "-m", 4]
    words = {
        "convert": ["convert", "--hf-path", tiny_checkpoint, "--mlx-path"],
        "fuse": ["fuse", "--model", tiny_folder, "--adapter-path", adapters, "--save-path"],
        "export": ["export", "--model", tiny_folder, "--save-path"],
        "instruct": ["train", "instruct", *on_data, "--iters", 2, "--batch-size", 2, "--resume", "--adapter-path"],
        "router": ["train", "router", *on_data, "--iters", 2, "--batch-size", 2, "--resume", "--adapter-path"],
        "feedback": ["feedback", *on_data, "--output"],
        "evaluate": ["evaluate", *on_data, "--modes", 1, "-m", 2, "--output"],
        "batch": ["generate", "--model", tiny_folder, *questions, "--output"],
        "bench": ["bench", "--model", tiny_folder, "--granularities", 1, "--decode-tokens", 2, "--output"],
    }
    return lambda verb, output: [*map(str, words[verb]), str(output)]


def start(verb: str, words: list[str], room: str = "", ignored: bool = False) -> subprocess.Popen:
    """Start a verb that stops at its moment; SIGHUP is ignored as under nohup, or not."""
    return subprocess.Popen(
        [sys.executable, "-c", STOPPED, *WHEN[verb], room, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL),
    )


def wait(process: subprocess.Popen) -> None:
    """Until it has come to its moment."""
    line = process.stdout.readline()
    assert line == "waiting\n", line + process.communicate()[1]


def finish(words: list[str]) -> None:
    """Run a command to its end, in this process."""
    assert importlib.import_module(f"avg_mlx.cli.{words[0]}").main(words[1:]) == 0


def hidden(folder: Path) -> list[Path]:
    return list(folder.rglob(".*"))


def whole_lines(folder: Path) -> bool:
    return all(file.read_bytes()[-1:] in (b"", b"\n") for file in folder.rglob("*.jsonl") if file.is_file())


@pytest.mark.parametrize("verb", verbs("fuse", "evaluate", "batch"))
def test_a_closing_terminal_ends_every_verb_as_ctrl_c_does(verb, command, tmp_path):
    output = tmp_path / "output.jsonl"
    process = start(verb, command(verb, output))
    wait(process)
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate("\n", timeout=120)
    assert (process.returncode, out) == (129, ""), err
    [told] = [line for line in err.splitlines() if "interrupted" in line]
    assert "Traceback" not in err
    assert hidden(tmp_path) == []
    assert whole_lines(tmp_path)
    if WHEN[verb] is TENSORS:
        assert not output.exists()
    else:
        assert verb == "bench" or "resume" in told
    finish(command(verb, output))
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("verb", verbs("convert", among=["convert", "instruct", "batch"]))
def test_under_nohup_a_closing_terminal_ends_nothing(verb, command, tmp_path):
    process = start(verb, command(verb, tmp_path / "output.jsonl"), ignored=True)
    wait(process)
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate("\n", timeout=120)
    assert process.returncode == 0, err


@pytest.mark.parametrize("verb", verbs("convert", among=["convert", "fuse", "export"]))
def test_the_next_run_removes_what_a_killed_one_left_and_nothing_else(verb, command, tmp_path):
    words = command(verb, tmp_path / "model")
    killed, living = start(verb, words), start(verb, words)
    try:
        for process in (killed, living):
            wait(process)
        killed.kill()
        killed.wait()
        others = [
            tmp_path / ".model2.01234567.partial",
            tmp_path / ".model.mine.partial",
            tmp_path / ".01234567.partial",
        ]
        for other in others:
            other.mkdir()
        assert len(hidden(tmp_path)) == 2 + len(others)
        finish(words)
        assert len(hidden(tmp_path)) == 1 + len(others)  # the living one's
        assert all(other.exists() for other in others)
    finally:
        living.terminate()
        living.communicate()
        killed.communicate()
    assert sorted(hidden(tmp_path)) == sorted(others)
    assert (tmp_path / "model" / "config.json").is_file()


@pytest.mark.parametrize("verb", verbs("instruct", "batch"))
def test_a_disk_that_fills_is_one_line_and_leaves_nothing_half_done(verb, command, tmp_path):
    output = tmp_path / "output.jsonl"
    process = start(verb, command(verb, output), str(ROOM[verb]))
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (1, "") or verb == "bench", err
    told = [line for line in err.splitlines() if "cannot" in line or "File too large" in line]
    assert len(told) == 1, err
    assert "Traceback" not in err
    assert hidden(tmp_path) == []
    assert whole_lines(tmp_path)
    if WHEN[verb] is TENSORS:
        assert not output.exists()
    finish(command(verb, output))
    assert hidden(tmp_path) == []
