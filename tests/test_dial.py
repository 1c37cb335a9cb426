"""The dial and the calibration, from answers that are there already."""

import json
import math

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from avg_mlx import InputError, evaluate, read_questions
from avg_mlx.cli.evaluate import main
from avg_mlx.evaluation.calibration import calibrate, calibration_table
from avg_mlx.evaluation.dial import COSTS, Dial, dial_table, turned
from avg_mlx.evaluation.results import Attempt, Result
from avg_mlx.weights.demo import demo_model

LEVELS = (1, 4, 16)
MODES = ["adaptive", "1", "4", "16"]


def result(router, correct, tokens=(3, 10, 40), losses=None, levels=LEVELS) -> Result:
    """A question whose answers at each granularity are right or wrong."""
    attempts = [
        Attempt(g, "", right, count, 1, 0.1, 0.1) for g, right, count in zip(levels, correct, tokens, strict=True)
    ]
    chosen = {str(g): g for g in levels} | {"adaptive": levels[int(np.argmax(router))]}
    seconds = {"preprocess": 0.0, "vision": 0.0, "router": 0.0}
    return Result(
        "", "", "", [""], None, list(levels), list(router), losses, max(tokens), seconds, attempts, chosen, key=""
    )


# Two questions: one needs a close look and the router knows it, one does not.
TWO = [
    result((0.1, 0.2, 0.7), (False, False, True), losses=[3.0, 2.0, 1.0]),
    result((0.2, 0.3, 0.5), (True, True, True), losses=[0.5, 0.5, 0.5]),
]


def test_at_0_the_choices_are_the_routers_own():
    assert Dial.of(TWO).at(0)["visual_tokens"] == 40
    assert Dial.of(TWO).choices(0).tolist() == [2, 2]


def test_a_price_is_weighed_against_log_probabilities():
    """The second question gives up the finest where λ (1 - 1/4) exceeds log 0.5/0.3."""
    dial, edge = Dial.of(TWO), math.log(0.5 / 0.3) / (1 - 10 / 40)
    assert dial.choices(edge * 0.999).tolist() == [2, 2]
    assert dial.choices(edge * 1.001).tolist() == [2, 1]
    assert dial.choices(1e6).tolist() == [0, 0]
    at = dial.at(edge * 1.001)
    assert (at["accuracy"], at["visual_tokens"]) == (1, 25)
    assert at["reduction"] == pytest.approx(1 - 50 / 80)
    assert at["shares"] == {"1": 0, "4": 0.5, "16": 0.5}


shares = st.lists(st.floats(0.01, 1), min_size=3, max_size=3).map(lambda x: [one / sum(x) for one in x])
rights = st.tuples(st.booleans(), st.booleans(), st.booleans())
counts = st.lists(st.integers(1, 500), min_size=3, max_size=3).map(sorted)


@given(st.lists(st.builds(result, shares, rights, counts), min_size=1, max_size=8))
def test_a_higher_cost_never_takes_more_tokens(results):
    tokens = [Dial.of(results).at(cost)["visual_tokens"] for cost in COSTS]
    assert tokens == sorted(tokens, reverse=True)


def test_targets_name_the_cheapest_cost_that_reaches_them():
    dial = Dial.of(TWO)
    accurate, frugal = dial.reach_accuracy(1.0), dial.reach_tokens(25)
    assert accurate["accuracy"] == 1
    assert all(dial.at(cost)["accuracy"] < 1 for cost in COSTS if cost > accurate["token_cost"])
    assert frugal["visual_tokens"] <= 25
    assert all(dial.at(cost)["visual_tokens"] > 25 for cost in COSTS if cost < frugal["token_cost"])


def test_targets_out_of_reach_are_told_and_lose_nothing():
    dial = turned([result((0.1, 0.2, 0.7), (False, True, False))] * 2, [0, 1], accuracy=1.01, tokens=2)
    text = dial_table(dial)
    assert "no token cost reaches an accuracy of 1.01; the best is 1.0000." in text
    assert "no token cost comes down to 2 visual tokens; the fewest are 3.0." in text
    assert len(dial["costs"]) == 2


def test_answers_at_all_granularities_are_needed():
    lacking = result((0.5, 0.5), (True, True), (3, 10), levels=(1, 4))
    lacking.granularities.append(16)
    with pytest.raises(InputError, match="16 are missing"):
        Dial.of([lacking])


def test_calibration():
    results = [
        result((0.8, 0.1, 0.1), (True, True, True), losses=[1.0, 1.0, 1.0]),
        result((0.84, 0.06, 0.1), (False, True, True), losses=[2.0, 1.0, 1.5]),
        result((0.3, 0.36, 0.34), (False, False, False), losses=[1.0, 1.0, 2.0]),
    ]
    found = calibrate(results, MODES)
    assert [(one["from"], one["questions"], one["as_good"]) for one in found["bins"]] == [(0.3, 1, 1), (0.8, 2, 0.5)]
    assert found["bins"][1]["confidence"] == pytest.approx(0.82)
    assert found["expected_calibration_error"] == pytest.approx((abs(1 - 0.36) + 2 * abs(0.5 - 0.82)) / 3)
    assert found["regret"] == pytest.approx(1 / 3)
    assert found["expected_regret"] == pytest.approx((0 + 0.84 + 0.1 * 0.5 + 0.34) / 3)
    assert "as good as the finest 66.7% of the time" in calibration_table(found)
    assert calibrate(results, ["1", "4", "16"]) is None
    assert calibrate(results, ["adaptive", "1"]) is None


def test_an_evaluation_turns_the_dial_without_asking_again(tmp_path, capsys, monkeypatch):
    sample = ROOT / "tests" / "demo" / "questions.jsonl"
    asked = ["--model", "demo", "--data", str(sample), "--limit", "12", "--output", str(tmp_path / "out")]
    assert main(asked) == 0
    plain = capsys.readouterr().out
    answers = (tmp_path / "out" / "answers.jsonl").read_bytes()
    monkeypatch.setattr("avg_mlx.evaluation.answering.decode", lambda *_: pytest.fail("it was asked again"))
    assert main([*asked, "--token-costs", "0", "1000", "--target-tokens", "1e9"]) == 0
    turned = capsys.readouterr().out
    assert turned.startswith(plain)
    assert "--token-cost 0 gives at most 1000000000.0 visual tokens." in turned
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == answers
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    free, dear = summary["dial"]["costs"]
    for name in ("accuracy", "visual_tokens", "shares"):
        assert free[name] == pytest.approx(summary["modes"]["adaptive"][name])
        assert dear[name] == pytest.approx(summary["modes"]["1"][name])
    assert (tmp_path / "out" / "reliability.png").is_file()


def test_modes_that_the_dial_needs_are_named_before_anything_is_asked(tmp_path):
    from avg_mlx import load

    questions, _ = read_questions(ROOT / "tests" / "demo" / "questions.jsonl", limit=1)
    with pytest.raises(InputError, match="add 4, 100 to modes"):
        evaluate(*load(demo_model()), questions, tmp_path / "out", modes=["adaptive", 1, 25, 50], token_costs=[1])
    assert not (tmp_path / "out").exists()
