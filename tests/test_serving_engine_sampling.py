"""Seeds, penalties, biases, log-probabilities and stop texts: as `generate` and OpenAI have them, in a batch too."""

import mlx.core as mx
import numpy as np
import pytest
from engine_clients import SQUARE, TALL, WIDE, Question, answer_all, make_core, same
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.sample_utils import make_logits_processors

from avg_mlx import load
from avg_mlx.inference.options import Looking
from avg_mlx.inference.sampling import Sampling
from avg_mlx.inference.steps import prepare
from avg_mlx.serving.engine.scores import Vocabulary
from avg_mlx.serving.engine.stop_text import StopText
from avg_mlx.serving.jobs import Job, Piece

QUESTION = Question("Why?", (WIDE,), options={"max_tokens": 20})
OTHERS = [Question("Which?", (TALL, WIDE)), Question("Where?", (SQUARE,), (4,)), Question("Who?")]


@pytest.fixture(scope="module")
def endless(tiny_folder):
    """(model, tokenizer) whose answers go on to their limit."""
    model, tokenizer = load(tiny_folder)
    tokenizer.eos_token_ids = set()
    return model, tokenizer


def beside_others(loaded, **options):
    """The client of QUESTION's answer, which others join and leave."""
    config = loaded[0].config
    jobs = [
        OTHERS[0].job(config, max_tokens=3),
        QUESTION.job(config, **options),
        OTHERS[1].job(config, sampling=Sampling(temp=1.0), max_tokens=9),
        OTHERS[2].job(config, sampling=Sampling(temp=1.0, seed=5), presence_penalty=1.0, logprobs=1),
    ]
    return answer_all(make_core(loaded), jobs)[1]


DRAWN = [
    Sampling(temp=1.0, seed=7),
    Sampling(temp=0.7, top_p=0.9, seed=7),
    Sampling(temp=1.3, top_k=20, seed=8),
    Sampling(temp=1.0, min_p=0.02, top_p=0.95, top_k=50, seed=2**63),
]


@pytest.mark.parametrize("sampling", DRAWN, ids=range(len(DRAWN)))
def test_a_seed_draws_what_it_draws_in_generate(endless, sampling):
    mx.random.seed(3)
    ours = beside_others(endless, sampling=sampling)
    expected = QUESTION.alone(endless, sampler=sampling.sampler(endless[1]))
    same(ours, expected)
    assert expected.token_ids != QUESTION.alone(endless).token_ids


def test_without_a_seed_answers_differ(endless):
    config = endless[0].config
    job = QUESTION.job(config, sampling=Sampling(temp=2.0))
    answers = {client.answer.token_ids for client in answer_all(make_core(endless), [job] * 4)}
    assert len(answers) == 4


def penalties(job: Job, positions: int) -> list:
    """mlx-lm's processors with OpenAI's meaning: those of the answer do not see the prompt."""
    answered = make_logits_processors(
        presence_penalty=job.presence_penalty,
        presence_context_size=1000,
        frequency_penalty=job.frequency_penalty,
        frequency_context_size=1000,
    )
    return [
        *make_logits_processors(logit_bias=dict(job.logit_bias), repetition_penalty=job.sampling.repetition_penalty),
        *(lambda tokens, logits, p=p: p(tokens[positions:], logits) for p in answered),
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"presence_penalty": 2.0},
        {"frequency_penalty": 1.5},
        {"presence_penalty": -0.5, "frequency_penalty": 0.25},
        {"logit_bias": {11: 100.0}},
        {"logit_bias": {3: -100.0, 11: 2.0, 500: 3.5}},
        {"sampling": Sampling(repetition_penalty=1.5)},
        {"sampling": Sampling(repetition_penalty=1.2), "frequency_penalty": 0.5, "logit_bias": {11: 1.0}},
    ],
    ids=lambda options: "+".join(options),
)
def test_penalties_and_biases_are_those_of_mlx_lm(endless, options):
    ours = beside_others(endless, **options)
    plain = QUESTION.alone(endless)
    job = QUESTION.job(endless[0].config, **options)
    same(ours, QUESTION.alone(endless, logits_processors=penalties(job, plain.prompt_tokens)))


def test_a_presence_penalty_forbids_what_was_said_and_not_what_was_asked(endless):
    client = beside_others(endless, presence_penalty=1000.0)
    tokens = client.answer.token_ids
    assert len(set(tokens)) == len(tokens) == 20
    assert QUESTION.alone(endless).token_ids[0] == tokens[0]  # nothing was said before it


@pytest.fixture(scope="module")
def distributions(endless):
    """The log-probabilities of each of the answer's steps, from one pass over prompt and answer."""
    model, tokenizer = endless
    answer = QUESTION.alone(endless)
    prepared = prepare(model, tokenizer, QUESTION.text, list(QUESTION.images), Looking())
    embeddings = mx.concatenate([prepared.embeddings, model.embed_text(answer.token_ids[:-1])])
    logits = model(embeddings[None])[0, prepared.layout.positions - 1 :]
    return answer.token_ids, np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


@pytest.mark.parametrize("options", [{}, {"logit_bias": {3: -1.0}, "presence_penalty": 1e-6}], ids=["plain", "biased"])
def test_logprobs_are_those_of_the_model_whatever_is_added_to_them(endless, distributions, options):
    ids, expected = distributions
    client = beside_others(endless, logprobs=20, **options)
    assert tuple(token.id for token in client.tokens) == ids
    for token, row in zip(client.tokens, expected, strict=True):
        assert token.logprob == pytest.approx(row[token.id], abs=1e-3)
        assert next(each.id for each in token.likeliest) == token.id  # greedy
        assert [each.logprob for each in token.likeliest] == pytest.approx(sorted(row)[:-21:-1], abs=1e-3)
    assert np.exp(list(expected)).sum(axis=1) == pytest.approx(1, abs=1e-4)


def test_all_probabilities_of_a_step_sum_to_one(endless):
    from avg_mlx.serving.engine.scores import Scores

    logits = mx.random.normal((1, endless[0].config.vocab_size)) * 9
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        scores = Scores(Vocabulary(endless[1]), endless[0].config.vocab_size)
        assert scores(mx.array([1]), logits.astype(dtype)).dtype == dtype
        token = scores.take(5)
        assert sum(np.exp([each.logprob for each in token.likeliest])) == pytest.approx(1, abs=1e-5)
        assert token.logprob == next(each.logprob for each in token.likeliest if each.id == 5)


def test_a_sampled_tokens_logprob_does_not_know_the_temperature(endless, distributions):
    _, expected = distributions
    client = beside_others(endless, sampling=Sampling(temp=3.0, seed=1), logprobs=0)
    [first, *_] = client.tokens
    assert first.likeliest == ()
    assert first.logprob == pytest.approx(expected[0][first.id], abs=1e-3)


def test_tokens_come_with_the_text_that_they_make(endless):
    client = beside_others(endless, logprobs=2)
    pieces = [event for event in client.events if isinstance(event, Piece)]
    assert len(client.tokens) == 20
    data = b"".join(token.data for token in client.tokens).decode(errors="replace")
    assert data.strip() == client.text.strip()
    assert all(piece.tokens for piece in pieces)


@pytest.mark.parametrize("length", [1, 2, 5, 9])
@pytest.mark.parametrize("begin", [0, 3, 11])
def test_a_stop_text_ends_the_answer_and_is_not_in_it(endless, begin, length):
    whole = QUESTION.alone(endless).text
    stop = whole[begin : begin + length]
    client = beside_others(endless, stop=("\0absent", stop), logprobs=0)
    assert client.text == client.answer.text == whole[: whole.index(stop)]
    assert client.answer.finish_reason == "stop"
    plain = beside_others(endless, logprobs=0)
    assert client.tokens == plain.tokens[: len(client.tokens)]
    assert len(client.answer.token_ids) <= 20


def test_what_began_like_a_stop_text_is_told_at_the_end(endless):
    whole = QUESTION.alone(endless).text
    client = beside_others(endless, stop=(whole[-2:] + "\0", whole + "\0"), logprobs=0)
    assert (client.text, client.answer.finish_reason) == (whole, "length")
    assert len(client.tokens) == 20
    assert client.events[1].text == whole  # nothing was certain before


def test_the_kv_of_an_answer_that_a_stop_text_ended_is_kept_as_far_as_it_went(endless):
    whole = QUESTION.alone(endless).text
    core, config = make_core(endless), endless[0].config
    [stopped] = answer_all(core, [QUESTION.job(config, stop=(whole[4:8],))])
    [again] = answer_all(core, [QUESTION.job(config)])
    same(again, QUESTION.alone(endless))
    assert again.answer.counters.reused == stopped.answer.prompt_tokens - 2  # mlx-lm trims one more than it must


texts = st.text("ab", max_size=12)


@given(texts, st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.lists(st.integers(0, 12)))
def test_how_text_is_cut_into_pieces_changes_nothing(text, stops, cuts):
    def passed(pieces) -> tuple[str, bool]:
        stop, out = StopText(stops), ""
        for piece in pieces:
            out += stop.push(piece)
            assert not any(s in out for s in stops)
            if stop.stopped:
                return out, True
        return out + stop.finish(), False

    places = sorted({cut for cut in cuts if cut <= len(text)})
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    expected = (text[: min(ends)[1]], True) if ends else (text, False)
    assert passed(pieces) == passed(list(text)) == passed([text]) == expected


@given(texts, st.text("ab", min_size=1, max_size=4))
def test_no_more_is_held_back_than_might_begin_a_stop_text(text, stop):
    machine = StopText([stop])
    out = machine.push(text)
    if not machine.stopped:
        held = text[len(out) :]
        assert stop.startswith(held)
        assert held != stop


def test_the_bytes_of_tokens_make_up_the_text(tokenizer):
    vocabulary = Vocabulary(tokenizer)
    text = "A café, 日本 and 🐈 — \u00a0x"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(vocabulary.data(id) for id in ids).decode().strip() == text
    assert vocabulary.data(tokenizer.convert_tokens_to_ids("</s>")) == b"</s>"
    assert vocabulary.data(10**6) == b""


def test_the_bytes_of_byte_level_tokens_make_up_the_text():
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = "A café, 日本 and 🐈"
    backend.train_from_iterator(
        [text] * 3, tokenizers.trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    vocabulary = Vocabulary(type("Wrapper", (), {"backend_tokenizer": backend})())
    assert b"".join(vocabulary.data(id) for id in backend.encode(text).ids).decode() == text
