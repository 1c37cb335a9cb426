"""The losses against naive loops over their formulas, and by properties."""

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from avg_mlx.training.losses import choice_loss, ranking_loss, rglf_loss, token_losses

GRANULARITIES = 5


@st.composite
def logits_and_feedback(draw):
    """(samples, granularities) of both; feedback without ties, whose order is not defined."""
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    numbers = st.floats(-5, 5, width=32)
    logits = draw(arrays(np.float32, shape, elements=numbers))
    ranks = np.array([draw(st.permutations(range(shape[1]))) for _ in range(shape[0])])
    gaps = draw(arrays(np.float32, shape, elements=st.floats(2**-6, 1, width=32))).cumsum(axis=1)
    return logits, np.take_along_axis(gaps, ranks, axis=1).astype(np.float32)


def naive_ranking_loss(logits, feedback, margin) -> float:
    """Of one sample, as the specification writes it."""
    order = sorted(range(len(feedback)), key=lambda k: feedback[k])
    loss = [float(feedback[k]) for k in order]
    total = math.log(sum(math.exp(float(x)) for x in logits))
    scores = [float(logits[k]) - total for k in order]
    n, result = len(order), 0.0
    for j in range(1, n):
        terms = [max(0.0, scores[i + j] - scores[i] + margin * j * (loss[i + j] - loss[i])) for i in range(n - j)]
        result += sum(terms) / len(terms)
    return result


@given(logits_and_feedback(), st.floats(0, 3))
def test_ranking_loss_is_the_formula(given, margin):
    logits, feedback = given
    ours = np.array(ranking_loss(mx.array(logits), mx.array(feedback), margin))
    naive = [naive_ranking_loss(*row, margin) for row in zip(logits, feedback, strict=True)]
    np.testing.assert_allclose(ours, naive, rtol=1e-4, atol=1e-4)


@given(logits_and_feedback())
def test_choice_loss_is_the_formula(given):
    logits, feedback = given
    naive = [
        math.log(sum(math.exp(float(x)) for x in row)) - float(row[losses.argmin()])
        for row, losses in zip(logits, feedback, strict=True)
    ]
    np.testing.assert_allclose(np.array(choice_loss(mx.array(logits), mx.array(feedback))), naive, atol=1e-4)


@given(logits_and_feedback(), st.floats(0, 2), st.floats(0, 2), st.floats(0, 2))
def test_rglf_loss_weighs_both(given, margin, rank_weight, choice_weight):
    logits, feedback = map(mx.array, given)
    expected = rank_weight * ranking_loss(logits, feedback, margin) + choice_weight * choice_loss(logits, feedback)
    ours = rglf_loss(logits, feedback, margin, rank_weight, choice_weight)
    np.testing.assert_allclose(np.array(ours), np.array(expected), rtol=1e-5, atol=1e-6)


@given(logits_and_feedback())
def test_weights_are_the_authors_by_default(given):
    logits, feedback = map(mx.array, given)
    assert mx.array_equal(rglf_loss(logits, feedback), rglf_loss(logits, feedback, 1.0, 1.0, 0.1))


@given(logits_and_feedback(), st.randoms())
def test_the_order_of_granularities_does_not_matter(given, random):
    logits, feedback = given
    order = list(range(logits.shape[1]))
    random.shuffle(order)
    for loss in (ranking_loss, choice_loss):
        before = loss(mx.array(logits), mx.array(feedback))
        after = loss(mx.array(logits[:, order]), mx.array(feedback[:, order]))
        np.testing.assert_allclose(np.array(before), np.array(after), rtol=1e-4, atol=1e-4)


@given(logits_and_feedback(), st.floats(0.1, 2))
def test_no_ranking_loss_where_logits_rank_with_the_margin(given, margin):
    _, feedback = given
    farthest = feedback.shape[1] - 1  # ranks apart: the greatest factor of the margin
    logits = -1.01 * margin * max(farthest, 1) * feedback
    np.testing.assert_allclose(np.array(ranking_loss(mx.array(logits), mx.array(feedback), margin)), 0, atol=1e-5)


def test_ranking_loss_grows_with_the_ranks_between():
    """As trained: the margin between the best and the worst of three counts twice."""
    feedback = mx.array([[0.0, 0.5, 1.5]])
    loss = ranking_loss(mx.zeros((1, 3)), feedback, margin=1.0)
    assert loss.item() == pytest.approx((0.5 + 1.0) / 2 + 2 * 1.5)


def test_a_single_granularity_has_nothing_to_rank():
    assert ranking_loss(mx.array([[3.0]]), mx.array([[1.0]])).tolist() == [0.0]


@pytest.mark.parametrize("loss", [ranking_loss, choice_loss, rglf_loss])
@pytest.mark.parametrize("samples", [1, 3])
def test_one_loss_a_sample(loss, samples):
    logits = mx.random.normal((samples, GRANULARITIES), key=mx.random.key(0))
    feedback = mx.random.uniform(shape=(samples, GRANULARITIES), key=mx.random.key(1))
    together = loss(logits, feedback)
    assert together.shape == (samples,)
    for row in range(samples):
        alone = loss(logits[row : row + 1], feedback[row : row + 1]).item()
        assert together[row].item() == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("loss", [ranking_loss, choice_loss])
def test_gradient_by_finite_differences(loss):
    """Away from the hinges' kinks, which this seed's numbers are."""
    rng = np.random.default_rng(3)
    logits, feedback = rng.normal(size=(2, GRANULARITIES)), mx.array(rng.uniform(size=(2, GRANULARITIES)))

    def value(x) -> float:
        return loss(mx.array(x), feedback).sum().item()

    gradient = np.array(mx.grad(lambda x: loss(x, feedback).sum())(mx.array(logits)))
    assert np.abs(gradient).max() > 0.05
    step = 1e-2
    for place in np.ndindex(logits.shape):
        up, down = logits.copy(), logits.copy()
        up[place] += step
        down[place] -= step
        assert gradient[place] == pytest.approx((value(up) - value(down)) / (2 * step), abs=1e-3)


def test_token_losses_are_float32_whatever_the_logits():
    logits = mx.array([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    expected = [math.log(math.exp(1) + math.exp(2) + math.exp(3)) - 2, math.log(3)]
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        losses = token_losses(logits.astype(dtype), mx.array([1, 0]))
        assert losses.dtype == mx.float32
        np.testing.assert_allclose(np.array(losses), expected, rtol=1e-5)
