"""Training against the reference's numbers, in float32 with dropout off: `train.json` as one batch."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import GOLDEN, Reference
from mlx.utils import tree_flatten

from avg_mlx import load
from avg_mlx.training import instruct, rglf
from avg_mlx.training.data import read_samples
from avg_mlx.training.feedback import collect_feedback
from avg_mlx.training.loop import step_gradients
from avg_mlx.training.losses import choice_loss, ranking_loss, rglf_loss
from avg_mlx.weights.adapters import AdapterConfig
from avg_mlx.weights.pytorch import AUTHORS_LAYOUT

TOLERANCE = 1e-3  # absolute, of losses and logits
GRADIENT_TOLERANCE = 0.01  # relative, of norms

REFERENCE = Reference.arrays
ROUTER_TENSORS = sorted(name.removeprefix("grad_") for name in REFERENCE if name.startswith("grad_router."))
STAGE_3_TENSORS = sorted(
    name.removeprefix("stage3_gradnorm_") for name in REFERENCE if name.startswith("stage3_gradnorm_")
)


@pytest.fixture(scope="module")
def own(converted):
    """A model of this file's own, for it is frozen and gets trained parts."""
    return load(converted)


@pytest.fixture(scope="module")
def samples(own):
    model, tokenizer = own
    return read_samples(GOLDEN / "train.json", None, tokenizer, model.config)


@pytest.fixture(scope="module")
def feedback(own, samples, tmp_path_factory):
    return collect_feedback(own[0], samples, tmp_path_factory.mktemp("golden") / "feedback.jsonl")


@pytest.fixture(scope="module", params=["evaluating", "training without dropout"])
def router_step(request, own, samples, feedback, tmp_path_factory):
    """(loss, {PyTorch's name: gradient}) of the router, by either way that its attention is computed."""
    model = own[0]
    rglf.prepare(model, fresh=False)
    if request.param == "evaluating":
        model.router.eval()
    else:
        for module in model.router.modules():
            if isinstance(module, nn.Dropout):
                module._p_1 = 1.0
    cache = rglf.FeatureCache(model, tmp_path_factory.mktemp("features"))
    task = rglf.RouterTask(model, samples, feedback, [], [], 2, 1.0, 1.0, 0.1, cache)
    loss, gradients = step_gradients(model, task.micro_losses([0, 1, 2], [0, 1, 2], 1), mx.distributed.init())
    return loss.item(), by_pytorch_name(gradients)


@pytest.fixture(scope="module")
def stage_3_step(converted):
    """(loss, {PyTorch's name: gradient}) of everything but the vision tower, fully tuned."""
    model, tokenizer = load(converted)
    samples = read_samples(GOLDEN / "train.json", None, tokenizer, model.config)
    trainable = instruct.Trainable(projector=True, newline=True)
    instruct.prepare(model, AdapterConfig("full", -1), trainable, grad_checkpoint=False)
    task = instruct.InstructTask(model, samples, [], trainable, micro_batch=1)
    loss, gradients = step_gradients(model, task.micro_losses([0, 1, 2], [0, 1, 2], 1), mx.distributed.init())
    return loss.item(), by_pytorch_name(gradients)


def by_pytorch_name(gradients) -> dict[str, np.ndarray]:
    parts: dict[str, dict[int | None, np.ndarray]] = {}
    for name, array in tree_flatten(gradients):
        parts.setdefault(AUTHORS_LAYOUT.origin(name).name, {})[AUTHORS_LAYOUT.origin(name).part] = np.array(array)
    return {name: np.concatenate([arrays[part] for part in sorted(arrays)]) for name, arrays in parts.items()}


def batched(rows, filler: int) -> np.ndarray:
    """Rows of several lengths, padded on the right."""
    length = max(map(len, rows))
    return np.array([[*row, *[filler] * (length - len(row))] for row in rows])


def close(ours, reference) -> None:
    ours = np.array(ours)
    assert ours.shape == reference.shape
    assert np.abs(ours - reference).max() < TOLERANCE


def within_a_percent(ours: float, reference: np.ndarray) -> None:
    assert ours == pytest.approx(float(reference), rel=GRADIENT_TOLERANCE, abs=0)


def subsampled(array: np.ndarray) -> np.ndarray:
    return array[:: max(1, len(array) // 16)] if array.size > 8192 else array


def test_input_ids(samples):
    np.testing.assert_array_equal(batched([sample.ids for sample in samples], 0), REFERENCE["train_input_ids"])


def test_labels(samples):
    np.testing.assert_array_equal(batched([sample.labels for sample in samples], -100), REFERENCE["train_labels"])


def test_feedback_losses(feedback):
    close([row.losses for row in feedback], REFERENCE["train_llm_loss"])


def test_router_logits(feedback):
    close([row.router_logits for row in feedback], REFERENCE["train_router_logits"])


@pytest.mark.parametrize(
    ("loss", "reference"),
    [(ranking_loss, "train_rank_loss"), (choice_loss, "train_ce_loss"), (rglf_loss, "train_rglf_loss")],
)
def test_router_losses(loss, reference, feedback):
    logits, losses = (mx.array([getattr(row, part) for row in feedback]) for part in ("router_logits", "losses"))
    close(loss(logits, losses).mean(), REFERENCE[reference])


def test_rglf_loss_of_a_training_step(router_step):
    close(router_step[0], REFERENCE["train_rglf_loss"])


def test_every_router_tensor_gets_a_gradient(router_step):
    assert sorted(router_step[1]) == [f"model.{name}" for name in ROUTER_TENSORS]


@pytest.mark.parametrize("name", ROUTER_TENSORS)
def test_router_gradient(name, router_step):
    gradient, reference = router_step[1][f"model.{name}"], REFERENCE[f"grad_{name}"]
    within_a_percent(np.linalg.norm(gradient), REFERENCE[f"gradnorm_{name}"])
    part = subsampled(gradient)
    assert part.shape == reference.shape
    assert np.linalg.norm(part - reference) < GRADIENT_TOLERANCE * np.linalg.norm(reference)


def test_stage_3_loss_is_the_mean_feedback_of_all_answer_tokens(feedback):
    losses = np.mean([row.losses for row in feedback], axis=1)
    close(np.average(losses, weights=[row.answer_tokens for row in feedback]), REFERENCE["stage3_loss"])


@pytest.mark.slow
def test_stage_3_loss_of_a_training_step(stage_3_step):
    close(stage_3_step[0], REFERENCE["stage3_loss"])


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGE_3_TENSORS)
def test_stage_3_gradient_norm(name, stage_3_step):
    within_a_percent(np.linalg.norm(stage_3_step[1][name]), REFERENCE[f"stage3_gradnorm_{name}"])
