"""`avg-mlx evaluate`: modes, answers, times, resuming, and what the table says of them."""

import json
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import conversation, make_adapters, write_samples
from PIL import Image

from avg_mlx import Answer, AvgMlxError, InputError, Question, evaluate, generate, load, read_questions, route
from avg_mlx.cli import progress
from avg_mlx.cli.evaluate import main
from avg_mlx.evaluation import plot, run
from avg_mlx.evaluation.answering import Attempt, Result
from avg_mlx.evaluation.modes import choose
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
    draws = Counter(choose("random", GRANULARITIES, None, None, 0, str(key)) for key in range(5000))
    assert all(900 < draws[granularity] < 1100 for granularity in GRANULARITIES)


def test_only_what_the_modes_need_is_computed(ask, questions, tiny, monkeypatch, tmp_path):
    result = ask(questions[:1], modes=["adaptive"]).results[0]
    assert [attempt.granularity for attempt in result.attempts] == [result.chosen["adaptive"]]
    assert result.losses is None
    monkeypatch.setattr(type(tiny[0]), "route", None)
    result = ask(questions[:1], modes=["4", "random"], output=tmp_path / "other").results[0]
    assert [attempt.granularity for attempt in result.attempts] == sorted({4, result.chosen["random"]})
    assert (result.router, result.seconds["router"]) == (None, 0)


def test_an_image_passes_the_vision_tower_once_for_its_consecutive_questions(ask, questions, tiny, monkeypatch):
    passed = []
    encode = type(tiny[0]).encode
    monkeypatch.setattr(type(tiny[0]), "encode", lambda m, crops: passed.append(crops.image_size) or encode(m, crops))
    results = ask(modes=["1"]).results
    assert passed == [(50, 100), *((50, 100), (90, 40), (30, 30), (112, 112))]  # the first one warms up
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
    assert table(summary_by_hand(skipped=2)).splitlines() == [
        "| mode | accuracy | 95 % interval | a | b | visual tokens | reduction | first token | total | 1 | 4 | 16 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| adaptive | 75.0% | 30.1–95.4% | 100.0% | 0.0% | 5.5 | 65.6% | 1.64× | 1.60× | 50.0% | 25.0% | 25.0% |",
        "| 1 | 25.0% | 4.6–69.9% | 50.0% | 0.0% | 1.0 | 93.8% | 0.67× | 0.65× | 100.0% |  |  |",
        "| 4 | 75.0% | 30.1–95.4% | 100.0% | 100.0% | 4.0 | 75.0% | 0.74× | 0.72× |  | 100.0% |  |",
        "| 16 | 75.0% | 30.1–95.4% | 50.0% | 100.0% | 16.0 | 0.0% | 1.00× | 1.00× |  |  | 100.0% |",
        "",
        "4 questions, 2 more left out; seed 3. Times, to the first token and in all, are means as ratios of mode 16's, "
        "which took 4.6000 s and 4.7600 s.",
        "Columns 1 to 16: how often that granularity was chosen.",
    ]


def test_without_the_finest_mode_there_are_no_ratios():
    summary = summary_by_hand(modes=("adaptive", "4"))
    assert summary["modes"]["adaptive"]["total_time_ratio"] is None
    lines = table(summary).splitlines()
    assert " | 65.6% |  |  | 50.0% |" in lines[2]
    assert lines[-2] == "4 questions; seed 3. Times have nothing to be compared with: mode 16 is not among these."


def test_many_categories_have_no_columns(whole):
    categories = [f"c{n}" for n in range(4)]
    assert "| c0 | c1 | c2 | c3 |" in table(summary_by_hand(categories=categories))
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


def test_the_picture_has_a_named_point_for_every_mode(drawn, tmp_path):
    summary = summary_by_hand()
    assert plot.plot_accuracy(summary, tmp_path / "accuracy.png") == tmp_path / "accuracy.png"
    [axes] = drawn[0].axes
    expected = {mode: (one["visual_tokens"], one["accuracy"]) for mode, one in summary["modes"].items()}
    assert {text.get_text(): text.xy for text in axes.texts} == expected
    points = [tuple(point) for line in axes.lines for point in line.get_xydata()]
    assert sorted(points) == sorted(expected.values())


def test_the_routers_choices_are_bars_of_each_category(drawn, tmp_path):
    summary = summary_by_hand()
    assert plot.plot_choices(summary, tmp_path / "choices.png") == tmp_path / "choices.png"
    [axes] = drawn[0].axes
    categories = summary["modes"]["adaptive"]["categories"]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(categories)
    for bars in axes.containers:
        assert [bar.get_width() for bar in bars] == [one["shares"][bars.get_label()] for one in categories.values()]
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
    assert capsys.readouterr() == ("", "\navg-mlx evaluate: interrupted\n")
    assert untimed(lines_of(tmp_path / "out")) == untimed(lines_of(part[1]))[:3]
    assert run_main(command, "--modes", *FEW) == 0
    assert untimed(lines_of(tmp_path / "out")) == untimed(lines_of(part[1]))
    assert answered == ["q0", "q0", "q1", "q2", "q3", *(f"q{n}" for n in range(3, len(ASKED)))]


def test_more_questions_are_added_and_known_ones_kept(ask, questions, answered):
    ask(questions[:2], modes=FEW)
    ask(questions[:4], modes=FEW)
    assert answered == ["q0", "q0", "q1", "q2", "q2", "q3"]


def test_a_disk_that_fills_is_one_error_and_goes_on_later(ask, questions, tmp_path):
    file, kept = tmp_path / "out" / "answers.jsonl", []

    def fill(done, total):
        if done == 1:
            kept.append(file.read_bytes())
            file.unlink()
            file.symlink_to("/dev/full")

    with pytest.raises(AvgMlxError, match=r"cannot write .*answers\.jsonl \(No space left.*make room.*it goes on"):
        ask(questions[:3], modes=["1"], report=fill)
    file.unlink()
    file.write_bytes(kept[0])
    assert [result.id for result in ask(questions[:3], modes=["1"]).results] == ["q0", "q1", "q2"]


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
    with pytest.raises(InputError, match=re.escape(f"out holds another evaluation: {told}. Set it back, or choose")):
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
    with pytest.raises(InputError, match=r"out holds another evaluation: model was '\w+' and is '\w+'\. Set it back"):
        ask(questions[:1], model, modes=["1"])


def test_other_questions_are_refused(ask, questions):
    ask(questions[:2], modes=["1"])
    with pytest.raises(InputError, match=r"out holds answers to 1 questions that are not among these .*'q0'.*--output"):
        ask(questions[1:], modes=["1"])


@pytest.mark.parametrize("line", ["no json", "{}", "[]", "7", '{"id": "x", "attempts": [{}]}'])
def test_a_line_that_is_no_answer_is_refused_with_its_number(line, ask, questions, tmp_path):
    ask(questions[:1], modes=["1"])
    file = tmp_path / "out" / "answers.jsonl"
    content = file.read_text() + line + "\n"
    file.write_text(content)
    with pytest.raises(InputError, match=r"answers\.jsonl, line 2: not an answer \(.*\); choose another --output"):
        ask(questions[:1], modes=["1"])
    assert file.read_text() == content


def test_answers_of_nobody_knows_what_are_refused(ask, questions, tmp_path):
    ask(questions[:1], modes=["1"])
    (tmp_path / "out" / "run.json").unlink()
    with pytest.raises(InputError, match=r"out holds answers\.jsonl but no run\.json that tells of what; choose"):
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


def test_a_damaged_image_is_one_line_and_mending_it_goes_on(spoiled, tiny_folder, tmp_path, refused, answered):
    command = ["--model", tiny_folder, "--data", spoiled, "--output", tmp_path / "out", "-m", 1, "--modes", "2"]
    line = refused(main, *command)
    image = spoiled.parent / "tall.png"
    assert line.startswith(f"avg-mlx evaluate: question 'q2': {image} is damaged and cannot be decoded (")
    assert line.endswith("mend it, or leave such questions out with --skip-bad, and run it again: it goes on")
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
        assert [re.split(r" \(| is damaged|; is", line)[0] for line in told] == [
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
    problem = "question 'long': it takes \\d+ positions at granularity 1, but the model has 512; shorten it"
    with pytest.raises(InputError, match=f"^{problem}; mend it, or leave"):
        ask([questions[0], long], modes=["1"])
    evaluation = ask([questions[0], long], modes=["1"], skip_bad=True, skipped=["before"])
    assert [result.id for result in evaluation.results] == ["q0"]
    assert evaluation.skipped[0] == "before"
    assert re.fullmatch(problem, evaluation.skipped[1])
    with pytest.raises(InputError, match=f"^none of 1 questions can be asked; {problem}$"):
        ask([long], modes=["1"], skip_bad=True, skipped=["before"], output=tmp_path / "none")
    with pytest.raises(InputError, match=r"^none of 0 questions can be asked$"):
        ask([], output=tmp_path / "nothing")


@pytest.mark.parametrize(
    ("modes", "told"),
    [
        (["adaptive", "576"], "mode 576 is not one of this model's: adaptive, 1, 2, 4, 8, 16, random, oracle"),
        (["best"], "mode best is not one of this model's: adaptive, 1, 2, 4, 8, 16, random, oracle"),
    ],
)
def test_a_mode_that_the_model_has_not_is_refused(modes, told, command, refused, tmp_path):
    assert refused(main, *command, "--modes", *modes) == f"avg-mlx evaluate: {told}"
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_folders_place_is_refused(command, refused, tmp_path):
    (tmp_path / "out").touch()
    assert refused(main, *command) == f"avg-mlx evaluate: {tmp_path}/out is a file; choose a folder for --output"


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
    assert caplog.messages == ["this model has no router (a Stage-3 checkpoint): the adaptive mode is left out"]
    [line] = lines_of(tmp_path / "out")
    assert list(line["chosen"]) == MODES[1:]
    assert line["router"] is None


def test_the_adaptive_mode_of_a_model_without_a_router_is_refused(file, tiny_stage3, tmp_path, refused):
    command = ["--model", tiny_stage3, "--data", file, "--output", tmp_path / "out", "--modes", "adaptive", "2"]
    told = "this model has no router (a Stage-3 checkpoint); choose from 1, 2, 4, 8, 16, random, oracle"
    assert refused(main, *command) == f"avg-mlx evaluate: {told}"


def test_adapters_are_put_on_top(command, tiny_folder, tmp_path, file, generated):
    adapters = make_adapters(tiny_folder, tmp_path / "adapters", "full")
    assert run_main(command, "--adapter-path", adapters, "--limit", 1, "--modes", "16") == 0
    image, question = ASKED[0]
    tuned = load(tiny_folder, adapter_path=adapters)
    expected = generate(*tuned, question, file.parent / image, granularity=16, max_tokens=MAX_TOKENS)
    assert expected.text != generated[0][16].text
    assert lines_of(tmp_path / "out")[0]["attempts"][0]["answer"] == expected.text
