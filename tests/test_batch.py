"""Batches: the answers of one-by-one greedy decoding, whatever stands beside them."""

import gc

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.generate import generation_stream
from mlx_lm.sample_utils import make_logits_processors
from PIL import Image

from avg_mlx import InputError, Request, generate, generate_batch, load, stream_batch
from avg_mlx.inference import batch

WIDE, TALL, SQUARE = (
    Image.effect_mandelbrot(size, (-2, -1, 1, 1), 50).convert("RGB") for size in ((160, 40), (40, 90), (100, 100))
)
CONVERSATION = (
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "See <image>"},
)
MIXED = [
    Request("Why?", WIDE, max_tokens=12),
    Request("What is the long answer to this long question about the sign?", SQUARE, 16, max_tokens=3),
    Request("Why?", max_tokens=7),
    Request("Which?", [TALL, WIDE], max_visual_tokens=40, max_tokens=20),
    Request("Where?", SQUARE, 1, max_tokens=1),
    Request(CONVERSATION, TALL, 4, max_tokens=9),
    Request("Why?", SQUARE, system_prompt="Be brief.", max_tokens=15),
    Request("<image> or <image>?", [SQUARE, SQUARE], 2, max_tokens=11),
]


@pytest.fixture(scope="module")
def stopping(tiny_folder):
    """(model, tokenizer) that ends some of MIXED's answers early: at what one of them says third."""
    model, tokenizer = load(tiny_folder)
    tokenizer.eos_token_ids = set()
    end = alone((model, tokenizer), MIXED[0]).token_ids[2]
    tokenizer.eos_token_ids = {end}
    return model, tokenizer


def alone(loaded, request, **options):
    fields = dict(vars(request))
    return generate(*loaded, fields.pop("prompt"), fields.pop("image"), **fields, **options)


def same(ours, theirs) -> None:
    assert (ours.token_ids, ours.text, ours.finish_reason) == (theirs.token_ids, theirs.text, theirs.finish_reason)
    assert (ours.prompt_token_ids, ours.prompt_tokens) == (theirs.prompt_token_ids, theirs.prompt_tokens)
    assert [view.granularity for view in ours.views] == [view.granularity for view in theirs.views]
    assert [view.visual_tokens for view in ours.views] == [view.visual_tokens for view in theirs.views]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_eight_mixed_questions_have_the_answers_that_they_have_alone(stopping, batch_size):
    answers = generate_batch(*stopping, MIXED, batch_size=batch_size)
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}
    for request, answer in zip(MIXED, answers, strict=True):
        same(answer, alone(stopping, request))


@settings(max_examples=6)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=5), st.integers(1, 4), st.sampled_from([1, 5, 2048]))
def test_any_questions_in_any_batches_of_any_prefill_steps(stopping, chosen, batch_size, step):
    requests = [MIXED[n] for n in chosen]
    answers = generate_batch(*stopping, requests, batch_size=batch_size, prefill_step_size=step)
    for request, answer in zip(requests, answers, strict=True):
        same(answer, alone(stopping, request))


def test_answers_come_as_they_end(stopping):
    order = [n for n, _ in stream_batch(*stopping, MIXED)]
    lengths = [len(alone(stopping, MIXED[n]).token_ids) for n in order]
    assert sorted(order) == list(range(8))
    assert lengths == sorted(lengths)
    assert order != list(range(8))


def test_the_next_batch_waits_until_it_is_wanted(stopping):
    answers = stream_batch(*stopping, [MIXED[0], Request("")], batch_size=1)
    n, answer = next(answers)
    assert n == 0
    same(answer, alone(stopping, MIXED[0]))
    n, error = next(answers)
    assert (n, str(error)) == (1, "the prompt is empty; ask something")


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (Request(""), "the prompt is empty"),
        (Request("Why?", "absent.png"), "no image at absent.png"),
        (Request("Why?", b"no image"), "is not an image"),
        (Request("Why?", SQUARE, 3), "granularity is 3"),
        (Request("Why?", SQUARE, max_visual_tokens=1), "no granularity fits"),
        (Request("Why?", max_tokens=0), "max_tokens is 0"),
        (Request("Why? " * 300), "but the model has 512"),
        (Request("<image>?", [SQUARE, SQUARE]), "1 <image>, but 2 images"),
    ],
    ids=range(8),
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_bad_request_does_not_spoil_the_others(stopping, bad, words, place):
    requests = [MIXED[2], MIXED[4]]
    requests.insert(place, bad)
    answers = generate_batch(*stopping, requests)
    error = answers.pop(place)
    assert isinstance(error, InputError)
    assert words in str(error)
    for request, answer in zip((MIXED[2], MIXED[4]), answers, strict=True):
        same(answer, alone(stopping, request))


GOOD, BAD = Request("Why?", SQUARE, max_tokens=3), Request("Bad?", TALL, max_tokens=3)
FAULTS = [
    (MemoryError(), "memory"),
    (RuntimeError("[malloc] Unable\nto \x1b"), "unexpected RuntimeError: [malloc]"),
    (OSError(5, "Input/output error", "x.png"), "x.png: Input/output error"),
]


def read_badly(monkeypatch, error):
    read = batch.read_crops
    monkeypatch.setattr(batch, "read_crops", lambda image, *rest: fail(error) if image is TALL else read(image, *rest))


def prepare_badly(monkeypatch, error):
    prepare = batch.prepare
    monkeypatch.setattr(batch, "prepare", lambda *args: fail(error) if args[2] == "Bad?" else prepare(*args))


def decode_badly(monkeypatch, error):
    decode = batch._Batch._decode
    monkeypatch.setattr(batch._Batch, "_decode", lambda self, a: fail(error) if 1 in a else decode(self, a))


def fail(error: BaseException):
    raise error


@pytest.mark.parametrize(("error", "words"), FAULTS, ids=["memory", "MLX", "disk"])
@pytest.mark.parametrize("fault", [read_badly, prepare_badly, decode_badly])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_fault_of_any_kind_is_that_of_one_request(stopping, monkeypatch, batch_size, fault, error, words):
    expected = alone(stopping, GOOD)
    fault(monkeypatch, error)
    first, failed, last = generate_batch(*stopping, [GOOD, BAD, GOOD], batch_size=batch_size)
    assert words in str(failed)
    assert failed.__traceback__ is failed.__context__ is None  # they would keep images and KV
    same(first, expected)
    same(last, expected)


@pytest.mark.parametrize("stage", ["VisionCache.features", "_Batch._decode"])
def test_what_does_not_fit_into_memory_together_is_answered_one_by_one(stopping, monkeypatch, stage):
    kind, name = stage.split(".")
    work = getattr(getattr(batch, kind), name)

    def only_few(self, many):
        return work(self, many) if len(many) < 2 else fail(MemoryError())

    monkeypatch.setattr(getattr(batch, kind), name, only_few)
    requests = [GOOD, BAD, Request("Where?", WIDE, max_tokens=2)]
    for request, answer in zip(requests, generate_batch(*stopping, requests), strict=True):
        same(answer, alone(stopping, request))


def test_answers_that_came_before_a_groups_fault_are_not_given_again(stopping, monkeypatch):
    decode = batch._Batch._decode

    def fail_later(self, answerings):
        yield next(decode(self, answerings))
        if len(answerings) > 1:
            raise MemoryError

    monkeypatch.setattr(batch._Batch, "_decode", fail_later)
    outcomes = list(stream_batch(*stopping, MIXED[:4]))
    assert sorted(n for n, _ in outcomes) == [0, 1, 2, 3]
    for n, answer in outcomes:
        same(answer, alone(stopping, MIXED[n]))


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("fault", [read_badly, prepare_badly, decode_badly])
def test_what_ends_the_process_ends_the_batch(stopping, monkeypatch, fault, error):
    fault(monkeypatch, error)
    with pytest.raises(error):
        generate_batch(*stopping, [GOOD, BAD, GOOD])


def test_a_template_that_ends_with_the_image_is_refused(stopping):
    model, tokenizer = stopping
    bare = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    given = tokenizer.chat_template
    tokenizer.chat_template = bare
    try:
        good, bad = generate_batch(model, tokenizer, [Request("<image>Why?", WIDE), Request("Why?<image>", WIDE)])
    finally:
        tokenizer.chat_template = given
    assert len(good.token_ids) > 0
    assert "ends with the image" in str(bad)


def test_nothing_and_bad_requests_alone(stopping):
    assert generate_batch(*stopping, []) == []
    assert [str(error) for error in generate_batch(*stopping, [Request("")])] == ["the prompt is empty; ask something"]
    with pytest.raises(InputError, match="batch_size is 0"):
        generate_batch(*stopping, MIXED, batch_size=0)


def test_images_are_seen_together_and_once(stopping, passes):
    answers = generate_batch(*stopping, MIXED)
    assert passes == [4 + 5 + 3]  # wide, square, tall
    calls = [answer.counters.vision_calls for answer in answers]
    assert calls == [1, 1, 0, 1, 0, 0, 0, 0]
    assert [answer.counters.router_calls for answer in answers] == [1, 0, 0, 2, 0, 0, 1, 0]
    assert [answer.counters.prefilled for answer in answers] == [answer.prompt_tokens for answer in answers]


def test_images_are_remembered_from_batch_to_batch(stopping, passes):
    generate_batch(*stopping, [MIXED[0], MIXED[1], MIXED[0], MIXED[1]], batch_size=1)
    assert passes == [4, 5]


def test_penalties_read_each_requests_own_tokens(stopping):
    processors = make_logits_processors(repetition_penalty=1e6, repetition_context_size=1000)
    answers = generate_batch(*stopping, MIXED, logits_processors=processors)
    for request, answer in zip(MIXED, answers, strict=True):
        same(answer, alone(stopping, request, logits_processors=processors))
        assert len(set(answer.token_ids)) == len(answer.token_ids)


def test_a_sampler_is_used(stopping):
    answers = generate_batch(*stopping, MIXED, sampler=lambda logprobs: mx.argmin(logprobs, axis=-1))
    for request, answer in zip(MIXED, answers, strict=True):
        same(answer, alone(stopping, request, sampler=lambda logprobs: mx.argmin(logprobs, axis=-1)))


def test_timings_are_there(stopping):
    for answer in generate_batch(*stopping, MIXED[:3]):
        t = answer.timings
        assert min(t.preprocess, t.vision, t.prefill, t.prompt_tokens_per_second) > 0
        assert t.router > 0 or answer.counters.router_calls == 0


def test_a_batch_gives_its_memory_back(stopping, no_spare_buffers):
    def held() -> int:
        gc.collect()
        mx.synchronize(generation_stream)  # decoding is a token ahead
        return mx.get_active_memory()

    sizes = []
    for _ in range(4):
        generate_batch(*stopping, MIXED)
        sizes.append(held())
    abandoned = stream_batch(*stopping, MIXED)
    next(abandoned)
    abandoned.close()
    assert {*sizes[1:], held()} == {sizes[1]}
