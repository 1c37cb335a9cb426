"""Two processes on this machine, over MLX's ring, against one."""

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import RECORDS, launch_two, write_samples
from mlx.utils import tree_flatten

from avg_mlx import evaluate, load, read_questions
from avg_mlx.training import instruct, rglf
from avg_mlx.training.data import read_samples, routable
from avg_mlx.training.feedback import collect_feedback
from avg_mlx.training.loop import step_gradients
from avg_mlx.training.options import InstructOptions, RouterOptions
from avg_mlx.training.stages import train_instruct, train_router
from avg_mlx.weights.adapters import AdapterConfig


def work(model_folder: Path, data: Path, folder: Path) -> None:
    """What each process does, alone or in a group; the results are in `folder`."""
    group = mx.distributed.init()
    model, tokenizer = load(model_folder)
    samples = read_samples(data, None, tokenizer, model.config)
    chosen = routable(samples)
    rows = collect_feedback(model, chosen, folder / "feedback.jsonl")
    questions, _ = read_questions(data, skip_bad=True)
    evaluation = evaluate(model, tokenizer, questions, folder / "evaluated", max_tokens=2)
    (folder / f"evaluated-{group.rank()}.json").write_text(json.dumps(evaluation.summary["modes"]))
    (folder / f"rows-{group.rank()}-of-{group.size()}.json").write_text(json.dumps([row.losses for row in rows]))

    def save_gradients(name: str, task, count: int) -> None:
        batch = list(range(count))
        losses = task.micro_losses(batch[group.rank() :: group.size()], batch, 1)
        loss, gradients = step_gradients(model, losses, group)
        tensors = dict(tree_flatten(gradients)) | {"loss": loss}
        mx.save_safetensors(str(folder / f"{name}-{group.rank()}.safetensors"), tensors)

    rglf.prepare(model, fresh=False)
    model.router.eval()  # dropout is each process's own
    cache = rglf.FeatureCache(model)
    save_gradients("router", rglf.RouterTask(model, chosen, rows, [], [], 1, 1.0, 1.0, 0.1, cache), len(chosen))

    trainable = instruct.Trainable(projector=True, newline=True)
    instruct.prepare(model, AdapterConfig("full", 1), trainable, grad_checkpoint=False)
    save_gradients("instruct", instruct.InstructTask(model, samples, [], trainable, 2, 2), len(samples))

    options = {"model": str(model_folder), "data": data, "iters": 2, "batch_size": 3, "val_fraction": 0.25}
    train_instruct(InstructOptions(**options, adapter_path=folder / "tuned", granularities_per_step=1))
    train_router(RouterOptions(**options, adapter_path=folder / "routed", feature_cache=folder / "cache"))


@pytest.fixture(scope="module")
def results(tiny_folder, tmp_path_factory) -> tuple[Path, Path]:
    """Folders of one process's results and of two processes'; of three routable samples, so that shares differ."""
    records = [record for record in RECORDS if record["id"] in ("one", "turns", "text", "last")]
    data = write_samples(tmp_path_factory.mktemp("data"), records)
    folders = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    work(tiny_folder, data, folders[0])
    launch_two(__file__, tiny_folder, data, folders[1])
    return folders


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_there_were_two_processes(results):
    assert [sorted(file.name for file in folder.glob("rows-*")) for folder in results] == [
        ["rows-0-of-1.json"],
        ["rows-0-of-2.json", "rows-1-of-2.json"],
    ]


@pytest.mark.parametrize("task", ["router", "instruct"])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_summed_gradient_is_one_processes_on_the_same_global_batch(task, rank, results):
    one, two = (
        mx.load(str(results[0] / f"{task}-0.safetensors")),
        mx.load(str(results[1] / f"{task}-{rank}.safetensors")),
    )
    assert one.keys() == two.keys()
    for name, expected in one.items():
        scale = mx.linalg.norm(expected).item()
        assert scale > 0, name
        assert mx.linalg.norm(two[name] - expected).item() < 1e-3 * scale, name


def test_feedback_writes_the_same_lines(results):
    one, two = ((folder / "feedback.jsonl").read_text() for folder in results)
    assert one == two
    assert one.count("\n") == 3


def test_every_process_gets_all_feedback(results):
    texts = [file.read_text() for folder in results for file in folder.glob("rows-*")]
    assert len(texts) == 3
    assert len(set(texts)) == 1


def test_an_evaluation_writes_the_same_lines_up_to_timings(results):
    one, two = (
        [json.loads(line) for line in (folder / "evaluated" / "answers.jsonl").read_text().splitlines()]
        for folder in results
    )
    for line in one + two:
        del line["seconds"]
        for attempt in line["attempts"]:
            del attempt["prefill"], attempt["generation"]
    assert one == two
    assert [line["id"] for line in one] == ["one", "turns-1", "turns-2", "last"]


def test_every_process_gets_the_whole_evaluation(results):
    _, folder = results
    first, second = ((folder / f"evaluated-{rank}.json").read_text() for rank in range(2))
    assert first == second
    assert json.loads(first) == json.loads((folder / "evaluated" / "summary.json").read_text())["modes"]


def test_training_is_logged_once_with_one_processes_losses(results):
    one, two = (log_of(folder / "tuned") for folder in results)
    for key in ("step", "loss", "learning_rate", "validation_loss"):
        assert [line.get(key, -1) for line in two] == pytest.approx([line.get(key, -1) for line in one], rel=1e-4)
    assert len(one) == 2


def test_training_ends_with_one_processes_weights(results):
    one, two = (mx.load(str(folder / "tuned" / "adapters.safetensors")) for folder in results)
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(np.array(two[name]), np.array(one[name]), atol=1e-6)


def test_the_router_trains_in_two_processes_that_share_a_feature_cache(results):
    for folder in results:
        assert [line["step"] for line in log_of(folder / "routed")] == [1, 2]
    caches = [sorted(file.name for file in (folder / "cache").rglob("*") if file.is_file()) for folder in results]
    assert caches[0] == caches[1]
    assert len(caches[0]) == 3


if __name__ == "__main__":
    work(*map(Path, sys.argv[1:]))
