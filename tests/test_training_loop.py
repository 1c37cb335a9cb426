"""The training loop on cheap tasks, and the two stages on the tiny model."""

import json
import math
import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from conftest import RECORDS, conversation, write_samples
from faults import Killed, fill_disk
from mlx.utils import tree_flatten

from avg_mlx.errors import AvgMlxError, InputError
from avg_mlx.inputs.image import Crops
from avg_mlx.training import instruct, loop, rglf
from avg_mlx.training.data import read_samples, routable
from avg_mlx.training.feedback import collect_feedback
from avg_mlx.training.loop import step_gradients, train
from avg_mlx.training.optimizer import LoopSettings
from avg_mlx.training.options import InstructOptions, RouterOptions
from avg_mlx.training.plan import Plan
from avg_mlx.training.run import Run
from avg_mlx.training.stages import train_instruct, train_router
from avg_mlx.weights.adapters import AdapterConfig

NUMBERS = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)


class Line(nn.Module):
    """A model of two trained arrays, of which one does nothing."""

    def __init__(self):
        super().__init__()
        self.weight = mx.ones(4)
        self.idle = mx.ones(3)
        self.dropout = nn.Dropout(0.3)

    def __call__(self, x: mx.array) -> mx.array:
        return self.dropout(x) @ self.weight


@dataclass
class Fit:
    """Pull a line's weights towards `factor`; the loss of `step` may be spoiled."""

    model: Line
    factor: float = 3.0
    spoiled: int = 0
    validates: bool = False

    def micro_losses(self, samples, batch, step):
        for i in samples:
            x = mx.array(NUMBERS[i])
            spoil = math.nan if step == self.spoiled else 0.0
            yield lambda x=x, spoil=spoil: (self.model(x) - self.factor * x.sum()).square() / len(batch) + spoil

    def validate(self):
        if not self.validates:
            return None
        assert not self.model.training
        assert not self.model.dropout.training
        return mx.random.uniform().item()  # as a careless task may


def fit(folder: Path, report=lambda record: None, task=None, save_every=3, **settings) -> Line:
    """Train a line into `folder`, or go on there."""
    task = task or Fit(Line())
    settings = LoopSettings(**{"steps": 8, "learning_rate": 0.1, "save_every": save_every} | settings)
    with Run(folder, {}, AdapterConfig()).open(resume=True) as run:
        train(task.model, task, Plan([1] * len(NUMBERS), 4, seed=0), settings, run, report)
    return task.model


def log_of(folder: Path) -> list[dict]:
    """What is logged, without what is measured of the machine."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    measured = ("samples_per_second", "peak_memory_gb")
    assert all(set(measured) < set(line) for line in lines)
    return [{key: value for key, value in line.items() if key not in measured} for line in lines]


def same_results(one: Path, other: Path) -> None:
    assert log_of(one) == log_of(other)
    contents = [
        {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*.*") if file.is_file()}
        for folder in (one, other)
    ]
    assert contents[0].keys() == contents[1].keys()
    for file in contents[0]:
        assert contents[0][file] == contents[1][file] or file.name == "log.jsonl", file


def interrupting(*steps: int, by: type[BaseException] = KeyboardInterrupt):
    """A report callback that interrupts after each of `steps`, once."""
    due = set(steps)

    def report(record, total=None):
        if record["step"] in due:
            due.remove(record["step"])
            raise by

    return report


@pytest.fixture(scope="module")
def router_data(tmp_path_factory) -> Path:
    return write_samples(tmp_path_factory.mktemp("router"), [r for r in RECORDS if isinstance(r.get("image"), str)])


@pytest.fixture(scope="module")
def short_data(tmp_path_factory) -> Path:
    """Cheap to learn."""
    records = [{"id": n, "conversations": conversation(f"Say {n}.", str(n))} for n in range(3)]
    return write_samples(tmp_path_factory.mktemp("short"), [RECORDS[-1], *records])


@pytest.fixture
def instruct_options(tiny_folder, short_data, tmp_path) -> InstructOptions:
    return InstructOptions(
        model=tiny_folder,
        data=short_data,
        adapter_path=tmp_path / "run",
        iters=6,
        batch_size=2,
        learning_rate=1e-3,
        save_every=2,
        seed=7,
        lora_rank=2,
        lora_dropout=0.2,
        granularities_per_step=1,
    )


@pytest.fixture
def router_options(tiny_folder, router_data, tmp_path) -> RouterOptions:
    return RouterOptions(
        model=tiny_folder,
        data=router_data,
        adapter_path=tmp_path / "run",
        iters=6,
        batch_size=3,
        save_every=2,
        seed=7,
        fresh_router=True,
    )


def test_what_came_of_a_stage_is_returned(instruct_options):
    trained = train_instruct(instruct_options)
    assert trained.adapters == instruct_options.adapter_path
    assert trained.log == [json.loads(line) for line in (trained.adapters / "log.jsonl").read_text().splitlines()]
    assert trained.steps == 6
    assert trained.seconds > 0
    again = train_instruct(replace(instruct_options, resume=True))
    assert (again.log, again.steps) == (trained.log, 0)


# Gradients


def assert_same_gradients(one, other) -> None:
    (loss, gradients), (other_loss, other_gradients) = one, other
    assert loss.item() == pytest.approx(other_loss.item(), rel=1e-5)
    ours, theirs = dict(tree_flatten(gradients)), dict(tree_flatten(other_gradients))
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        scale = np.linalg.norm(theirs[name])
        assert scale > 0, name
        assert np.linalg.norm(np.array(gradient) - np.array(theirs[name])) < 1e-3 * scale, name


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_instruct_accumulates_to_the_gradient_of_one_batch(micro_batch, data, own_tiny):
    model, tokenizer = own_tiny
    samples = read_samples(data, None, tokenizer, model.config)
    trainable = instruct.Trainable(projector=True, newline=True)
    instruct.prepare(model, AdapterConfig("full", 1), trainable, grad_checkpoint=False)
    everything = list(range(len(samples)))

    def gradients(size: int):
        task = instruct.InstructTask(model, samples, [], trainable, size, granularities_per_step=2)
        return step_gradients(model, task.micro_losses(everything, everything, 1), mx.distributed.init())

    assert_same_gradients(gradients(micro_batch), gradients(len(samples)))


@pytest.fixture
def own_feedback(router_data, own_tiny, tmp_path):
    """(model whose router is to be trained, without dropout, samples, their feedback)."""
    model, tokenizer = own_tiny
    samples = routable(read_samples(router_data, None, tokenizer, model.config))
    rows = collect_feedback(model, samples, tmp_path / "feedback.jsonl")
    rglf.prepare(model, fresh=False)
    model.router.eval()
    return model, samples, rows


def router_step(model, samples, rows, size: int, *token_cost: float):
    """(loss, gradients) of all samples, `size` at a time."""
    task = rglf.RouterTask(model, samples, rows, [], [], size, 1.0, 1.0, 0.1, rglf.FeatureCache(model), *token_cost)
    everything = list(range(len(samples)))
    return step_gradients(model, task.micro_losses(everything, everything, 1), mx.distributed.init())


def test_router_accumulates_to_the_gradient_of_one_batch(own_feedback):
    assert_same_gradients(router_step(*own_feedback, 1), router_step(*own_feedback, len(own_feedback[1])))


def test_the_token_cost_is_part_of_the_losses_that_are_ranked(own_feedback):
    model, samples, rows = own_feedback
    dearer = []
    for sample, row in zip(samples, rows, strict=True):
        tokens = [model.config.visual_tokens(g, sample.image_sizes[0]) for g in row.granularities]
        losses = [loss + 0.3 * count / max(tokens) for loss, count in zip(row.losses, tokens, strict=True)]
        dearer.append(replace(row, losses=losses))
    costly, free = router_step(model, samples, rows, 2, 0.3), router_step(model, samples, rows, 2)
    assert_same_gradients(costly, router_step(model, samples, dearer, 2))
    assert costly[0].item() != pytest.approx(free[0].item(), abs=1e-3)


def test_a_step_of_accumulated_batches_is_a_step_of_one_batch(instruct_options, tmp_path):
    losses = []
    for batch, accumulated in ((4, 1), (1, 4), (2, 2)):
        folder = tmp_path / str(batch)
        sizes = {"batch_size": batch, "grad_accumulation_steps": accumulated}
        train_instruct(replace(instruct_options, adapter_path=folder, iters=4, lora_dropout=0.0, **sizes))
        losses.append([line["loss"] for line in log_of(folder)])
    assert losses[0][0] != losses[0][-1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


def test_instruct_learns_the_losses_that_feedback_measures(router_data, own_tiny, tmp_path):
    """By whole padded passes of several samples there, by shared prefixes here."""
    model, tokenizer = own_tiny
    samples = read_samples(router_data, None, tokenizer, model.config)
    rows = collect_feedback(model, samples, tmp_path / "feedback.jsonl")
    mean = np.average(np.mean([row.losses for row in rows], axis=1), weights=[row.answer_tokens for row in rows])
    everything = list(range(len(samples)))
    task = instruct.InstructTask(model, samples, samples, instruct.Trainable(), micro_batch=3)
    total = sum(loss().item() for loss in task.micro_losses(everything, everything, 1))
    assert total == pytest.approx(mean, rel=1e-5)
    assert task.validate() == pytest.approx(mean, rel=1e-5)


@pytest.fixture
def seen_granularities(data, tiny, monkeypatch):
    """`seen(samples, k, step, seed)` → granularities of a step's losses and those losses' sum, were all losses 1."""
    model, tokenizer = tiny
    samples = {sample.id: sample for sample in read_samples(data, None, tokenizer, model.config)}
    side = model.config.vision.image_size
    blank = Crops(np.zeros((1, side, side, 3), np.float32), (side, side), (0, 0))
    monkeypatch.setattr(instruct, "load_crops", lambda model, sample: [blank] * len(sample.images))

    def run(names, k, step=1, seed=0):
        drawn = []

        def losses(model, samples, features, crops, granularity):
            drawn.append(granularity)
            return mx.ones(sum(sample.answer_tokens for sample in samples))

        monkeypatch.setattr(instruct, "answer_losses", losses)
        chosen, everything = [samples[name] for name in names], list(range(len(names)))
        task = instruct.InstructTask(model, chosen, [], instruct.Trainable(), 8, k, seed)
        total = sum(loss().item() for loss in task.micro_losses(everything, everything, step))
        return tuple(drawn), total

    return run


@pytest.mark.parametrize("k", [1, 2, 4, 5, None])
def test_granularities_per_step(k, seen_granularities, tiny):
    granularities = tiny[0].config.granularities
    drawn = [seen_granularities(["one", "turns"], k, step)[0] for step in range(60)]
    for step in drawn:
        assert len(step) == len(set(step)) == (k or 5)
        assert set(step) <= set(granularities)
    counts = [sum(g in step for step in drawn) for g in granularities]
    assert min(counts) > 0.5 * 60 * (k or 5) / 5
    assert drawn == [seen_granularities(["one", "turns"], k, step)[0] for step in range(60)]
    if k in (1, 2, 4):
        assert drawn != [seen_granularities(["one", "turns"], k, step, seed=1)[0] for step in range(60)]


@pytest.mark.parametrize("k", [1, 3, None])
@pytest.mark.parametrize("names", [["one"], ["text"], ["one", "text", "two", "turns"]])
def test_every_answer_token_weighs_the_same(names, k, seen_granularities):
    """With or without an image, at however many granularities."""
    drawn, total = seen_granularities(names, k)
    assert total == pytest.approx(1, rel=1e-5)
    assert len(drawn) == (k or 5) * (names != ["text"]) + ("text" in names)


# Resuming


@pytest.mark.parametrize("by", [KeyboardInterrupt, Killed])
@pytest.mark.parametrize("seed", range(4))
def test_resuming_a_cheap_task_ends_as_if_never_interrupted(seed, by, tmp_path):
    steps = random.Random(seed).sample(range(1, 8), 3)
    fit(tmp_path / "whole")
    report = interrupting(*steps, by=by)
    for _ in steps:
        with pytest.raises(by):
            fit(tmp_path / "broken", report)
    fit(tmp_path / "broken", report)
    same_results(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize("seed", range(2))
def test_resuming_instruct_ends_as_if_never_interrupted(seed, instruct_options, tmp_path):
    """With LoRA, its dropout, drawn granularities, and a validation split."""
    steps = sorted(random.Random(seed).sample(range(1, 6), 2))
    options = replace(instruct_options, val_fraction=0.25, steps_per_eval=3)
    whole = replace(options, adapter_path=tmp_path / "whole")
    train_instruct(whole)
    report = interrupting(*steps)
    for _ in steps:
        with pytest.raises(KeyboardInterrupt):
            train_instruct(options, report)
        options = replace(options, resume=True)
    train_instruct(options, report)
    same_results(whole.adapter_path, options.adapter_path)


@pytest.mark.parametrize("seed", range(2))
def test_resuming_the_router_ends_as_if_never_interrupted(seed, router_options, tmp_path):
    """With its dropout, from a fresh one."""
    steps = sorted(random.Random(seed).sample(range(1, 6), 2))
    whole = replace(router_options, adapter_path=tmp_path / "whole")
    train_router(whole)
    options, report = router_options, interrupting(*steps)
    for _ in steps:
        with pytest.raises(KeyboardInterrupt):
            train_router(options, report)
        options = replace(options, resume=True)
    train_router(options, report)
    same_results(whole.adapter_path, options.adapter_path)


def test_dropout_differs_between_steps_and_seeds(tmp_path):
    """So that resuming bit for bit is no triviality."""
    weights = [fit(tmp_path / str(seed), seed=seed).weight.tolist() for seed in (0, 1)]
    assert weights[0] != weights[1]


@pytest.mark.parametrize("written", ["model.safetensors", "optimizer.safetensors", ".partial-adapters.safetensors"])
def test_a_half_written_checkpoint_is_ignored(written, tmp_path, monkeypatch):
    """The process ends while it writes any of the three files of step 6."""
    fit(tmp_path / "whole")
    save, cut = mx.save_safetensors, []

    def save_half(file, arrays, metadata=None):
        save(file, arrays, metadata)
        if file.endswith(written) and (tmp_path / "broken" / "checkpoint-0000003").exists():
            cut.append(file)
            with open(file, "r+b") as stream:
                stream.truncate(40)
            raise Killed

    with monkeypatch.context() as context:
        context.setattr(mx, "save_safetensors", save_half)
        with pytest.raises(Killed):
            fit(tmp_path / "broken")
    assert len(cut) == 1
    mx.load(str(tmp_path / "broken" / "adapters.safetensors"))  # a whole file still
    steps = []
    fit(tmp_path / "broken", lambda record: steps.append(record["step"]))
    assert steps == [4, 5, 6, 7, 8]
    assert not list((tmp_path / "broken").glob(".partial-*"))
    same_results(tmp_path / "whole", tmp_path / "broken")


def test_a_half_removed_checkpoint_does_not_look_like_one(tmp_path, monkeypatch):
    def remove_half(folder, ignore_errors=False):
        if Path(folder).exists():
            (Path(folder) / "model.safetensors").unlink()
            raise Killed

    fit(tmp_path / "whole", save_every=1)
    with monkeypatch.context() as context:
        context.setattr(shutil, "rmtree", remove_half)
        with pytest.raises(Killed):
            fit(tmp_path / "broken", save_every=1)
    for checkpoint in (tmp_path / "broken").glob("checkpoint-*"):
        assert {file.name for file in checkpoint.iterdir()} == {"model.safetensors", "optimizer.safetensors"}
    fit(tmp_path / "broken", save_every=1)
    same_results(tmp_path / "whole", tmp_path / "broken")


def test_what_a_killed_run_left_at_its_end_is_removed_by_the_next(tmp_path):
    fit(tmp_path / "run")
    shutil.copytree(tmp_path / "run" / "checkpoint-0000008", tmp_path / "run" / ".partial-checkpoint")
    fit(tmp_path / "run")
    assert not list((tmp_path / "run").glob(".*"))


def test_a_log_line_cut_off_is_written_anew(tmp_path):
    fit(tmp_path / "whole")
    with pytest.raises(Killed):
        fit(tmp_path / "broken", interrupting(5, by=Killed))
    log = tmp_path / "broken" / "log.jsonl"
    log.write_text(log.read_text()[:-9])
    fit(tmp_path / "broken")
    same_results(tmp_path / "whole", tmp_path / "broken")


def test_the_last_two_checkpoints_are_kept(tmp_path):
    fit(tmp_path / "run", save_every=2)
    kept = sorted(file.name for file in (tmp_path / "run").glob("checkpoint-*"))
    assert kept == ["checkpoint-0000006", "checkpoint-0000008"]


def test_a_finished_run_is_resumed_to_nothing(tmp_path):
    fit(tmp_path / "run")
    before = (tmp_path / "run" / "adapters.safetensors").read_bytes()
    steps = []
    fit(tmp_path / "run", lambda record: steps.append(record))
    assert steps == []
    assert (tmp_path / "run" / "adapters.safetensors").read_bytes() == before


@pytest.fixture
def started(instruct_options):
    """Options of a run that was interrupted after its first step, to be resumed."""
    with pytest.raises(KeyboardInterrupt):
        train_instruct(replace(instruct_options, save_every=1), interrupting(1))
    return replace(instruct_options, resume=True)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"learning_rate": 1e-4}, "learning_rate was 0.001 and is 0.0001"),
        ({"seed": 8}, "seed was 7 and is 8"),
        ({"lora_rank": 4}, "lora_rank was 2 and is 4"),
        ({"batch_size": 1, "grad_accumulation_steps": 2}, "batch_size was 2 and is 1; grad_accumulation_steps was 1"),
        ({"train_newline": True}, "train_newline was False and is True"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_changed_options_do_not_resume(changes, told, started):
    before = {file: file.stat().st_mtime_ns for file in started.adapter_path.iterdir()}
    with pytest.raises(InputError) as error:
        train_instruct(replace(started, **changes))
    assert str(started.adapter_path) in str(error.value)
    assert told in str(error.value)
    assert {file: file.stat().st_mtime_ns for file in started.adapter_path.iterdir()} == before


def test_changed_data_does_not_resume(started, tmp_path, short_data):
    records = json.loads(short_data.read_text())
    records[0]["conversations"] = conversation("Describe.", "Another answer.")
    short_data = write_samples(tmp_path, records)
    with pytest.raises(InputError, match="data was"):
        train_instruct(replace(started, data=short_data))


def test_where_to_and_how_often_may_change(started, tmp_path):
    steps = []
    moved = started.adapter_path.rename(tmp_path / "moved")
    free = {"adapter_path": moved, "save_every": 4, "steps_per_eval": 3}
    train_instruct(replace(started, **free), lambda record, total: steps.append(record["step"]))
    assert steps == [2, 3, 4, 5, 6]


def test_a_run_is_not_written_over(started):
    with pytest.raises(InputError, match=r"holds a run already.*--resume.*another folder"):
        train_instruct(replace(started, resume=False))


# What goes wrong


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "whole", interrupting(3))
    with pytest.raises(AvgMlxError) as error:
        fit(tmp_path / "run", task=Fit(Line(), spoiled=5))
    assert "not finite at step 5; the last checkpoint is kept" in str(error.value)
    assert "learning_rate" in str(error.value)
    assert [file.name for file in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-0000003"]
    assert [line["step"] for line in log_of(tmp_path / "run")] == [1, 2, 3, 4]
    adapters = [(tmp_path / run / "adapters.safetensors").read_bytes() for run in ("whole", "run")]
    assert adapters[0] == adapters[1]


def test_a_learning_rate_that_diverges_stops_in_instruct(instruct_options):
    with pytest.raises(AvgMlxError, match=r"are not finite at step [2-6]; the last checkpoint"):
        train_instruct(replace(instruct_options, learning_rate=1e30, warmup=0, save_every=1))
    tensors = mx.load(str(instruct_options.adapter_path / "adapters.safetensors"))
    assert tensors


@pytest.mark.parametrize("failing", range(3))
def test_a_full_disk_is_one_error_and_loses_nothing(failing, tmp_path, monkeypatch):
    fit(tmp_path / "whole")
    save, calls = mx.save_safetensors, []

    def refuse(file, arrays, metadata=None):
        calls.append(file)
        if len(calls) == 4 + failing:  # of the second checkpoint's three files
            Path(file).write_bytes(b"half")
            raise RuntimeError("[write] Unable to write 4 bytes to file.")
        save(file, arrays, metadata)

    with monkeypatch.context() as context:
        context.setattr(mx, "save_safetensors", refuse)
        with pytest.raises(AvgMlxError) as error:
            fit(tmp_path / "run")
    assert "cannot save step 6 into" in str(error.value)
    assert "make room" in str(error.value)
    assert "--resume" in str(error.value)
    assert [file.name for file in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-0000003"]
    assert not list((tmp_path / "run").glob(".*"))
    fit(tmp_path / "run")
    same_results(tmp_path / "whole", tmp_path / "run")


def test_a_disk_too_full_for_the_log_is_one_error(tmp_path, monkeypatch):
    fit(tmp_path / "whole")
    with monkeypatch.context() as context:
        fill_disk(context, 4)
        with pytest.raises(AvgMlxError, match=r"cannot write .*run.log\.jsonl \(No space left.*make room"):
            fit(tmp_path / "run")
    assert [line["step"] for line in log_of(tmp_path / "run")] == [1, 2, 3, 4]
    fit(tmp_path / "run")
    same_results(tmp_path / "whole", tmp_path / "run")


# Optimization


def test_warm_up_and_cosine(tmp_path):
    fit(tmp_path / "run", steps=10, learning_rate=2.0, warmup=0.2)
    rates = [line["learning_rate"] for line in log_of(tmp_path / "run")]
    expected = [1.0, 2.0] + [1 + math.cos(math.pi * n / 8) for n in range(8)]
    assert rates == pytest.approx(expected, abs=1e-6)


def test_constant_schedule_after_the_warm_up(tmp_path):
    fit(tmp_path / "run", steps=6, learning_rate=2.0, warmup=0.5, lr_schedule="constant")
    assert [line["learning_rate"] for line in log_of(tmp_path / "run")] == pytest.approx([2 / 3, 4 / 3, 2, 2, 2, 2])


def test_steps_follow_the_learning_rate(tmp_path):
    """Adam's first step moves each weight by the learning rate, once its averages' bias is corrected."""
    line = fit(tmp_path / "run", steps=1, learning_rate=0.25)
    assert np.abs(np.array(line.weight) - 1) == pytest.approx(0.25, rel=1e-4)


def test_the_vision_tower_may_have_a_learning_rate_of_its_own(tmp_path):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.vision_tower, self.language_model = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)

    class Pull:
        def __init__(self, model):
            self.model = model

        def micro_losses(self, samples, batch, step):
            yield lambda: sum(part.weight.sum() for part in (self.model.vision_tower, self.model.language_model))

        def validate(self):
            return None

    model = Both()
    before = {name: np.array(array) for name, array in tree_flatten(model.parameters())}
    fit(tmp_path / "run", task=Pull(model), steps=1, learning_rate=0.1, vision_learning_rate=0.02)
    moved = {name: before[name] - np.array(array) for name, array in tree_flatten(model.parameters())}
    assert moved["vision_tower.weight"] == pytest.approx(0.02, rel=1e-3)
    assert moved["language_model.weight"] == pytest.approx(0.1, rel=1e-3)


def test_two_learning_rates_resume_as_well(instruct_options, tmp_path):
    options = replace(instruct_options, train_vision=True, vision_learning_rate=1e-4, iters=3, save_every=1)
    whole = replace(options, adapter_path=tmp_path / "whole")
    train_instruct(whole)
    with pytest.raises(KeyboardInterrupt):
        train_instruct(options, interrupting(2))
    train_instruct(replace(options, resume=True))
    same_results(whole.adapter_path, options.adapter_path)


def test_weight_decay_is_off_by_default(tmp_path, instruct_options):
    assert mx.array_equal(fit(tmp_path / "off").idle, mx.ones(3))
    decayed = fit(tmp_path / "on", weight_decay=0.1, steps=1)
    assert np.array(decayed.idle) == pytest.approx(1 - 0.1 * 0.1)
    assert instruct_options.weight_decay == 0


@pytest.mark.parametrize("clip", [0.5, 1e9])
def test_gradients_are_clipped_to_a_norm(clip, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "make_optimizer", lambda settings: optim.SGD(1.0))
    model = Line()
    gradients = []
    value_and_grad = nn.value_and_grad

    def keep(*arguments):
        def run():
            value, gradient = value_and_grad(*arguments)()
            gradients.append(np.array(gradient["weight"]))
            return value, gradient

        return run

    monkeypatch.setattr(nn, "value_and_grad", keep)
    fit(tmp_path / "run", task=Fit(model), steps=1, grad_clip=clip)
    raw = np.sum(gradients, axis=0)
    norm = np.linalg.norm(raw)
    assert 1 < norm < 1e6
    np.testing.assert_allclose(1 - np.array(model.weight), raw * min(1, clip / norm), rtol=1e-4)


# Validation and memory


def test_validation_is_logged_and_does_not_disturb(tmp_path):
    plain = fit(tmp_path / "plain")
    validated = fit(tmp_path / "validated", task=Fit(Line(), validates=True), steps_per_eval=3)
    assert mx.array_equal(plain.weight, validated.weight)
    assert validated.training
    assert validated.dropout.training
    assert [line["step"] for line in log_of(tmp_path / "validated") if "validation_loss" in line] == [3, 6, 8]
    assert not any("validation_loss" in line for line in log_of(tmp_path / "plain"))


@pytest.mark.parametrize("stage", ["instruct", "router"])
def test_a_stages_validation_does_not_disturb(stage, stage_options, stage_trainer, router_data, tmp_path):
    plain = replace(stage_options, iters=3, adapter_path=tmp_path / "plain")
    validated = replace(plain, adapter_path=tmp_path / "validated", val_data=router_data, steps_per_eval=2)
    for options in (plain, validated):
        stage_trainer(options)
    adapters = [(options.adapter_path / "adapters.safetensors").read_bytes() for options in (plain, validated)]
    assert adapters[0] == adapters[1]
    losses = {line["step"]: line["validation_loss"] for line in log_of(validated.adapter_path)[1:]}
    assert list(losses) == [2, 3]
    assert losses[2] != losses[3]


@pytest.fixture
def stage_options(stage, instruct_options, router_options):
    return {"instruct": instruct_options, "router": router_options}[stage]


@pytest.fixture
def stage_trainer(stage):
    return {"instruct": train_instruct, "router": train_router}[stage]


@pytest.mark.parametrize("stage", ["instruct", "router"])
def test_memory_stays_flat(stage, stage_options, stage_trainer):
    used = []
    stage_trainer(replace(stage_options, iters=10), lambda record, total: used.append(mx.get_active_memory()))
    assert len(used) == 10
    assert used[9] - used[2] < 100_000  # bytes; the model has 700,000


# Cached features


def test_cached_features_change_nothing(router_options, tmp_path):
    plain = replace(router_options, adapter_path=tmp_path / "plain")
    train_router(plain)
    for n, folder in enumerate(("writing", "reading")):
        cached = replace(router_options, adapter_path=tmp_path / folder, feature_cache=tmp_path / "cache")
        assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 4 * n
        train_router(cached)
        adapters = [(options.adapter_path / "adapters.safetensors").read_bytes() for options in (plain, cached)]
        assert adapters[0] == adapters[1]


def test_cached_features_are_one_models(router_options, instruct_options, tmp_path):
    """A tuned projector makes others, though the samples are the same."""
    tuned = replace(instruct_options, adapter_path=tmp_path / "tuned", train_projector=True, iters=1, learning_rate=0.1)
    train_instruct(tuned)
    losses = []
    for folder, base, cache in (("a", None, True), ("b", tuned.adapter_path, True), ("c", tuned.adapter_path, False)):
        options = replace(router_options, adapter_path=tmp_path / folder, base_adapters=base, iters=2)
        train_router(replace(options, feature_cache=tmp_path / "cache" if cache else None))
        losses.append([line["loss"] for line in log_of(options.adapter_path)])
    assert losses[1] == losses[2] != losses[0]


def test_a_disk_too_full_for_cached_features_is_one_error(router_options, tmp_path, monkeypatch):
    save = mx.save_safetensors

    def refuse(file, arrays, metadata=None):
        if str(tmp_path / "cache") in file:
            raise RuntimeError("[write] Unable to write 4 bytes to file.")
        save(file, arrays, metadata)

    monkeypatch.setattr(mx, "save_safetensors", refuse)
    with pytest.raises(AvgMlxError, match=r"cannot write .*cache.*Unable to write.*make room.*--resume"):
        train_router(replace(router_options, feature_cache=tmp_path / "cache"))


def test_a_checkpoint_that_a_power_loss_emptied_is_passed_over(tmp_path, caplog):
    """The one before it is resumed, and the result is the same."""
    fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", interrupting(7))
    last = tmp_path / "cut" / "interrupted-0000007"
    assert last.is_dir()
    (last / "model.safetensors").write_bytes(b"")
    fit(tmp_path / "cut")
    assert "cannot be resumed from" in caplog.text
    same_results(tmp_path / "whole", tmp_path / "cut")


def test_a_checkpoint_without_all_tensors_is_passed_over(tmp_path):
    fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", interrupting(7))
    last = tmp_path / "cut" / "interrupted-0000007"
    mx.save_safetensors(str(last / "model.safetensors"), {"weight": mx.zeros(4)})
    fit(tmp_path / "cut")
    same_results(tmp_path / "whole", tmp_path / "cut")


def test_processes_that_do_not_stand_at_the_same_step_are_refused(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, interrupting(3))
    gather = mx.distributed.all_gather
    monkeypatch.setattr(mx.distributed, "all_gather", lambda x, **kw: mx.concatenate([gather(x, **kw), x * 0]))
    with pytest.raises(InputError, match="do not resume at the same step; all must see"):
        fit(tmp_path)
