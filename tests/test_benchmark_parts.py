"""The parts of `avg-mlx benchmark` that lmms-eval has none in: names, data folders, intervals and tables."""

import importlib.util
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from avg_mlx import AvgMlxError, InputError
from avg_mlx.benchmark.data import local_copy, parquet_files
from avg_mlx.benchmark.intervals import interval_of
from avg_mlx.benchmark.modes import check_modes, default_modes, looking_of, name_of
from avg_mlx.benchmark.paper import PAPER, benchmark_of
from avg_mlx.benchmark.plot import plot_scores, plot_shares
from avg_mlx.benchmark.questions import question_of
from avg_mlx.benchmark.results import Attempt, Result
from avg_mlx.benchmark.run import _questions
from avg_mlx.benchmark.scoring import Score
from avg_mlx.benchmark.summary import summarize, tables
from avg_mlx.cli.benchmark import main
from avg_mlx.evaluation.summary import wilson
from avg_mlx.inference.options import Looking
from avg_mlx.markdown import table

LEVELS = (1, 2, 4, 8, 16)  # of the tiny model


@given(
    st.one_of(
        st.builds(Looking, granularity=st.integers(1, 10_000)),
        st.builds(Looking, max_visual_tokens=st.integers(1, 10_000)),
        st.builds(Looking, token_cost=st.integers(0, 10_000).map(lambda n: n / 1000)),
    )
)
def test_a_modes_name_says_all_of_it(looking):
    assert looking_of(name_of(looking)) == looking


@pytest.mark.parametrize("mode", ["", "random", "36.5", "-1", "cost=", "cost=nan", "cost=-1", "budget=0", "budget=1.5"])
def test_other_names_are_no_modes(mode):
    with pytest.raises(InputError, match="expected adaptive, a granularity, cost=COST or budget=TOKENS"):
        looking_of(mode)


def test_modes_are_those_of_the_model(tiny):
    config = tiny[0].config
    assert default_modes(config) == ["adaptive", "16"]
    modes = check_modes(["adaptive", 4, "4", "cost=0", "cost=0.5", "budget=9"], config)
    assert list(modes) == ["adaptive", "4", "cost=0.5", "budget=9"]
    with pytest.raises(InputError, match=r"granularity is 5.*1, 2, 4, 8, 16"):
        check_modes(["5"], config)


def test_a_model_without_a_router_has_no_adaptive_mode(tiny):
    from dataclasses import replace

    config = replace(tiny[0].config, has_router=False)
    assert default_modes(config) == ["16"]
    with pytest.raises(InputError, match="no router"):
        check_modes(["adaptive"], config)


@pytest.mark.parametrize("place", ["owner/GQA", "lmms-lab/GQA", "GQA"])
def test_a_copy_of_a_data_set_is_found(place, tmp_path):
    assert local_copy(tmp_path, "owner/GQA") is None
    (tmp_path / place).mkdir(parents=True)
    assert local_copy(tmp_path, "owner/GQA") == tmp_path / place


@pytest.mark.parametrize(("place", "config"), [("", None), ("data", None), ("images", "images"), ("data", "images")])
def test_parquet_files_are_sorted_into_splits(place, config, tmp_path):
    (tmp_path / place).mkdir(exist_ok=True)
    names = ["test-00000-of-00002.parquet", "test-00001-of-00002-0a1b2c.parquet", "dev_small.parquet", "notes.txt"]
    for name in names:
        (tmp_path / place / name).touch()
    found = parquet_files(tmp_path, config)
    assert found == {
        "dev_small": [str(tmp_path / place / names[2])],
        "test": [str(tmp_path / place / name) for name in names[:2]],
    }


@given(st.lists(st.booleans(), min_size=1, max_size=50))
def test_shares_of_right_answers_have_wilsons_interval(right):
    items, score = [float(r) for r in right], sum(right) / len(right)
    for given_items in (items, [{"score": item, "id": 1} for item in items]):
        interval = interval_of("exact_match", score, given_items)
        assert [interval.low, interval.high] == wilson(sum(right), len(right))
        assert interval.method == "Wilson"


@given(st.lists(st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0]), min_size=2, max_size=30).filter(lambda v: {*v} - {0, 1}))
def test_means_of_other_numbers_are_drawn_again(values):
    interval = interval_of("anls", float(np.mean(values)), values)
    assert interval.method == "bootstrap"
    assert min(values) - 1e-9 <= interval.low <= interval.high <= max(values) + 1e-9
    assert interval == interval_of("anls", float(np.mean(values)), values)


def test_the_bootstrap_agrees_with_the_normal_distribution():
    values = np.random.default_rng(1).uniform(0, 1, 2000)
    interval = interval_of("anls", values.mean(), values.tolist())
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert interval.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_a_score_that_is_no_mean_of_its_items_has_no_interval():
    assert interval_of("other", 0.9, [0.0, 1.0]) is None
    assert interval_of("other", 0.5, ["a", "b"]) is None
    assert interval_of("other", 0.5, []) is None


def test_mme_counts_pairs_and_adds_categories():
    certain = [
        {"category": category, "question_id": str(n), "score": score}
        for category, score in (("color", 1.0), ("count", 0.0))
        for n in range(5)
        for _ in range(2)
    ]
    interval = interval_of("mme_perception_score", 200.0, certain)
    assert (interval.low, interval.high) == (200.0, 200.0)
    mixed = [*certain, *({"category": "count", "question_id": "x", "score": score} for score in (1.0, 0.0))]
    interval = interval_of("mme_perception_score", 200 + 50 / 6, mixed)
    assert interval.low == 200.0 < 200 + 50 / 6 < interval.high


def test_f1_counts_yes():
    told = [("yes", "yes")] * 40 + [("no", "yes")] * 10 + [("yes", "no")] * 10 + [("no", "no")] * 30
    items = [{"ground_truth": truth, "prediction": said} for truth, said in [*told, ("yes", "perhaps")]]
    interval = interval_of("pope_f1_score", 0.8, items)
    assert 0.65 < interval.low < 0.8 < interval.high < 0.9


def test_mmbench_counts_a_question_in_all_its_orders_once():
    items = [{"index": index} for index in (1, 2, 3, 4, 1_000_001, 2_000_001, 1_000_002)]
    interval = interval_of("gpt_eval_score", 75.0, items)
    assert [interval.low / 100, interval.high / 100] == wilson(3, 4)


def attempt(granularity: int, seconds: float = 1.0, **changes) -> Attempt:
    told = {"answer": "yes", "new_tokens": 1, "prefill": seconds, "generation": 0.0, "source": "router"}
    return Attempt(**{"granularities": [granularity], "visual_tokens": 10 * granularity, **told, **changes})


def result(n: int, **attempts: Attempt) -> Result:
    seconds = {"preprocess": 0.5, "vision": 0.25, "router": 0.25}
    modes = {name.removeprefix("_"): one for name, one in attempts.items()}
    return Result(str(n), "gqa", n, 30, 160, [[0.2] * 5], seconds, modes)


@pytest.fixture
def one(tiny):
    """GQA of three questions, of which the router looks closely at one, and the last passes the context at 16."""
    results = [
        result(0, adaptive=attempt(1, 0.25), _16=attempt(16, 3.25)),
        result(1, adaptive=attempt(16, 3.25), _16=attempt(16, 3.25)),
        result(2, adaptive=attempt(1, 0.25), _16=Attempt.missing("too long")),
    ]
    items = {"adaptive": [1.0, 0.0, 1.0], "16": [1.0, 0.0, 0.0]}
    scores = {
        mode: {"exact_match": Score(sum(one) / 3, interval_of("exact_match", sum(one) / 3, one))}
        for mode, one in items.items()
    }
    return summarize(benchmark_of("gqa"), results, scores, tiny[0].config)


def test_tokens_and_time_are_those_of_answered_questions(one):
    adaptive, finest = one["modes"]["adaptive"], one["modes"]["16"]
    assert (adaptive["unanswered"], finest["unanswered"]) == (0, 1)
    assert (adaptive["visual_tokens"], finest["visual_tokens"]) == (60, 160)
    assert adaptive["reduction"] == 1 - 180 / 480
    assert finest["reduction"] == 0
    assert adaptive["shares"] == {"1": 2 / 3, "2": 0, "4": 0, "8": 0, "16": 1 / 3}
    assert adaptive["total_time"] == pytest.approx((1.25 + 4.25 + 1.25) / 3)
    assert finest["total_time"] == 4.0  # without the router
    assert adaptive["speed_up"] == pytest.approx(8 / 5.5)  # on the two that both answered
    assert finest["speed_up"] == 1


def summary_of(one) -> dict:
    shown = {"lmms_eval": "0.7.3", "modes": ["adaptive", "16"], "granularities": list(LEVELS)}
    return {**shown, "benchmarks": {"gqa": one}, "failed": ["mme is left out: it is not here"]}


def test_the_tables_show_ours_beside_the_papers(one):
    scores, efficiency, *_ = tables(summary_of(one)).split("\n\n")
    assert [cell.strip() for cell in scores.splitlines()[2].split("|")[1:-1]] == [
        "GQA",
        "3",
        "66.7 (20.8–93.9)",
        "33.3 (6.1–79.2)",
        "63.0",
        "64.2",
    ]
    adaptive, finest = ([c.strip() for c in row.split("|")[1:-1]] for row in efficiency.splitlines()[2:])
    assert adaptive[:8] == ["GQA", "adaptive", "60.0", "62.5%", "1.45×", "2.250 s", "2.250 s", ""]
    assert adaptive[8:] == ["66.7%", "", "", "", "33.3%", "80.0%", "1.14×"]
    assert finest[:5] + finest[7:8] + finest[-2:] == ["GQA", "16", "160.0", "0.0%", "1.00×", "1", "", ""]
    assert "mme is left out: it is not here." in tables(summary_of(one))


def test_a_metric_of_the_same_name_in_another_task_is_not_the_papers():
    items = [{"question": n, "score": n % 2} for n in range(10)]
    found = interval_of("gpt_eval_score", 0.5, items, papers=False)
    assert (found.low, found.high) == pytest.approx(wilson(5, 10))


@pytest.mark.parametrize(("scores", "highest"), [((0.2, 0.9), 1), ((0.2, 57.3), 100), ((900.0, 1200.0), 1200)])
def test_scores_that_the_paper_does_not_have_keep_their_scale(tiny, scores, highest):
    modes = {mode: {"novel": Score(score, None)} for mode, score in zip(("adaptive", "16"), scores, strict=True)}
    results = [result(0, adaptive=attempt(1), _16=attempt(16))]
    told = summarize(benchmark_of("other"), results, modes, tiny[0].config)["modes"]
    assert [one["scores"]["novel"]["highest"] for one in told.values()] == [highest] * 2
    assert [one["scores"]["novel"]["score"] for one in told.values()] == list(scores)


def test_a_task_that_cannot_be_asked_says_so():
    def breaks(limit):
        raise KeyError("image")

    task = SimpleNamespace(config=SimpleNamespace(task="odd"), build_all_requests=breaks, instances=[])
    with pytest.raises(AvgMlxError, match="lmms-eval cannot ask odd"):
        _questions(task, None)


@pytest.mark.parametrize(
    ("options", "greedy"), [({"temperature": 0.7, "do_sample": False}, True), ({"temperature": 1}, False)]
)
def test_only_greedy_answers_are_given(options, greedy):
    instance = SimpleNamespace(args=("Why?", None, options, 0, "task", "test"))
    if greedy:
        assert question_of(instance, {}).text == "Why?"
    else:
        with pytest.raises(InputError, match="temperature"):
            question_of(instance, {})


def test_cells_do_not_break_a_table():
    assert table(["name", "n"], [["a|b\nc", 1]]).splitlines()[2] == r"| a\|b c |   1 |"


def test_a_summary_is_json(one):
    assert json.loads(json.dumps(summary_of(one))) == summary_of(one)


def test_pictures(one, tmp_path):
    for plot in (plot_scores, plot_shares):
        file = tmp_path / f"{plot.__name__}.png"
        assert plot(summary_of(one), file) == file
        assert file.read_bytes().startswith(b"\x89PNG")
    nothing = {"modes": ["16"], "granularities": [16], "benchmarks": {}}
    assert plot_scores(nothing, tmp_path / "none.png") is None
    assert plot_shares(nothing, tmp_path / "none.png") is None


def test_the_papers_benchmarks_are_eleven_with_figures():
    assert len({benchmark.task for benchmark in PAPER}) == len(PAPER) == 11
    for benchmark in PAPER:
        assert benchmark.metrics[0].avg_llava
        assert benchmark.metrics[0].llava_next
        assert (benchmark.reduction is None) == (benchmark.speed_up is None)
    assert benchmark_of("my_task").title == "my_task"


def test_without_lmms_eval_a_line_says_how_to_install_it(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = refused(main, "--model", "demo", "--tasks", "paper", "--output", tmp_path / "run", status=1)
    assert "pip install 'avg-mlx[lmms]'" in line
    assert not (tmp_path / "run").exists()


def test_a_mode_that_nobody_knows_is_refused_at_once(refused, tmp_path):
    line = refused(main, "--model", "demo", "--tasks", "paper", "--modes", "fast", "--output", tmp_path / "run")
    assert "mode fast" in line
