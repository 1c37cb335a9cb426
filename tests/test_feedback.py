"""Feedback: the language model's losses at every granularity, kept in a file."""

import json
from dataclasses import asdict, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import RECORDS, conversation, write_samples
from faults import fill_disk

from avg_mlx.errors import AvgMlxError, InputError, Interrupted
from avg_mlx.journal import Journal
from avg_mlx.model.inventory import fingerprint
from avg_mlx.training import feedback as feedback_module
from avg_mlx.training.data import IGNORED, read_samples, routable
from avg_mlx.training.feedback import Feedback, collect_feedback, summarize
from avg_mlx.training.forward import feedback_losses, instruction_embeddings, load_crops, seen_sample
from avg_mlx.training.options import FeedbackOptions
from avg_mlx.training.stages import make_feedback

KEYS = ["id", "granularities", "losses", "best", "answer_tokens", "router_logits"]  # and hashes


@pytest.fixture(scope="module")
def all_samples(data, tiny):
    model, tokenizer = tiny
    return read_samples(data, None, tokenizer, model.config)


@pytest.fixture(scope="module")
def samples(all_samples):
    return routable(all_samples)


@pytest.fixture(scope="module")
def collected(tiny, samples, tmp_path_factory):
    """(rows, file) of all samples in one go."""
    file = tmp_path_factory.mktemp("feedback") / "feedback.jsonl"
    return collect_feedback(tiny[0], samples, file), file


@pytest.fixture
def counted(monkeypatch):
    """Samples that were measured, as they are."""
    measured = []
    measure = feedback_module._measure

    def count(cache, sample, *rest):
        measured.append(sample.id)
        return measure(cache, sample, *rest)

    monkeypatch.setattr(feedback_module, "_measure", count)
    return measured


def full_pass_loss(model, sample, granularity: int) -> float:
    """The usual next-token loss of one whole pass."""
    crops = load_crops(model, sample)
    seen = seen_sample(model, sample, [model.encode(c) for c in crops], crops)
    logits = model(seen.embeddings(model, [granularity] * len(crops))[None])[0]
    labels: list[int] = []
    images = iter(sample.image_sizes)
    for token, label in zip(sample.ids, sample.labels, strict=True):
        labels += [IGNORED] * model.config.visual_tokens(granularity, next(images)) if token < 0 else [label]
    targets = np.array(labels[1:])
    learned = mx.array(np.flatnonzero(targets != IGNORED))
    return nn.losses.cross_entropy(logits[:-1][learned], mx.array(targets)[learned]).mean().item()


def test_only_samples_with_one_image_are_routable(samples):
    assert [sample.id for sample in samples] == ["one", "turns", "late", "last"]


@pytest.mark.parametrize("name", ["one", "turns", "late", "two", "last"])
def test_what_passes_share_changes_no_loss(name, all_samples, tiny):
    """Also with answers before the image ("late"), and with two images."""
    model = tiny[0]
    sample = next(sample for sample in all_samples if sample.id == name)
    crops = load_crops(model, sample)
    losses = feedback_losses(model, sample, [model.encode(c) for c in crops], crops)
    expected = [full_pass_loss(model, sample, granularity) for granularity in model.config.granularities]
    assert losses == pytest.approx(expected, abs=1e-4)
    assert max(losses) - min(losses) > 1e-3  # granularities matter


def test_the_prefix_passes_once_and_the_head_on_answers_only(samples, tiny, monkeypatch):
    model = tiny[0]
    [sample] = [sample for sample in samples if sample.id == "turns"]
    crops = load_crops(model, sample)
    features = [model.encode(c) for c in crops]
    passed, headed = [], []
    hidden, head = type(model).hidden, type(model).head
    monkeypatch.setattr(
        type(model), "hidden", lambda m, x, cache=None: passed.append(x.shape[1]) or hidden(m, x, cache)
    )
    monkeypatch.setattr(type(model), "head", lambda m, x: headed.append(len(x)) or head(m, x))
    feedback_losses(model, sample, features, crops)
    prefix = sample.ids.index(-200)
    lengths = [sample.positions(model.config, granularity) for granularity in model.config.granularities]
    assert passed == [prefix, *(length - prefix for length in lengths)]
    assert headed == [sample.answer_tokens] * 5


def test_rows_hold_what_was_measured(collected, samples, tiny):
    rows, _ = collected
    model = tiny[0]
    for row, sample in zip(rows, samples, strict=True):
        assert row.granularities == list(model.config.granularities)
        assert row.best == row.granularities[int(np.argmin(row.losses))]
        assert (row.id, row.answer_tokens, row.sample) == (sample.id, sample.answer_tokens, sample.key)
        assert row.model == fingerprint(model)
        features = model.encode(load_crops(model, sample)[0])
        logits = model.route(features, instruction_embeddings(model, sample))
        assert row.router_logits == pytest.approx(logits.tolist(), abs=1e-5)


def test_lines_have_the_keys_and_the_rows_numbers(collected):
    rows, file = collected
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [list(line)[: len(KEYS)] for line in lines] == [KEYS] * len(rows)
    for line, row in zip(lines, rows, strict=True):
        assert {key: line[key] for key in KEYS} == {key: getattr(row, key) for key in KEYS}


def test_without_a_router_there_are_no_logits(samples, own_tiny, collected, tmp_path):
    model = own_tiny[0]
    model.config = replace(model.config, has_router=False)
    del model.router
    rows = collect_feedback(model, samples[:2], tmp_path / "feedback.jsonl")
    assert [row.router_logits for row in rows] == [None, None]
    assert [row.losses for row in rows] == [row.losses for row in collected[0][:2]]
    assert json.loads((tmp_path / "feedback.jsonl").read_text().splitlines()[0])["router_logits"] is None
    assert "router" not in summarize(rows)


# Resuming


@pytest.mark.parametrize("cut", [0.0, 0.001, 0.3, 0.5, 0.77, 0.999, 1.0])
def test_a_file_cut_anywhere_is_completed_to_the_same_bytes(cut, collected, samples, tiny, tmp_path, counted):
    rows, whole = collected
    content = whole.read_bytes()
    file = tmp_path / "feedback.jsonl"
    file.write_bytes(content[: round(cut * len(content))])
    kept = file.read_bytes().count(b"\n")
    reports = []
    assert collect_feedback(tiny[0], samples, file, lambda done, total: reports.append((done, total))) == rows
    assert file.read_bytes() == content
    assert counted == [sample.id for sample in samples[kept:]]
    assert reports == [(done, len(samples)) for done in range(kept, len(samples) + 1)]
    assert [entry.name for entry in tmp_path.iterdir()] == ["feedback.jsonl"]


def test_lines_are_written_as_it_goes(samples, tiny, tmp_path):
    file = tmp_path / "new" / "feedback.jsonl"
    written = []
    collect_feedback(tiny[0], samples, file, lambda done, _: written.append(file.read_bytes().count(b"\n") - done))
    assert written == [0] * (len(samples) + 1)


def test_other_samples_are_added_and_known_ones_kept(samples, tiny, collected, tmp_path, counted):
    file = tmp_path / "feedback.jsonl"
    collect_feedback(tiny[0], samples[2:], file)
    rows = collect_feedback(tiny[0], samples, file)
    assert rows == collected[0]
    assert sorted(counted) == sorted(sample.id for sample in samples)
    assert {json.loads(line)["sample"] for line in file.read_text().splitlines()} == {s.key for s in samples}


@pytest.mark.parametrize("done", range(3))
def test_identical_samples_share_a_line_whenever_it_is_written(done, samples, tiny, collected, tmp_path, counted):
    first, second = samples[:2]
    rows, lines = collected[0], collected[1].read_bytes().splitlines(keepends=True)
    file = tmp_path / "feedback.jsonl"
    file.write_bytes(b"".join(lines[:done]))
    for _ in range(2):
        assert collect_feedback(tiny[0], [first, second, first, first, second], file) == [
            rows[i] for i in (0, 1, 0, 0, 1)
        ]
        assert file.read_bytes() == b"".join(lines[:2])
    assert counted == [first.id, second.id][done:]


def test_feedback_of_other_data_is_refused_and_left_alone(tiny, samples, collected, tmp_path, counted):
    model, tokenizer = tiny
    file = tmp_path / "feedback.jsonl"
    file.write_bytes(collected[1].read_bytes())
    record = RECORDS[0] | {"conversations": conversation("<image>\nWhat is this?", "A dog.")}
    [changed] = read_samples(write_samples(tmp_path, [record]), None, tokenizer, model.config)
    expected = f"holds feedback of 1 samples that are not in this data .*'{samples[0].id}'"
    with pytest.raises(InputError, match=expected):
        collect_feedback(model, [changed, *samples[1:]], file)
    assert counted == []
    assert file.read_bytes() == collected[1].read_bytes()


def test_another_models_file_is_refused_and_left_alone(samples, own_tiny, collected, tmp_path):
    model = own_tiny[0]
    model.image_newline = model.image_newline + 1
    file = tmp_path / "feedback.jsonl"
    file.write_bytes(collected[1].read_bytes())
    with pytest.raises(InputError) as error:
        collect_feedback(model, samples, file)
    named = (str(file), "another model", collected[0][0].model, fingerprint(model), "choose another file")
    assert all(part in str(error.value) for part in named)
    assert file.read_bytes() == collected[1].read_bytes()


def changed(row: str, **keys) -> str:
    return json.dumps(json.loads(row) | keys)


@pytest.mark.parametrize(
    "line",
    [
        *(
            "no json",
            "{}",
            "[]",
            "7",
            '{"id": "x", "loss": 1}',
            '{"id": "x"}',
            '{"id": "\udcff"}',
            '{"id": ' + "9" * 5000,
        ),
        *({"losses": ["much"]}, {"losses": {}}, {"router_logits": [1]}, {"sample": []}, {"sample": None}),
    ],
    ids=lambda line: str(line)[:30].encode("ascii", "backslashreplace").decode(),
)
def test_a_line_that_is_no_feedback_is_refused_with_its_number(line, samples, tiny, collected, tmp_path):
    """`line`: what stands there, or what is changed in a row; \\udcff is a byte that is not UTF-8."""
    file = tmp_path / "feedback.jsonl"
    row = collected[1].read_text().splitlines(keepends=True)[0]
    content = row + (changed(row, **line) if isinstance(line, dict) else line) + "\n"
    file.write_text(content, errors="surrogateescape")
    with pytest.raises(InputError, match=r"feedback\.jsonl, line 2: .*choose another"):
        collect_feedback(tiny[0], samples, file)
    assert file.read_text(errors="surrogateescape") == content


def test_a_disk_that_fills_is_one_error_and_is_resumed_later(samples, tiny, collected, tmp_path, monkeypatch):
    file = tmp_path / "feedback.jsonl"
    with monkeypatch.context() as context:
        fill_disk(context, 2)
        with pytest.raises(AvgMlxError, match=r"cannot write .*feedback\.jsonl .*No space left.*make room.*resume"):
            collect_feedback(tiny[0], samples, file)
    assert file.read_bytes() == b"".join(collected[1].read_bytes().splitlines(keepends=True)[:2])  # whole lines
    collect_feedback(tiny[0], samples, file)
    assert file.read_bytes() == collected[1].read_bytes()


@pytest.mark.parametrize("done", range(5))
def test_an_interrupt_keeps_what_is_done_and_says_how_to_resume(done, samples, tiny, collected, tmp_path, counted):
    file = tmp_path / "feedback.jsonl"

    def interrupt(n, total):
        if n == done:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=rf"{done} of 4 .*{file}.*same command resumes") as stop:
        collect_feedback(tiny[0], samples, file, interrupt)
    assert isinstance(stop.value.__cause__, KeyboardInterrupt)
    assert collect_feedback(tiny[0], samples, file) == collected[0]
    assert file.read_bytes() == collected[1].read_bytes()
    assert counted == [sample.id for sample in samples]


def test_an_interrupt_within_a_sample_loses_that_sample_only(samples, tiny, collected, tmp_path, monkeypatch):
    file, measure, begun = tmp_path / "feedback.jsonl", feedback_module.feedback_losses, []

    def interrupted(model, sample, *rest):
        begun.append(sample.id)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return measure(model, sample, *rest)

    with monkeypatch.context() as context:
        context.setattr(feedback_module, "feedback_losses", interrupted)
        with pytest.raises(Interrupted, match="2 of 4"):
            collect_feedback(tiny[0], samples, file)
    assert collect_feedback(tiny[0], samples, file) == collected[0]
    assert file.read_bytes() == collected[1].read_bytes()


def test_a_second_process_is_refused(samples, tiny, collected, tmp_path):
    file = tmp_path / "feedback.jsonl"
    with Journal(file), pytest.raises(InputError, match="another process is writing"):
        collect_feedback(tiny[0], samples, file)
    assert collect_feedback(tiny[0], samples, file) == collected[0]


def test_feedback_written_before_there_was_a_journal_is_known(samples, tiny, collected, tmp_path, counted):
    """Its lines had every letter beyond ASCII escaped."""
    file = tmp_path / "feedback.jsonl"
    file.write_text("".join(json.dumps(asdict(row)) + "\n" for row in collected[0]))
    assert collect_feedback(tiny[0], samples, file) == collected[0]
    assert counted == []


def test_make_feedback_skips_and_counts_what_has_nothing_to_choose(tiny_folder, data, collected, tmp_path, caplog):
    reports = []
    file = tmp_path / "feedback.jsonl"
    options = FeedbackOptions(model=tiny_folder, data=data, output=file)
    rows = make_feedback(options, lambda done, total: reports.append((done, total)))
    assert rows == collected[0]
    assert file.read_bytes() == collected[1].read_bytes()
    assert reports[-1] == (4, 4)
    assert caplog.messages == ["2 of 6 samples skipped: a router chooses for exactly one image"]


def test_data_with_nothing_to_choose_at_all_is_refused(tiny_folder, tmp_path, caplog):
    data = write_samples(tmp_path, [RECORDS[3], RECORDS[4]])
    with pytest.raises(InputError, match=r"data\.json leaves no sample to measure; see the warnings above"):
        make_feedback(FeedbackOptions(model=tiny_folder, data=data, output=tmp_path / "feedback.jsonl"))
    assert caplog.messages == ["2 of 2 samples skipped: a router chooses for exactly one image"]
    assert not (tmp_path / "feedback.jsonl").exists()


# Summary


def row(losses: list[float], logits: list[float] | None) -> Feedback:
    return Feedback("x", [36, 144, 576], losses, [36, 144, 576][int(np.argmin(losses))], 3, logits, "", "")


def test_regret_is_what_the_routers_choice_gives_away():
    assert row([3.0, 1.0, 2.0], [0.1, 0.9, 0.5]).regret == 0
    assert row([3.0, 1.0, 2.0], [0.9, 0.1, 0.5]).regret == 2
    assert row([3.0, 1.0, 2.0], None).regret is None


def test_summary_of_rows_made_by_hand():
    rows = [
        row([3.0, 1.0, 2.0], [0.0, 1.0, 0.0]),  # agrees
        row([4.0, 6.0, 5.0], [0.0, 0.0, 1.0]),  # gives away 1
        row([8.0, 2.0, 5.0], [1.0, 0.0, 0.0]),  # gives away 6
        row([1.0, 3.0, 0.0], [0.0, 0.0, 1.0]),  # agrees
    ]
    *lines, _, told = summarize(rows).splitlines()
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]] == [
        ["36", "25.0%", "4.0000"],
        ["144", "50.0%", "3.0000"],
        ["576", "25.0%", "3.0000"],
        ["each sample's best", "", "1.7500"],
    ]
    assert "50.0% of the time" in told
    assert "mean regret 1.7500" in told


def test_what_another_router_chose_is_not_taken_for_this_ones(own_tiny, samples, collected, tmp_path, monkeypatch):
    """Losses are kept, and logits are computed with the router that is there now."""
    model, file = own_tiny[0], tmp_path / "feedback.jsonl"
    without = collect_feedback(model, samples, file, scored=False)
    assert [row.router_logits for row in without] == [None] * len(samples)
    assert "router" not in summarize(without)
    monkeypatch.setattr(feedback_module, "feedback_losses", None)  # all are known
    rows = collect_feedback(model, samples, file)
    assert [row.losses for row in rows] == [row.losses for row in collected[0]]
    assert [row.router_logits for row in rows] == [row.router_logits for row in collected[0]]
    model.router.scorer.linear2.weight = -model.router.scorer.linear2.weight
    again = collect_feedback(model, samples, file)
    assert [row.losses for row in again] == [row.losses for row in rows]
    for new, old in zip(again, rows, strict=True):
        assert new.router_logits != old.router_logits
    assert collect_feedback(model, samples, file) == again
    assert len(file.read_text().splitlines()) == 3 * len(samples)
