"""Which samples make which step."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from avg_mlx.training.plan import Plan, split

lengths = st.lists(st.integers(1, 1000), min_size=1, max_size=200)
sizes = st.integers(1, 9)


def epoch_of(plan: Plan, epoch: int) -> list[list[int]]:
    first = epoch * plan.steps_per_epoch
    return [plan.batch(step) for step in range(first, first + plan.steps_per_epoch)]


@given(lengths, sizes, st.integers(0, 3))
def test_every_sample_once_an_epoch(lengths, size, epoch):
    batches = epoch_of(Plan(lengths, size, seed=0), epoch)
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))


@given(lengths, sizes)
def test_only_one_batch_may_be_smaller(lengths, size):
    counts = sorted(map(len, epoch_of(Plan(lengths, size, seed=0), 0)))
    assert counts[1:] == [size] * (len(counts) - 1)
    assert counts[0] == (len(lengths) - 1) % size + 1


@given(lengths, sizes, st.integers(0, 5), st.randoms())
def test_a_step_does_not_depend_on_what_was_asked_before(lengths, size, seed, random):
    steps = list(range(3 * Plan(lengths, size, seed).steps_per_epoch))
    in_order = [Plan(lengths, size, seed).batch(step) for step in steps]
    shuffled, plan = random.sample(steps, len(steps)), Plan(lengths, size, seed)
    assert {step: plan.batch(step) for step in shuffled} == dict(enumerate(in_order))


@pytest.fixture
def plan() -> Plan:
    return Plan(np.random.default_rng(0).integers(1, 3000, 400).tolist(), 8, seed=0)


def test_epochs_differ(plan):
    assert epoch_of(plan, 0) != epoch_of(plan, 1)


def test_seeds_differ(plan):
    assert epoch_of(plan, 0) != epoch_of(Plan(plan.lengths.tolist(), 8, seed=1), 0)


def test_batches_are_of_similar_lengths(plan):
    """Padding to each batch's longest costs a few per cent; merely shuffled, it would be most of the work again."""
    batches = epoch_of(plan, 0)
    padded = sum(len(batch) * plan.lengths[batch].max() for batch in batches)
    assert padded / plan.lengths.sum() < 1.1


def test_short_batches_do_not_come_first(plan):
    means = [plan.lengths[batch].mean() for batch in epoch_of(plan, 0)]
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.5


@given(st.integers(2, 300), st.floats(0, 1), st.integers(0, 5))
def test_split_is_disjoint_and_complete(samples, fraction, seed):
    learned, held_out = split(samples, fraction, seed)
    assert sorted(learned + held_out) == list(range(samples))
    assert learned
    assert (learned, held_out) == split(samples, fraction, seed)
    assert (len(held_out) > 0) == (fraction > 0)
    if 1 <= round(samples * fraction) < samples:
        assert len(held_out) == round(samples * fraction)


def test_nothing_is_held_out_of_a_single_sample():
    assert split(1, 0.5, seed=0) == ([0], [])


def test_split_differs_between_seeds():
    assert split(100, 0.2, seed=0) != split(100, 0.2, seed=1)
