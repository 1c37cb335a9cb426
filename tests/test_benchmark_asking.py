"""Questions of a benchmark: several modes from one look, a journal, and what cannot be asked."""

from dataclasses import replace

import pytest
from PIL import Image

from avg_mlx import InputError, Interrupted, generate
from avg_mlx.benchmark.answering import Answerer
from avg_mlx.benchmark.asking import ask, open_journal
from avg_mlx.benchmark.modes import check_modes
from avg_mlx.benchmark.questions import Question, prompt_of
from avg_mlx.inputs.prompt import PLACEHOLDER_ID, build_messages, encode_messages

MODES = ["adaptive", "1", "16", "cost=50", "budget=40"]


def question(n: int, text: str = "What is this?", images=None) -> Question:
    """The n-th question of a task, about a plain image unless others are given."""
    colours = ["red", "green", "blue"]
    images = [Image.new("RGB", (60 + 40 * (n % 3), 60), colours[n % 3])] if images is None else images
    return Question("task", n, text, 4, lambda: images, f"{n:016x}")


def broken(n: int) -> Question:
    def read():
        raise OSError("cannot identify image file")

    return replace(question(n), images=read)


@pytest.fixture
def answerer(tiny):
    return Answerer(*tiny, check_modes(MODES, tiny[0].config))


def test_every_mode_answers_as_generate_does(tiny, answerer):
    for n in range(3):
        found = answerer.answer(question(n)).attempts
        [image] = question(n).images()
        options = [{}, {"granularity": 1}, {"granularity": 16}, {"token_cost": 50}, {"max_visual_tokens": 40}]
        for mode, how in zip(MODES, options, strict=True):
            answer = generate(*tiny, "What is this?", image, max_tokens=4, **how)
            assert found[mode].answer == answer.text
            assert found[mode].granularities == [answer.views[0].granularity]
            assert found[mode].source == answer.views[0].source
            assert found[mode].visual_tokens == answer.views[0].visual_tokens


def test_an_image_is_seen_once_for_all_modes_and_for_the_questions_about_it(answerer, passes):
    first, second = (answerer.answer(replace(question(0), text=text)) for text in ("What is this?", "Is it red?"))
    assert len(passes) == 1
    assert first.seconds["vision"] == second.seconds["vision"]  # each counts what seeing it takes


def test_the_router_runs_once(answerer, monkeypatch):
    from avg_mlx.benchmark import answering

    calls = []
    score = answering.score
    monkeypatch.setattr(answering, "score", lambda *args: calls.append(1) or score(*args))
    result = answerer.answer(question(0))
    assert calls == [1]
    assert result.router is not None
    assert result.seconds["router"] > 0


def test_modes_that_choose_the_same_share_an_answer(tiny, monkeypatch):
    from avg_mlx.benchmark import answering

    calls = []
    decode = answering.decode
    monkeypatch.setattr(answering, "decode", lambda *args: calls.append(1) or decode(*args))
    Answerer(*tiny, check_modes(["1", "cost=1000"], tiny[0].config)).answer(question(0))
    assert calls == [1]


def test_several_images_and_none(answerer):
    images = [Image.new("RGB", (60, 60), colour) for colour in ("red", "blue")]
    assert len(answerer.answer(question(0, images=images)).attempts["16"].granularities) == 2
    text = answerer.answer(question(0, images=[]))
    assert {mode: one.granularities for mode, one in text.attempts.items()} == {mode: [] for mode in MODES}
    assert text.visual_tokens_finest == 0


def test_images_stand_on_one_line_before_the_question():
    assert prompt_of("What?", 2) == "<image> <image>\nWhat?"
    assert prompt_of("What?", 0) == "What?"


def test_a_literal_image_is_text(tokenizer):
    """It has the ids of its characters: those of its text without the image, which stand at the same place."""
    ids = encode_messages(tokenizer, build_messages(prompt_of("Where is <image> here?", 1), 1))
    assert ids.count(PLACEHOLDER_ID) == 1
    after = ids[ids.index(PLACEHOLDER_ID) + 1 :]
    assert "\nWhere is <image> here?" in tokenizer.decode(after)
    rendered = "\nWhere is <image> here? ASSISTANT:"
    assert after == tokenizer.encode(rendered)[1:]


def test_what_does_not_fit_into_the_context_is_answered_with_nothing(tiny, answerer):
    room = tiny[0].config.context_length
    longest = answerer.answer(question(1, "word " * room))
    assert all(one.answer == "" and "position" in one.problem for one in longest.attempts.values())
    one, eleven = (answerer.answer(question(1, "word " * n)) for n in (1, 11))
    left = room - one.text_tokens - one.attempts["1"].visual_tokens - 5
    close = answerer.answer(question(1, "word " * (1 + 10 * left // (eleven.text_tokens - one.text_tokens)))).attempts
    assert close["1"].problem is None
    assert "positions" in close["16"].problem


def test_a_journal_is_resumed(answerer, tmp_path, passes):
    questions = [question(n) for n in range(6)]
    with open_journal(tmp_path, answerer) as journal:
        first = ask(answerer, questions[:3], journal, False)
        before = list(journal.rows)
    answerer.cache.clear()
    passes.clear()
    with open_journal(tmp_path, answerer) as journal:
        again = ask(answerer, questions[:3], journal, False)
        assert passes == []
        everything = ask(answerer, questions, journal, False)
        assert journal.rows[:3] == before
    assert again == first
    assert [row["doc_id"] for row in journal.rows] == list(range(6))
    assert list(everything) == [one.key for one in questions]


def test_a_journal_of_other_modes_is_refused(tiny, answerer, tmp_path):
    open_journal(tmp_path, answerer).close()
    with pytest.raises(InputError, match="modes was"):
        open_journal(tmp_path, Answerer(*tiny, check_modes(["1"], tiny[0].config)))


def test_a_row_that_is_no_answer_is_named(answerer, tmp_path):
    with open_journal(tmp_path, answerer) as journal:
        journal.append({"key": "1"})
        with pytest.raises(InputError, match="line 1"):
            ask(answerer, [question(0)], journal, False)


def test_a_question_that_cannot_be_asked_ends_the_run_and_the_answers_are_kept(answerer, tmp_path):
    with open_journal(tmp_path, answerer) as journal:
        with pytest.raises(InputError, match=r"question 1 of task.*cannot identify.*skip_bad.*resume"):
            ask(answerer, [question(0), broken(1), question(2)], journal, False)
        assert [row["doc_id"] for row in journal.rows] == [0]


def test_or_is_answered_with_nothing_and_asked_again_the_next_time(answerer, tmp_path):
    questions = [broken(0), question(1)]
    with open_journal(tmp_path, answerer) as journal:
        results = list(ask(answerer, questions, journal, True).values())
        assert [row["doc_id"] for row in journal.rows] == [1]
    assert {one.answer for one in results[0].attempts.values()} == {""}
    assert "0 of task" in results[0].attempts["1"].problem
    with open_journal(tmp_path, answerer) as journal:
        mended = ask(answerer, [question(0), question(1)], journal, False)
    assert all(one.problem is None for result in mended.values() for one in result.attempts.values())


def test_ctrl_c_says_how_far_it_came(answerer, tmp_path):
    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with open_journal(tmp_path, answerer) as journal:
        with pytest.raises(Interrupted, match=r"2 of 4.*resume"):
            ask(answerer, [question(n) for n in range(4)], journal, False, stop)
        assert len(journal.rows) == 2


def test_the_cache_of_features_is_bounded(answerer):
    answerer.cache.limit = answerer.answer(question(0)) and 2 * answerer.cache.nbytes
    for n in range(12):
        answerer.answer(question(n, images=[Image.new("RGB", (60, 60), (20 * n, 0, 0))]))
    assert 0 < answerer.cache.nbytes <= answerer.cache.limit
