"""Ctrl-C, SIGTERM and SIGHUP in training: the last step is kept, and a resumed run ends as if nothing had happened."""

import functools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from conftest import RECORDS, write_samples
from faults import Killed
from test_training_loop import Fit, Line, fit, interrupting, log_of, same_results

from avg_mlx import InputError
from avg_mlx.cli.train import main as train_main
from avg_mlx.errors import Interrupted
from avg_mlx.journal import Journal
from avg_mlx.training.interrupts import deferred_interrupts
from avg_mlx.training.options import RglfOptions
from avg_mlx.training.run import Run
from avg_mlx.training.stages import train_rglf
from avg_mlx.weights.adapters import AdapterConfig

STEPS = 8  # of `fit`, which saves every third


def checkpoints(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*-0*"))


class Stopping(Fit):
    """A task that is interrupted while MLX differentiates `step`, or in the validation after it."""

    def __init__(self, model, step: int, validating: bool = False):
        super().__init__(model, validates=validating)
        self.step, self.validating, self.now = step, validating, 0

    def micro_losses(self, samples, batch, step):
        self.now = step
        for loss in super().micro_losses(samples, batch, step):
            yield loss if self.validating or step != self.step else functools.partial(self.stop, loss)

    def stop(self, loss):
        loss()
        raise KeyboardInterrupt

    def validate(self):
        if self.validating and self.now == self.step:
            raise KeyboardInterrupt
        return super().validate()


# Where it strikes


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_within_a_step_the_model_stays_at_the_one_before(step, tmp_path):
    fit(tmp_path / "whole")
    model = Line()
    with pytest.raises(Interrupted) as stop:
        fit(tmp_path / "run", task=Stopping(model, step))
    assert isinstance(stop.value.__cause__, KeyboardInterrupt)
    assert "--resume" in str(stop.value)
    assert (f"at step {step - 1} of 8" if step > 1 else "before step 1 of 8") in str(stop.value)
    expected = {1: [], 4: ["checkpoint-0000003"], 7: ["checkpoint-0000003", "checkpoint-0000006"]}
    assert step not in expected or checkpoints(tmp_path / "run") == expected[step]
    if step > 1:
        kept = mx.load(str(tmp_path / "run" / "adapters.safetensors"))
        assert mx.array_equal(kept["weight"], model.weight)  # not a tracer
    fit(tmp_path / "run")
    same_results(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("step", [3, 6, 8])
def test_within_validation_the_step_counts_and_validation_comes_again(step, tmp_path):
    fit(tmp_path / "whole", task=Fit(Line(), validates=True), steps_per_eval=3)
    with pytest.raises(Interrupted, match=f"at step {step} of 8"):
        fit(tmp_path / "run", task=Stopping(Line(), step, validating=True), steps_per_eval=3)
    assert checkpoints(tmp_path / "run")[-1] == f"interrupted-000000{step}"
    assert [line["step"] for line in log_of(tmp_path / "run")] == list(range(1, step))
    fit(tmp_path / "run", task=Fit(Line(), validates=True), steps_per_eval=3)
    same_results(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_update_is_never_torn(number, tmp_path, monkeypatch, sigterm_interrupts):
    """The signal arrives between two of its parts."""
    fit(tmp_path / "whole")
    update, calls = optim.AdamW.update, []

    def signalled(self, model, gradients):
        calls.append(number)
        if len(calls) == 5:
            signal.raise_signal(number)
        update(self, model, gradients)
        if len(calls) == 5:
            signal.raise_signal(number)

    with monkeypatch.context() as context:
        context.setattr(optim.AdamW, "update", signalled)
        with pytest.raises(Interrupted, match="at step 5 of 8"):
            fit(tmp_path / "run")
    assert [line["step"] for line in log_of(tmp_path / "run")] == [1, 2, 3, 4]  # it was not logged yet
    fit(tmp_path / "run")
    same_results(tmp_path / "whole", tmp_path / "run")


@pytest.fixture
def sigterm_interrupts():
    """As on the command line."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("file", range(3))
@pytest.mark.parametrize("stopped", [False, True], ids=["a checkpoint", "the checkpoint of an interrupt"])
def test_a_checkpoint_is_never_torn(stopped, file, tmp_path, monkeypatch):
    """Neither by the first Ctrl-C, nor by the second one of whoever is impatient."""
    fit(tmp_path / "whole")
    save, calls = mx.save_safetensors, []

    def signalled(name, arrays, metadata=None):
        calls.append(name)
        if len(calls) == 4 + file:  # of the second checkpoint's three files
            signal.raise_signal(signal.SIGINT)
        save(name, arrays, metadata)

    step = 5 if stopped else 6
    with monkeypatch.context() as context:
        context.setattr(mx, "save_safetensors", signalled)
        with pytest.raises(Interrupted, match=f"at step {step} of 8"):
            fit(tmp_path / "run", interrupting(5) if stopped else lambda record: None)
    assert checkpoints(tmp_path / "run") == [
        "checkpoint-0000003",
        f"{'interrupted' if stopped else 'checkpoint'}-000000{step}",
    ]
    fit(tmp_path / "run")
    same_results(tmp_path / "whole", tmp_path / "run")


def test_only_the_last_interrupts_checkpoint_is_kept(tmp_path):
    report = interrupting(4, 5, 7)
    for kept in (["checkpoint-0000003", "interrupted-0000004"], ["checkpoint-0000003", "interrupted-0000005"]):
        with pytest.raises(Interrupted):
            fit(tmp_path / "run", report)
        assert checkpoints(tmp_path / "run") == kept
    with pytest.raises(Interrupted):
        fit(tmp_path / "run", report)
    assert checkpoints(tmp_path / "run") == ["checkpoint-0000003", "checkpoint-0000006", "interrupted-0000007"]


def test_another_interval_between_checkpoints_may_follow(tmp_path):
    with pytest.raises(Interrupted):
        fit(tmp_path / "run", interrupting(4))
    with pytest.raises(Interrupted):
        fit(tmp_path / "run", task=Stopping(Line(), 5), save_every=2)
    assert checkpoints(tmp_path / "run") == ["checkpoint-0000003", "interrupted-0000004"]
    fit(tmp_path / "run", save_every=2)
    fit(tmp_path / "whole", save_every=2)
    same_results(tmp_path / "whole", tmp_path / "run")


# What is told


def test_where_it_is_resumed_is_told(tmp_path, caplog):
    caplog.set_level(logging.INFO, "avg_mlx")
    with pytest.raises(Interrupted):
        fit(tmp_path / "run", interrupting(5))
    assert caplog.messages == []
    fit(tmp_path / "run")
    assert caplog.messages == ["resumed at step 5 of 8"]


@pytest.mark.parametrize("step", [2, 5])
def test_steps_that_are_taken_again_are_told(step, tmp_path, caplog):
    """A killed process has logged more than it saved."""
    caplog.set_level(logging.INFO, "avg_mlx")
    with pytest.raises(Killed):
        fit(tmp_path / "run", interrupting(step, by=Killed))
    fit(tmp_path / "run")
    [told] = caplog.messages
    assert f"resumed at step {step - step % 3} of 8" in told
    assert "2 later ones" in told


def test_a_run_that_is_not_open_is_not_trained(tmp_path):
    from avg_mlx import AvgMlxError
    from avg_mlx.training.loop import train
    from avg_mlx.training.optimizer import LoopSettings
    from avg_mlx.training.plan import Plan

    task = Fit(Line())
    with pytest.raises(AvgMlxError, match="not open"):
        train(task.model, task, Plan([1] * 4, 2, 0), LoopSettings(steps=1), Run(tmp_path, {}, AdapterConfig()))


def test_a_run_is_one_processs(tmp_path):
    run = Run(tmp_path / "run", {}, AdapterConfig())
    with run.open(resume=False), pytest.raises(InputError, match="another process is writing"):
        fit(tmp_path / "run")
    fit(tmp_path / "run")


# Both stages


@pytest.fixture(scope="module")
def both(tiny_stage3, data, tmp_path_factory) -> RglfOptions:
    """Options of both stages, and in their folder what a run leaves that is not interrupted."""
    options = RglfOptions(
        model=tiny_stage3,
        data=data,
        adapter_path=tmp_path_factory.mktemp("both"),
        val_fraction=0.25,
        batch_size=2,
        iters=4,
        lora_dropout=0.2,
        router_iters=5,
        save_every=2,
    )
    train_rglf(options)
    return options


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("stage", ["instruct_report", "feedback_progress", "router_report"])
def test_train_rglf_resumes_in_the_stage_that_was_interrupted(stage, count, both, tmp_path):
    calls = []

    def press(*told):
        calls.append(told)
        if len(calls) == count:
            raise KeyboardInterrupt

    options = replace(both, adapter_path=tmp_path / "run")
    with pytest.raises(Interrupted, match="--resume goes on from there"):
        train_rglf(options, **{stage: press})
    again = []
    instructed, routed = train_rglf(
        replace(options, resume=True), feedback_progress=lambda done, of: again.append((done, of))
    )
    assert instructed.steps == (4 - count if stage == "instruct_report" else 0)
    assert routed.steps == (5 - count if stage == "router_report" else 5)
    assert again[0] == ({"instruct_report": 0, "feedback_progress": count - 1, "router_report": 4}[stage], 4)
    same_results(both.adapter_path / "instruct", options.adapter_path / "instruct")
    same_results(both.adapter_path, options.adapter_path)


# Deferred signals


def interrupted_block(done: list[str]) -> None:
    with deferred_interrupts():
        signal.raise_signal(signal.SIGINT)
        done.append("block")
    done.append("after")


def test_signals_wait_for_the_end_of_a_block():
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        interrupted_block(done)
    assert done == ["block"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_of_the_block_goes_first():
    with pytest.raises(AttributeError):
        interrupted_block(None)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under nohup
    try:
        with deferred_interrupts():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_have_nothing_to_defer():
    ended = []

    def work() -> None:
        with deferred_interrupts():
            ended.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended == [signal.default_int_handler]


# Real signals to real processes


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    records = [record for record in RECORDS if isinstance(record.get("image"), str)]
    return write_samples(tmp_path_factory.mktemp("data"), records)


@pytest.fixture(scope="module")
def commands(tiny_folder, data) -> dict[str, list]:
    options = ["--model", tiny_folder, "--data", data, "--val-fraction", 0.25, "--steps-per-eval", 3, "--iters", 12]
    return {
        "instruct": ["train", "instruct", *options, "--batch-size", 2, "--lora-dropout", 0.2],
        "router": ["train", "router", *options, "--batch-size", 3, "--fresh-router"],
    }


@pytest.fixture(scope="module")
def whole(commands, tmp_path_factory):
    """`whole(stage)`: the folder of a run that was not interrupted."""

    @functools.cache
    def run(stage: str) -> Path:
        folder = tmp_path_factory.mktemp("whole") / "run"  # loss.png tells the name
        done = start([*commands[stage], "--adapter-path", folder])
        assert done.wait() == 0, done.stderr.read()
        return folder

    return run


def start(command: list) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "avg_mlx", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=default_signals,
    )


def default_signals() -> None:
    """A shell's & has SIGINT ignored, and nohup SIGHUP."""
    for number in STATUS:
        signal.signal(number, signal.SIG_DFL)


def lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else -1


def stop_at(command: list, file: Path, count: int, number: int) -> tuple[int, str]:
    """Signal a command once a file has so many lines: (its exit status, its stderr)."""
    process = start(command)
    deadline = time.monotonic() + 120
    while lines(file) < count and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.0005)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    return process.returncode, err


STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
MOMENTS = [
    ("instruct", signal.SIGINT, 5),
    ("instruct", signal.SIGTERM, 0),
    *(
        pytest.param(stage, number, count, marks=pytest.mark.slow)
        for stage in ("instruct", "router")
        for number in STATUS
        for count in (0, 1, 4, 7, 10)
        if (stage, number, count) != ("instruct", signal.SIGTERM, 0)
    ),
]


@pytest.mark.parametrize(("stage", "number", "count"), MOMENTS)
def test_a_signal_keeps_the_last_step_and_resume_ends_the_same(stage, number, count, commands, whole, tmp_path):
    folder = tmp_path / "run"
    command = [*commands[stage], "--adapter-path", folder]
    status, err = stop_at(command, folder / "log.jsonl", count, number)
    assert status == STATUS[number], err
    told = [line for line in err.splitlines() if "interrupted" in line]
    assert len(told) == 1, err
    assert "--resume" in told[0]
    assert "Traceback" not in err
    logged = lines(folder / "log.jsonl")
    assert logged >= count
    if logged:
        assert f"at step {logged} of 12" in told[0] or f"at step {logged + 1} of 12" in told[0]

    resumed = start([*command, "--resume"])
    out, err = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, err
    assert ("resumed at step" in err) == any(f"at step {n} " in told[0] for n in range(1, 13))
    assert str(folder) in out
    same_results(whole(stage), folder)


@pytest.mark.parametrize(
    ("number", "count"), [(signal.SIGINT, 2), pytest.param(signal.SIGTERM, 1, marks=pytest.mark.slow)]
)
def test_feedback_is_interrupted_and_resumed_by_the_same_command(number, count, tiny_folder, data, tmp_path):
    def command(name: str) -> list:
        return ["feedback", "--model", tiny_folder, "--data", data, "--output", tmp_path / name]

    first = start(command("whole.jsonl"))
    expected, err = first.communicate(timeout=120)
    assert first.returncode == 0, err
    file = tmp_path / "broken.jsonl"
    status, err = stop_at(command(file.name), file, count, number)
    assert status == STATUS[number], err
    assert f"feedback on {lines(file)} of 4 samples" in err
    assert "same command" in err
    again = start(command(file.name))
    out, err = again.communicate(timeout=120)
    assert (again.returncode, out) == (0, expected), err
    assert file.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_second_process_is_refused_and_a_killed_one_is_not_in_the_way(commands, refused, tmp_path):
    folder = tmp_path / "run"
    command = [*commands["instruct"], "--adapter-path", folder]
    first = start(command)
    try:
        while lines(folder / "log.jsonl") < 2:
            assert first.poll() is None
            time.sleep(0.001)
        os.kill(first.pid, signal.SIGSTOP)  # so that it does not end meanwhile
        before = (folder / "log.jsonl").read_bytes()
        line = refused(train_main, *command[1:], "--resume")
        assert "another process" in line
        assert (folder / "log.jsonl").read_bytes() == before
    finally:
        first.kill()
        first.communicate()
    Journal(folder / "log.jsonl").close()


def test_numbers_of_a_resumed_run_are_plain(tmp_path):
    """A record that was kept until its validation is the one that is logged."""
    with pytest.raises(Interrupted):
        fit(tmp_path / "run", task=Stopping(Line(), 3, validating=True), steps_per_eval=3)
    kept = json.loads((tmp_path / "run" / "interrupted-0000003" / "record.json").read_text())
    fit(tmp_path / "run", task=Fit(Line(), validates=True), steps_per_eval=3)
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {**kept, "validation_loss": logged[2]["validation_loss"]} == logged[2]
    assert np.isfinite(logged[2]["validation_loss"])
