"""`avg-mlx evaluate`: modes, answers, times, resuming, and what the table says of them."""

import errno
import json
import os
import re
import shutil
import signal
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import conversation, make_adapters, write_samples
from PIL import Image

from avg_mlx import (
    Answer,
    AvgMlxError,
    InputError,
    Question,
    convert,
    evaluate,
    generate,
    load,
    read_questions,
    route,
)
from avg_mlx.cli import progress
from avg_mlx.cli.evaluate import main
from avg_mlx.errors import Interrupted
from avg_mlx.evaluation import plot, run
from avg_mlx.evaluation.modes import granularity_of
from avg_mlx.evaluation.results import Attempt, Result
from avg_mlx.evaluation.summary import summarize, table, wilson
from avg_mlx.training.data import read_samples
from avg_mlx.training.forward import feedback_losses, load_crops

GRANULARITIES = [1, 2, 4, 8, 16]
MODES = ["adaptive", "1", "2", "4", "8", "16", "random", "oracle"]
MAX_TOKENS = 4
FEW = ["2", "random"]  # modes, where any would do
ASKED = [("wide.png", "What is this?"), ("wide.png", "A dog?"), ("tall.png", "Read it."), ("small.png", "Why?")] + [
    ("large.png", f"How many of {n}?") for n in range(4)
]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A folder with images."""
    return write_samples(tmp_path_factory.mktemp("questions"), []).parent


@pytest.fixture(scope="module")
def generated(tiny, images) -> list[dict[int, Answer]]:
    """What `generate` answers to each question at each granularity."""
    return [
        {g: generate(*tiny, question, images / image, granularity=g, max_tokens=MAX_TOKENS) for g in GRANULARITIES}
        for image, question in ASKED
    ]


@pytest.fixture(scope="module")
def file(images, generated) -> Path:
    """Questions that accept what the model answers at one granularity, in capitals, and another answer."""
    file = images / "questions.jsonl"
    with file.open("w") as stream:
        for n, (image, question) in enumerate(ASKED):
            answers = ["xyz", generated[n][GRANULARITIES[n % 5]].text.upper()]
            record = {"id": f"q{n}", "image": image, "question": question, "answers": answers}
            stream.write(json.dumps(record | {"category": ("even", "odd")[n % 2]}) + "\n")
    return file


@pytest.fixture(scope="module")
def questions(file) -> list[Question]:
    return read_questions(file)[0]


@pytest.fixture(scope="module")
def whole(tiny, questions, tmp_path_factory):
    """(evaluation in all modes, its folder)."""
    folder = tmp_path_factory.mktemp("evaluation") / "whole"
    return evaluate(*tiny, questions, folder, max_tokens=MAX_TOKENS), folder


@pytest.fixture(scope="module")
def part(tiny, questions, tmp_path_factory):
    """(evaluation in a FEW modes, its folder)."""
    folder = tmp_path_factory.mktemp("evaluation") / "part"
    return evaluate(*tiny, questions, folder, max_tokens=MAX_TOKENS, modes=FEW), folder


@pytest.fixture
def ask(tiny, questions, tmp_path):
    """`ask(...)`: an evaluation in a new folder, or in one given as `output`."""

    def ask(questions=questions, model=tiny[0], output=tmp_path / "out", **options):
        return evaluate(model, tiny[1], questions, output, **{"max_tokens": MAX_TOKENS} | options)

    return ask


@pytest.fixture
def answered(monkeypatch):
    """Ids of the questions that were answered, those for warming up among them."""
    ids = []
    answer = run.Answerer.answer
    monkeypatch.setattr(run.Answerer, "answer", lambda self, q: ids.append(q.id) or answer(self, q))
    return ids


@pytest.fixture
def command(tiny_folder, file, tmp_path) -> list:
    """The command line of the same evaluation, into a new folder."""
    return ["--model", tiny_folder, "--data", file, "--output", tmp_path / "out", "-m", MAX_TOKENS]


def lines_of(folder: Path) -> list[dict]:
    """The results' lines."""
    return [json.loads(line) for line in (folder / "answers.jsonl").read_bytes().splitlines()]


def untimed(lines: list[dict]) -> list[dict]:
    """Lines without their seconds."""
    lines = json.loads(json.dumps(lines))
    for line in lines:
        assert line.pop("seconds").keys() == {"preprocess", "vision", "router"}
        for attempt in line["attempts"]:
            assert attempt.pop("prefill") > 0
            assert attempt.pop("generation") > 0
    return lines


def run_main(command: list, *more) -> int:
    return main([str(argument) for argument in [*command, *more]])


# What is answered, and which answer is whose


def test_there_is_a_line_for_every_question_that_says_what_was_asked(whole, questions):
    lines = lines_of(whole[1])
    for line, q in zip(lines, questions, strict=True):
        assert (line["id"], line["image"], line["question"]) == (q.id, q.image, q.question)
        assert (line["accepted"], line["category"]) == (list(q.answers), q.category)
        assert line["granularities"] == [attempt["granularity"] for attempt in line["attempts"]] == GRANULARITIES
        assert list(line["chosen"]) == MODES
    assert lines == [result.to_dict() for result in whole[0].results]


def test_answers_and_tokens_are_those_of_generate_at_each_granularity(whole, generated):
    for result, expected in zip(whole[0].results, generated, strict=True):
        for attempt in result.attempts:
            answer = expected[attempt.granularity]
            assert (attempt.answer, attempt.new_tokens) == (answer.text, len(answer.token_ids))
            assert attempt.visual_tokens == answer.views[0].visual_tokens
            assert result.visual_tokens_finest == answer.views[0].visual_tokens_finest


def test_granularities_take_turns_at_being_first(ask, questions, monkeypatch):
    """What wakes the language model up falls on all alike."""
    orders = []
    attempt = run.Answerer._attempt
    monkeypatch.setattr(run.Answerer, "_attempt", lambda self, *args: orders.append(args[-1]) or attempt(self, *args))
    ask(modes=[str(g) for g in GRANULARITIES])
    rounds = [orders[n : n + len(GRANULARITIES)] for n in range(0, len(orders), len(GRANULARITIES))]
    assert len(rounds) == len(questions) + 1  # one to warm up
    assert len({order[0] for order in rounds}) > 1
    for order in rounds:
        first = GRANULARITIES.index(order[0])
        assert order == GRANULARITIES[first:] + GRANULARITIES[:first]


def test_an_answer_ends_where_the_model_ends_it(ask, questions, generated, tiny, monkeypatch):
    whole = generated[0][16]
    stop = whole.token_ids[2]
    assert stop not in whole.token_ids[:2]
    monkeypatch.setattr(tiny[1], "_eos_token_ids", {stop})
    expected = generate(*tiny, questions[0].question, questions[0].file, granularity=16, max_tokens=MAX_TOKENS)
    [attempt] = ask(questions[:1], modes=["16"]).results[0].attempts
    assert attempt.new_tokens == len(expected.token_ids) == 3
    assert attempt.answer == expected.text != whole.text


def test_fixed_modes_take_their_own_granularity(whole):
    for result in whole[0].results:
        for granularity in GRANULARITIES:
            assert result.attempt(str(granularity)).granularity == granularity


def test_the_adaptive_mode_is_the_routers(whole, questions, tiny):
    for result, q in zip(whole[0].results, questions, strict=True):
        routing = route(*tiny, q.question, q.file)[0].routing
        assert result.router == pytest.approx(routing.probabilities, abs=1e-6)
        assert result.chosen["adaptive"] == routing.choice


def test_the_oracle_has_the_least_feedback_loss_of_the_first_answer(whole, questions, tiny, file):
    records = [
        {"id": q.id, "image": q.image, "conversations": conversation(f"<image>\n{q.question}", q.answers[0])}
        for q in questions
    ]
    data = file.with_name("as-training.json")
    data.write_text(json.dumps(records))
    model, tokenizer = tiny
    for result, sample in zip(whole[0].results, read_samples(data, None, tokenizer, model.config), strict=True):
        crops = load_crops(model, sample)
        losses = feedback_losses(model, sample, [model.encode(c) for c in crops], crops)
        assert result.losses == pytest.approx(losses, abs=1e-5)
        assert result.chosen["oracle"] == GRANULARITIES[int(np.argmin(losses))]
    assert len({result.chosen["oracle"] for result in whole[0].results}) > 1


def test_chance_depends_on_seed_and_question_alone(whole, questions, ask, tmp_path):
    expected = {result.id: result.chosen["random"] for result in whole[0].results}
    assert len(set(expected.values())) > 1
    backwards = ask(questions[::-1], modes=["random"])
    assert {result.id: result.chosen["random"] for result in backwards.results} == expected
    part = ask(questions[3:6], modes=["random"], output=tmp_path / "part")
    assert [result.chosen["random"] for result in part.results] == [expected[q.id] for q in questions[3:6]]
    other = ask(modes=["random"], seed=1, output=tmp_path / "other")
    assert {result.id: result.chosen["random"] for result in other.results} != expected


def test_chance_is_fair():
    draws = Counter(granularity_of("random", GRANULARITIES, None, None, 0, str(key)) for key in range(5000))
    assert all(900 < draws[granularity] < 1100 for granularity in GRANULARITIES)


def test_only_what_the_modes_need_is_computed(ask, questions, tiny, monkeypatch, tmp_path):
    result = ask(questions[:1], modes=["adaptive"]).results[0]
    assert [attempt.granularity for attempt in result.attempts] == [result.chosen["adaptive"]]
    assert result.losses is None
    monkeypatch.setattr(type(tiny[0]), "route", None)
    result = ask(questions[:1], modes=["4", "random"], output=tmp_path / "other").results[0]
    assert [attempt.granularity for attempt in result.attempts] == sorted({4, result.chosen["random"]})
    assert (result.router, result.seconds["router"]) == (None, 0)


def test_an_image_passes_the_vision_tower_once_for_its_consecutive_questions(ask, passes):
    results = ask(modes=["1"]).results
    assert passes == [3, *(3, 3, 3, 5)]  # crops; the first pass is for warming up
    assert results[0].seconds["vision"] == results[1].seconds["vision"] > 0
    assert len({result.seconds["vision"] for result in results}) == 4


# Times and totals


def made(correct: list[bool], chosen: dict[str, int], seconds=(1.0, 2.0, 4.0), **keys) -> Result:
    """A result made by hand, of granularities 1, 4 and 16 that take as many visual tokens and milliseconds."""
    attempts = [Attempt(g, "x", right, g, 2, g / 10, g / 100) for g, right in zip((1, 4, 16), correct, strict=True)]
    stages = dict(zip(("preprocess", "vision", "router"), seconds, strict=True))
    modes = {"1": 1, "4": 4, "16": 16, **chosen}
    fixed = {"router": None, "losses": None, "category": None, "visual_tokens_finest": 16} | keys
    keys = fixed | {"granularities": [4, 1, 16], "seconds": stages, "attempts": attempts, "chosen": modes}
    return Result("q", "i", "?", ["x"], key="k", **keys)


def test_a_modes_time_is_that_of_its_own_stages():
    result = made([True, True, True], {"adaptive": 4, "random": 4, "oracle": 4})
    for mode in ("4", "random", "oracle"):
        assert result.time_to_first_token(mode) == pytest.approx(1 + 2 + 0.4)
        assert result.total_time(mode) == pytest.approx(1 + 2 + 0.4 + 0.04)
    assert result.time_to_first_token("adaptive") == pytest.approx(1 + 2 + 4 + 0.4)
    assert result.total_time("adaptive") == pytest.approx(1 + 2 + 4 + 0.4 + 0.04)


def summary_by_hand(skipped: int = 0, modes=("adaptive", "1", "4", "16"), categories=("a", "b", "a", None)) -> dict:
    results = [
        made([True, True, True], {"adaptive": 1}, category=categories[0]),
        made([False, True, True], {"adaptive": 1}, category=categories[1]),
        made([False, True, False], {"adaptive": 4}, category=categories[2]),
        made([False, False, True], {"adaptive": 16}, category=categories[3]),
    ]
    settings = {"model": "m", "modes": list(modes), "seed": 3, "max_tokens": 32}
    return json.loads(json.dumps(summarize(results, settings, skipped)))


def test_summary_of_results_made_by_hand():
    summary = summary_by_hand()
    assert (summary["questions"], summary["skipped"], summary["visual_tokens_finest"]) == (4, 0, 16)
    one = summary["modes"]["adaptive"]
    assert (one["correct"], one["accuracy"]) == (3, 0.75)
    assert one["categories"] == {
        "a": {"questions": 2, "accuracy": 1.0, "shares": {"1": 0.5, "4": 0.5, "16": 0.0}},
        "b": {"questions": 1, "accuracy": 0.0, "shares": {"1": 1.0, "4": 0.0, "16": 0.0}},
    }
    assert one["visual_tokens"] == (1 + 1 + 4 + 16) / 4
    assert one["reduction"] == pytest.approx(1 - 22 / 64)
    assert one["time_to_first_token"] == pytest.approx(7 + 0.55)
    assert one["total_time"] == pytest.approx(7 + 0.55 + 0.055)
    assert one["time_to_first_token_ratio"] == pytest.approx(7.55 / 4.6)
    assert one["total_time_ratio"] == pytest.approx(7.605 / 4.76)
    assert one["shares"] == {"1": 0.5, "4": 0.25, "16": 0.25}
    assert {mode: one["accuracy"] for mode, one in summary["modes"].items()} == {
        "adaptive": 0.75,
        "1": 0.25,
        "4": 0.75,
        "16": 0.75,
    }
    assert summary["modes"]["16"]["reduction"] == 0
    assert summary["modes"]["16"]["total_time_ratio"] == 1


def test_the_table_is_the_summary_in_markdown():
    *rows, blank, told, _ = table(summary_by_hand(skipped=2)).splitlines()
    assert [re.sub(" +", " ", row) for row in rows if "---" not in row] == [
        "| mode | accuracy | 95 % interval | a | b | visual tokens | reduction | first token | total | 1 | 4 | 16 |",
        "| adaptive | 75.0% | 30.1–95.4% | 100.0% | 0.0% | 5.5 | 65.6% | 1.64× | 1.60× | 50.0% | 25.0% | 25.0% |",
        "| 1 | 25.0% | 4.6–69.9% | 50.0% | 0.0% | 1.0 | 93.8% | 0.67× | 0.65× | 100.0% | | |",
        "| 4 | 75.0% | 30.1–95.4% | 100.0% | 100.0% | 4.0 | 75.0% | 0.74× | 0.72× | | 100.0% | |",
        "| 16 | 75.0% | 30.1–95.4% | 50.0% | 100.0% | 16.0 | 0.0% | 1.00× | 1.00× | | | 100.0% |",
    ]
    assert len({len(row) for row in rows}) == 1
    assert blank == ""
    for fact in ("4 questions, 2 more left out", "seed 3", "mode 16", "4.6000 s and 4.7600 s"):
        assert fact in told


def test_without_the_finest_mode_there_are_no_ratios():
    summary = summary_by_hand(modes=("adaptive", "4"))
    assert summary["modes"]["adaptive"]["total_time_ratio"] is None
    lines = table(summary).splitlines()
    assert re.search(r" 65\.6% \| +\| +\| +50\.0% ", lines[2])
    assert lines[-2].startswith("4 questions; seed 3.")
    assert "mode 16" in lines[-2]


def test_many_categories_have_no_columns(whole):
    categories = [f"c{n}" for n in range(4)]
    assert re.search(r"\| +c0 \| +c1 \| +c2 \| +c3 \|", table(summary_by_hand(categories=categories)))
    results = [made([True] * 3, {}, category=f"c{n}") for n in range(7)]
    summary = summarize(results, {"modes": ["1"], "seed": 0}, 0)
    assert len(summary["modes"]["1"]["categories"]) == 7
    assert "c0" not in table(summary)


@pytest.mark.parametrize(
    ("correct", "questions", "interval"),
    [(0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0)), (81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605))],
)
def test_wilsons_interval_is_the_literatures(correct, questions, interval):
    """The last two: R. G. Newcombe, Statistics in Medicine 17 (1998), table I."""
    assert wilson(correct, questions) == pytest.approx(interval, abs=5e-5)


def test_accuracy_recomputed_without_the_evaluations_code(whole):
    """From the answers' lines and the table's text alone."""
    _, folder = whole
    rows = [re.split(r" *\| *", line.strip("| ")) for line in (folder / "table.md").read_text().splitlines()[:10]]
    told = {row[0]: dict(zip(rows[0], row, strict=False)) for row in rows[2:]}
    rights = {mode: [] for mode in MODES}
    tokens = dict.fromkeys(MODES, 0)
    finest = 0
    for line in lines_of(folder):
        finest += max(attempt["visual_tokens"] for attempt in line["attempts"])
        at = {attempt["granularity"]: attempt for attempt in line["attempts"]}
        for mode in MODES:
            attempt = at[int(mode) if mode.isdigit() else line["chosen"][mode]]
            rights[mode].append(attempt["answer"].lower() in [accepted.lower() for accepted in line["accepted"]])
            tokens[mode] += attempt["visual_tokens"]
    for mode in MODES:
        assert told[mode]["accuracy"] == f"{100 * sum(rights[mode]) / len(ASKED):.1f}%"
        assert told[mode]["even"] == f"{100 * sum(rights[mode][::2]) / 4:.1f}%"
        assert told[mode]["odd"] == f"{100 * sum(rights[mode][1::2]) / 4:.1f}%"
        assert told[mode]["visual tokens"] == f"{tokens[mode] / len(ASKED):.1f}"
        assert told[mode]["reduction"] == f"{100 * (1 - tokens[mode] / finest):.1f}%"
    assert all(0 < sum(rights[mode]) < len(ASKED) for mode in map(str, GRANULARITIES))


def test_the_folder_has_table_summary_and_picture_of_the_same(whole):
    evaluation, folder = whole
    assert sorted(path.name for path in folder.iterdir()) == [
        "accuracy.png",
        "answers.jsonl",
        "choices.png",
        "reliability.png",
        "run.json",
        "summary.json",
        "table.md",
    ]
    assert json.loads((folder / "summary.json").read_text()) == evaluation.summary
    assert (folder / "table.md").read_text() == evaluation.table
    assert list(evaluation.summary["modes"]) == MODES
    with Image.open(folder / "accuracy.png") as picture:
        assert picture.format == "PNG"


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The figures that are saved."""
    from matplotlib.figure import Figure

    figures: list = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: (figures.append(figure), file.touch()))
    return figures


def near(numbers: dict[str, tuple[float, int]]) -> dict:
    """A summary of modes of so many visual tokens and right answers of a thousand."""
    modes = {
        mode: {"visual_tokens": tokens, "accuracy": right / 1000, "interval": wilson(right, 1000)}
        for mode, (tokens, right) in numbers.items()
    }
    return {"questions": 1000, "modes": modes}


CROWDS = {
    "by hand": summary_by_hand(),
    "one mode": near({"36": (200, 500)}),
    "all alike": near(dict.fromkeys(("adaptive", "36", "random", "oracle"), (200, 1000))),
    "near each other": near(
        {str(4**n): (58 + n, 902 + n % 3) for n in range(9)} | {"adaptive": (60, 903), "oracle": (62, 904)}
    ),
    "wide apart": near({"1": (1, 0), "random": (700, 480), "oracle": (720, 1000), "576": (3000, 990)}),
}


@pytest.mark.parametrize("name", CROWDS)
def test_the_picture_has_a_named_point_and_an_interval_for_every_mode(name, drawn, tmp_path):
    summary = CROWDS[name]
    assert plot.plot_accuracy(summary, tmp_path / "accuracy.png") == tmp_path / "accuracy.png"
    [axes] = drawn[0].axes
    expected = {mode: (one["visual_tokens"], one["accuracy"]) for mode, one in summary["modes"].items()}
    assert {text.get_text(): text.xy for text in axes.texts if text.get_text()} == expected
    points = {tuple(point) for line in axes.lines for point in line.get_xydata()}
    assert points >= set(expected.values())
    bars = [bar for lines in axes.collections for bar in lines.get_segments()]
    intervals = sorted((one["visual_tokens"], *one["interval"]) for one in summary["modes"].values())
    assert sorted((x, low, high) for (x, low), (_, high) in map(np.ndarray.tolist, bars)) == [
        pytest.approx(interval) for interval in intervals
    ]
    assert axes.get_xscale() == "log"
    assert "log" in axes.get_xlabel()


@pytest.mark.parametrize("name", CROWDS)
def test_no_name_in_the_picture_covers_another_or_a_point(name, drawn, tmp_path):
    plot.plot_accuracy(CROWDS[name], tmp_path / "accuracy.png")
    [axes] = drawn[0].axes
    drawn[0].draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    points = [axes.transData.transform(point) for line in axes.lines for point in line.get_xydata()]
    for n, box in enumerate(boxes):
        assert axes.bbox.x0 <= box.x0 < box.x1 <= axes.bbox.x1
        assert axes.bbox.y0 <= box.y0 < box.y1 <= axes.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:n])
        assert not any(box.contains(*point) for point in points)


def test_the_routers_choices_are_bars_of_each_category_the_coarsest_first(drawn, tmp_path):
    summary = summary_by_hand()
    categories = summary["modes"]["adaptive"]["categories"]
    categories["none"] = {"questions": 0, "accuracy": 0.0, "shares": dict.fromkeys(("1", "4", "16"), 0.0)}
    categories["$a fine one$"] = {"questions": 2, "accuracy": 1.0, "shares": {"1": 0.0, "4": 0.0, "16": 1.0}}
    assert plot.plot_choices(summary, tmp_path / "choices.png") == tmp_path / "choices.png"
    [axes] = drawn[0].axes
    order = ["b", "a", "$a fine one$"]
    labels = [label.get_text().replace("\\", "") for label in axes.get_yticklabels()]
    assert labels == [f"{name} ({categories[name]['questions']})" for name in order]
    assert axes.yaxis_inverted()
    assert [bars.get_label() for bars in axes.containers] == ["1", "4", "16"]
    for bars in axes.containers:
        assert [bar.get_width() for bar in bars] == [categories[name]["shares"][bars.get_label()] for name in order]
    assert [text.get_text() for text in axes.texts if text.get_text()] == ["100%", "50%", "50%", "100%"]
    assert plot.plot_choices({**summary, "modes": {}}, tmp_path / "none.png") is None


def test_without_the_plotting_library_there_is_no_picture(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot.plot_accuracy(summary_by_hand(), tmp_path / "accuracy.png") is None
    assert plot.plot_choices(summary_by_hand(), tmp_path / "choices.png") is None
    assert list(tmp_path.iterdir()) == []


# Resuming


@pytest.mark.parametrize("cut", [0.0, 0.001, 0.5, 0.77, 0.999, 1.0])
def test_a_file_cut_anywhere_is_completed_to_the_same_lines(cut, part, questions, ask, tmp_path, answered):
    evaluation, folder = part
    copy = Path(shutil.copytree(folder, tmp_path / "out"))
    content = (folder / "answers.jsonl").read_bytes()
    (copy / "answers.jsonl").write_bytes(content[: round(cut * len(content))])
    kept = (copy / "answers.jsonl").read_bytes().count(b"\n")
    reports = []
    resumed = ask(modes=FEW, report=lambda *numbers: reports.append(numbers))
    assert (copy / "answers.jsonl").read_bytes().startswith(b"".join(content.splitlines(keepends=True)[:kept]))
    assert untimed(lines_of(copy)) == untimed(lines_of(folder)) == untimed([r.to_dict() for r in resumed.results])
    assert resumed.summary["modes"].keys() == evaluation.summary["modes"].keys()
    left = [q.id for q in questions[kept:]]
    assert answered == [*left[:1], *left]  # the first one also warms up
    assert reports == [(n, len(ASKED)) for n in range(kept, len(ASKED) + 1)]


def test_lines_end_at_line_ends_alone(part, ask, questions, tmp_path, answered):
    """Not at what Python also takes for one, such as U+2028 in an answer."""
    copy = Path(shutil.copytree(part[1], tmp_path / "out"))
    line = lines_of(copy)[0]
    line["attempts"][0]["answer"] = "one\u2028two\x85\r"
    (copy / "answers.jsonl").write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    assert ask(questions[:1], modes=FEW).results[0].attempts[0].answer == "one\u2028two\x85\r"
    assert answered == []


def test_ctrl_c_loses_and_repeats_nothing(command, part, monkeypatch, capsys, tmp_path, answered):
    show = progress.Bar.show

    def interrupt(bar, done, total):
        show(bar, done, total)
        if done == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(progress.Bar, "show", interrupt)
        assert run_main(command, "--modes", *FEW) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("\navg-mlx evaluate: interrupted")
    assert f"3 of {len(ASKED)} questions" in err
    assert "resume" in err
    assert untimed(lines_of(tmp_path / "out")) == untimed(lines_of(part[1]))[:3]
    assert run_main(command, "--modes", *FEW) == 0
    assert untimed(lines_of(tmp_path / "out")) == untimed(lines_of(part[1]))
    assert answered == ["q0", "q0", "q1", "q2", "q3", *(f"q{n}" for n in range(3, len(ASKED)))]


def test_sigterm_is_an_interrupt_too(command, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        progress.Bar, "show", lambda bar, done, total: done == 1 and os.kill(os.getpid(), signal.SIGTERM)
    )
    assert run_main(command, "--modes", *FEW) == 143
    assert f"1 of {len(ASKED)} questions" in capsys.readouterr().err
    assert len(lines_of(tmp_path / "out")) == 1


def test_from_python_an_interrupt_says_how_to_resume(ask):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=f"0 of {len(ASKED)} questions.*resume"):
        ask(modes=["1"], report=interrupt)


def test_a_second_process_is_refused_while_one_writes(ask, questions, command, refused, tmp_path, monkeypatch):
    """The lock is the first one's: a second command that starts meanwhile changes nothing."""
    lines = []

    def start_another(done, total):
        if done == 1:
            lines.append(refused(main, *command, "--modes", "1"))
            monkeypatch.undo()

    results = ask(modes=["1"], report=start_another).results
    assert len(results) == len(lines_of(tmp_path / "out")) == len(ASKED)
    assert "answers.jsonl" in lines[0]
    assert "another process" in lines[0]


def test_more_questions_are_added_and_known_ones_kept(ask, questions, answered):
    ask(questions[:2], modes=FEW)
    ask(questions[:4], modes=FEW)
    assert answered == ["q0", "q0", "q1", "q2", "q2", "q3"]


def test_a_disk_that_fills_is_one_error_and_goes_on_later(ask, questions, tmp_path, monkeypatch):
    append = run.Journal.append

    def fill(journal, *rows):
        if journal.rows:
            journal._stream = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
        append(journal, *rows)

    with monkeypatch.context() as patch:
        patch.setattr(run.Journal, "append", fill)
        with pytest.raises(AvgMlxError, match=r"answers\.jsonl \(No space left.*make room.*resume"):
            ask(questions[:3], modes=["1"])
    assert [line["id"] for line in lines_of(tmp_path / "out")] == ["q0"]
    assert [result.id for result in ask(questions[:3], modes=["1"]).results] == ["q0", "q1", "q2"]


@pytest.mark.parametrize("name", ["write_json", "write_text", "plot_accuracy"])
def test_a_disk_too_full_for_the_table_is_one_error_and_goes_on_later(name, ask, questions, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(run, name, refuse)
        with pytest.raises(AvgMlxError, match=r"cannot write into .*out \(No space left.*make room.*same command"):
            ask(questions[:2], modes=["1"])
    assert not list((tmp_path / "out").glob(".*"))
    assert len(ask(questions[:2], modes=["1"]).results) == 2
    assert (tmp_path / "out" / "table.md").is_file()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"seed": 5}, "seed was 0 and is 5"),
        ({"max_tokens": 9}, "max_tokens was 4 and is 9"),
        ({"modes": ["2", "1"]}, "modes was ['1'] and is ['1', '2']"),
    ],
)
def test_other_options_are_refused_and_leave_everything_alone(options, told, ask, questions, tmp_path, answered):
    ask(questions[:1], modes=["1"])
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    answered.clear()
    with pytest.raises(InputError, match=re.escape(f"out cannot be resumed: {told}.")):
        ask(questions[:1], **{"modes": ["1"]} | options)
    assert answered == []
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("part", ["image_newline", "router"])
def test_another_model_is_refused_also_if_only_its_router_is(part, ask, questions, own_tiny):
    model = own_tiny[0]
    ask(questions[:1], model, modes=["1"])
    if part == "router":
        model.router.voter = model.router.voter + 1
    else:
        model.image_newline = model.image_newline + 1
    with pytest.raises(InputError, match=r"out cannot be resumed: model was '\w+' and is '\w+'\..*output"):
        ask(questions[:1], model, modes=["1"])


def test_other_questions_are_refused(ask, questions):
    ask(questions[:2], modes=["1"])
    with pytest.raises(InputError, match=r"out holds answers to 1 questions .*'q0'.*output"):
        ask(questions[1:], modes=["1"])


@pytest.mark.parametrize("line", ["no json", "{}", "[]", "7", '{"id": "x", "attempts": [{}]}'])
def test_a_line_that_is_no_answer_is_refused_with_its_number(line, ask, questions, tmp_path):
    ask(questions[:1], modes=["1"])
    file = tmp_path / "out" / "answers.jsonl"
    content = file.read_text() + line + "\n"
    file.write_text(content)
    with pytest.raises(InputError, match=r"answers\.jsonl, line 2: .*; choose another output"):
        ask(questions[:1], modes=["1"])
    assert file.read_text() == content


def test_answers_of_nobody_knows_what_are_refused(ask, questions, tmp_path):
    ask(questions[:1], modes=["1"])
    (tmp_path / "out" / "run.json").unlink()
    with pytest.raises(InputError, match=r"answers\.jsonl.* no run\.json .*; choose"):
        ask(questions[:1], modes=["1"])


# What cannot be asked


@pytest.fixture
def spoiled(file, tmp_path) -> Path:
    """A file of three questions: the second's image ends too early, which only its pixels tell."""
    folder = write_samples(tmp_path, []).parent
    content = (folder / "tall.png").read_bytes()
    (folder / "tall.png").write_bytes(content[: len(content) // 2])
    records = [json.loads(line) for line in file.read_text().splitlines()]
    chosen = [records[n] for n in (0, 2, 3)]
    (folder / "spoiled.jsonl").write_text("".join(json.dumps(record) + "\n" for record in chosen))
    return folder / "spoiled.jsonl"


def test_a_damaged_image_is_one_line_and_fixing_it_resumes(spoiled, tiny_folder, tmp_path, refused, answered):
    command = ["--model", tiny_folder, "--data", spoiled, "--output", tmp_path / "out", "-m", 1, "--modes", "2"]
    line = refused(main, *command)
    image = spoiled.parent / "tall.png"
    assert line.startswith(f"avg-mlx evaluate: question 'q2': {image} is damaged")
    assert "--skip-bad" in line
    assert line.endswith("run the same command again to resume")
    assert [line["id"] for line in lines_of(tmp_path / "out")] == ["q0"]
    write_samples(tmp_path, [])
    assert run_main(command) == 0
    assert answered == ["q0", "q0", "q2", *("q2", "q2", "q3")]
    assert [line["id"] for line in lines_of(tmp_path / "out")] == ["q0", "q2", "q3"]


def test_bad_questions_are_counted_listed_and_skipped(spoiled, tiny_folder, tmp_path, capsys):
    with spoiled.open("a") as stream:
        stream.write('nonsense\n{"image": "gone.png", "question": "?", "answer": "x"}\n')
    command = [
        "--model",
        tiny_folder,
        "--data",
        spoiled,
        "--output",
        tmp_path / "out",
        "-m",
        1,
        "--skip-bad",
        "--modes",
        "2",
    ]
    tables = []
    for _ in range(2):  # resuming counts them again
        assert run_main(command, "--skip-bad") == 0
        out, err = capsys.readouterr()
        told = [line for line in err.splitlines() if line]
        assert [re.split(r" \(| is damaged|; ", line)[0] for line in told] == [
            f"left out: {spoiled}, line 4: not valid JSON",
            f"left out: {spoiled}, line 5: there is no image {tmp_path}/gone.png",
            f"left out: question 'q2': {tmp_path}/tall.png",
        ]
        assert "\n2 questions, 3 more left out; seed 0. " in out
        assert out == (tmp_path / "out" / "table.md").read_text()
        assert json.loads((tmp_path / "out" / "summary.json").read_text())["skipped"] == 3
        assert [line["id"] for line in lines_of(tmp_path / "out")] == ["q0", "q3"]
        tables.append(out)
    assert tables[0] == tables[1]


def test_a_question_that_does_not_fit_is_refused_or_skipped(ask, questions, tmp_path):
    long = Question("long", "wide.png", "word " * 600, ("x",), folder=questions[0].folder)
    problem = r"question 'long': at granularity 1, the prompt takes \d+ positions .* 512; shorten it.*"
    with pytest.raises(InputError, match=f"^{problem}skip_bad"):
        ask([questions[0], long], modes=["1"])
    evaluation = ask([questions[0], long], modes=["1"], skip_bad=True, skipped=["before"])
    assert [result.id for result in evaluation.results] == ["q0"]
    assert evaluation.skipped[0] == "before"
    assert re.fullmatch(problem, evaluation.skipped[1])
    with pytest.raises(InputError, match=f"^none of 1 questions .*; {problem}$"):
        ask([long], modes=["1"], skip_bad=True, skipped=["before"], output=tmp_path / "none")
    with pytest.raises(InputError, match=r"^none of 0 questions "):
        ask([], output=tmp_path / "nothing")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "this takes more memory"),
        (AvgMlxError("no"), "no"),
        (KeyError("x"), "unexpected KeyError: 'x'"),
    ],
    ids=str,
)
def test_a_fault_of_any_kind_is_that_of_one_question(error, words, ask, questions, monkeypatch):
    answer = run.Answerer.answer

    def fail(self, question):
        if question.id == "q1":
            raise error
        return answer(self, question)

    monkeypatch.setattr(run.Answerer, "answer", fail)
    with pytest.raises(InputError, match=f"^question 'q1': {words}.*skip_bad.*resume$"):
        ask(questions[:3], modes=["1"])
    evaluation = ask(questions[:3], modes=["1"], skip_bad=True)
    assert [result.id for result in evaluation.results] == ["q0", "q2"]
    assert [problem.startswith(f"question 'q1': {words}") for problem in evaluation.skipped] == [True]


@pytest.mark.parametrize(
    ("changes", "modes", "told"),
    [
        ({"question": "word " * 2_000_000}, ["1"], "the text has "),
        ({"answers": ("word " * 2_000_000,)}, ["oracle"], "as training data: the text has "),
    ],
)
def test_ten_megabytes_of_text_are_not_tokenized(changes, modes, told, ask, questions, encoded):
    long = replace(questions[1], **changes)
    evaluation = ask([questions[0], long], modes=modes, skip_bad=True)
    assert evaluation.skipped[0].startswith(f"question 'q1': {told}")
    assert max(encoded) < 1000


@pytest.mark.parametrize(("modes", "wrong"), [(["adaptive", "576"], "576"), (["best"], "best")])
def test_a_mode_that_the_model_has_not_is_refused(modes, wrong, command, refused, tmp_path):
    line = refused(main, *command, "--modes", *modes)
    assert line.startswith(f"avg-mlx evaluate: mode {wrong} ")
    assert line.endswith("adaptive, 1, 2, 4, 8, 16, random, oracle")
    assert not (tmp_path / "out").exists()


def test_a_granularity_is_a_mode_as_a_number_too(ask, questions):
    assert list(ask(questions[:1], modes=["random", 16, 2]).results[0].chosen) == ["2", "16", "random"]


def test_no_tokens_are_refused_before_an_image_is_looked_at(ask, passes):
    with pytest.raises(InputError, match="max_tokens is 0"):
        ask(max_tokens=0)
    assert passes == []


def test_a_file_in_the_folders_place_is_refused(command, refused, tmp_path):
    (tmp_path / "out").touch()
    line = refused(main, *command)
    assert line.startswith(f"avg-mlx evaluate: {tmp_path}/out is a file;")


@pytest.mark.parametrize(
    "option", [("--limit", "0"), ("--seed", "-1"), ("--max-tokens", "0"), ("--modes",), ("--limit", "x")]
)
def test_bad_usage_is_one_line(option, command, refused):
    assert refused(main, *command, *option).endswith("see avg-mlx evaluate --help")


# The command


def test_the_command_prints_the_table_of_the_modes_asked_for(command, capsys, tmp_path):
    assert run_main(command, "--modes", "2", "adaptive", "1", "--limit", 2, "--seed", 7, "-m", 1) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ((tmp_path / "out" / "table.md").read_text(), "")
    assert [line.split()[1] for line in out.splitlines()[2:5]] == ["adaptive", "1", "2"]
    assert len(lines_of(tmp_path / "out")) == 2
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["settings"] == json.loads((tmp_path / "out" / "run.json").read_text())
    assert (summary["settings"]["seed"], summary["settings"]["max_tokens"]) == (7, 1)


def test_without_a_router_the_adaptive_mode_is_left_out_and_said_to_be(file, tiny_stage3, tmp_path, caplog):
    command = ["--model", tiny_stage3, "--data", file, "--output", tmp_path / "out", "--limit", 1, "-m", 1]
    assert run_main(command) == 0
    assert caplog.messages == ["this model has no router: no adaptive mode, only 1, 2, 4, 8, 16, random, oracle"]
    [line] = lines_of(tmp_path / "out")
    assert list(line["chosen"]) == MODES[1:]
    assert line["router"] is None


def test_one_granularity_is_one_mode(file, tiny_stage3, tmp_path, caplog, refused):
    convert(tiny_stage3, tmp_path / "plain", granularities=[16])
    command = ["--model", tmp_path / "plain", "--data", file, "--output", tmp_path / "out", "--limit", 1, "-m", 1]
    assert refused(main, *command, "--modes", "oracle").endswith("choose from 16")
    assert run_main(command) == 0
    assert caplog.messages == ["this model has no router: no adaptive mode, only 16"]
    assert [list(line["chosen"]) for line in lines_of(tmp_path / "out")] == [["16"]]


def test_the_adaptive_mode_of_a_model_without_a_router_is_refused(file, tiny_stage3, tmp_path, refused):
    command = ["--model", tiny_stage3, "--data", file, "--output", tmp_path / "out", "--modes", "adaptive", "2"]
    line = refused(main, *command)
    assert "no router" in line
    assert line.endswith("1, 2, 4, 8, 16, random, oracle")


def test_adapters_are_put_on_top(command, tiny_folder, tmp_path, file, generated):
    adapters = make_adapters(tiny_folder, tmp_path / "adapters", "full")
    assert run_main(command, "--adapter-path", adapters, "--limit", 1, "--modes", "16") == 0
    image, question = ASKED[0]
    tuned = load(tiny_folder, adapter_path=adapters)
    expected = generate(*tuned, question, file.parent / image, granularity=16, max_tokens=MAX_TOKENS)
    assert expected.text != generated[0][16].text
    assert lines_of(tmp_path / "out")[0]["attempts"][0]["answer"] == expected.text
