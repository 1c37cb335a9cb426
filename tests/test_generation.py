"""Decoding around mlx-lm's loop: segments, limits, caches, penalties, sampling."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from PIL import Image

from avg_mlx import InputError, generate, load, route, stream_generate
from avg_mlx.files import read_json
from avg_mlx.inference.options import Looking
from avg_mlx.inference.sampling import Sampling
from avg_mlx.inference.steps import prepare
from avg_mlx.inputs.prompt import PLACEHOLDER_ID
from avg_mlx.weights.checkpoint import load_model

PHOTO = Image.effect_mandelbrot((100, 80), (-2, -1, 1, 1), 50).convert("RGB")


def greedy(model, embeddings, count: int) -> list[int]:
    """Greedy tokens without a cache: the whole sequence anew for every token."""
    tokens = []
    for _ in range(count):
        tokens.append(int(mx.argmax(model(embeddings[None])[0, -1]).item()))
        embeddings = mx.concatenate([embeddings, model.embed_text(tokens[-1:])])
    return tokens


@pytest.fixture(scope="module")
def talkative(tiny_folder):
    """(model, tokenizer) that never ends of its own accord."""
    model, tokenizer = load(tiny_folder)
    tokenizer.eos_token_ids = set()
    return model, tokenizer


@pytest.fixture
def with_context(tiny_folder, talkative):
    """Makes the talkative model with fewer positions."""

    def make(positions: int):
        keys = read_json(tiny_folder / "config.json")
        return load_model(tiny_folder, keys | {"max_position_embeddings": positions}), talkative[1]

    return make


@pytest.mark.parametrize("images", [[], [PHOTO], [PHOTO, PHOTO.rotate(90, expand=True)]], ids=len)
def test_decoding_is_greedy(talkative, images):
    model, tokenizer = talkative
    answer = generate(model, tokenizer, "Which?", images, max_tokens=8)
    assert list(answer.token_ids) == greedy(model, prepare(model, tokenizer, "Which?", images, Looking()).embeddings, 8)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_prefilling_in_steps_changes_nothing(talkative, size):
    answers = [generate(*talkative, "Why?", PHOTO, max_tokens=6, prefill_step_size=n) for n in (size, 2048)]
    assert answers[0].token_ids == answers[1].token_ids


def test_segments_join_to_the_answer(talkative):
    segments = list(stream_generate(*talkative, "Why?", PHOTO, max_tokens=30))
    answer = segments[-1].answer
    assert [segment.answer for segment in segments[:-1]] == [None] * 29
    assert [segment.token_id for segment in segments] == list(answer.token_ids)
    assert "".join(segment.text for segment in segments) == answer.text
    detokenizer = talkative[1].detokenizer
    for token in answer.token_ids:
        detokenizer.add_token(token)
    detokenizer.finalize()
    assert answer.text == detokenizer.text


def test_segments_come_one_by_one(talkative):
    """The answer is streamed: nothing is decoded that is not asked for."""
    decoded = []
    processors = [lambda tokens, logits: decoded.append(len(tokens)) or logits]
    segments = stream_generate(*talkative, "Why?", max_tokens=100, logits_processors=processors)
    next(segments)
    assert 1 <= len(decoded) <= 3


def test_generate_is_the_streams_answer(talkative):
    answer = generate(*talkative, "Why?", PHOTO, max_tokens=5)
    *_, last = stream_generate(*talkative, "Why?", PHOTO, max_tokens=5)
    assert (answer.text, answer.token_ids, answer.views) == (last.answer.text, last.answer.token_ids, last.answer.views)


def test_the_end_of_sequence_token_ends_the_answer_and_is_not_its_text(tiny_folder, talkative):
    model, tokenizer = load(tiny_folder)
    free = generate(*talkative, "Why?", PHOTO, max_tokens=12)
    end = free.token_ids[4]
    tokenizer.add_eos_token(str(end))
    segments = list(stream_generate(model, tokenizer, "Why?", PHOTO, max_tokens=12))
    answer = segments[-1].answer
    first = free.token_ids.index(end)
    assert answer.finish_reason == "stop"
    assert answer.token_ids == free.token_ids[: first + 1]
    assert answer.text == "".join(segment.text for segment in segments)
    shorter = generate(*talkative, "Why?", PHOTO, max_tokens=first)
    assert answer.text == shorter.text


def dictated(tokens: list[int]):
    """Makes the model say these tokens."""
    left = iter([*tokens, *[0] * 9])

    def force(_, logits: mx.array) -> mx.array:
        return mx.where(mx.arange(logits.shape[-1]) == next(left), 1e9, logits)

    return {"logits_processors": [force]}


THE, E_ACUTE, EURO_BEGINS, EOS = 263, [3 + 0xC3, 3 + 0xA9], [3 + 0xE2, 3 + 0x82], 2


@pytest.mark.parametrize(
    ("tokens", "texts"),
    [
        ([THE, *E_ACUTE, THE, EOS], ["the", "", "é", " the", ""]),
        ([*E_ACUTE], ["", "é"]),
        ([THE, *EURO_BEGINS, EOS], ["the", "", "", "\ufffd"]),
        ([THE, *EURO_BEGINS], ["the", "", "\ufffd"]),
        ([*EURO_BEGINS, THE], ["", "", "\ufffd the"]),
    ],
    ids=["whole", "whole at the limit", "broken before the end", "broken at the limit", "broken inside"],
)
def test_characters_of_several_bytes_come_when_they_are_whole_or_lost(tiny, tokens, texts):
    segments = list(stream_generate(*tiny, "Why?", max_tokens=len(tokens), **dictated(tokens)))
    assert [segment.token_id for segment in segments] == tokens
    assert [segment.text for segment in segments] == texts
    assert segments[-1].answer.text == "".join(texts)
    assert segments[-1].answer.finish_reason == ("stop" if tokens[-1] == EOS else "length")


def test_an_answer_may_end_at_once(tiny_folder, talkative):
    model, tokenizer = load(tiny_folder)
    tokenizer.add_eos_token(str(generate(*talkative, "Why?", max_tokens=1).token_ids[0]))
    (segment,) = stream_generate(model, tokenizer, "Why?")
    assert (segment.text, segment.answer.text, segment.answer.finish_reason) == ("", "", "stop")
    assert len(segment.answer.token_ids) == 1
    assert segment.answer.timings.generation_tokens_per_second == 0


@pytest.mark.parametrize("max_tokens", [1, 2, 9])
def test_max_tokens_ends_the_answer(talkative, max_tokens):
    answer = generate(*talkative, "Why?", PHOTO, max_tokens=max_tokens)
    assert len(answer.token_ids) == max_tokens
    assert answer.finish_reason == "length"


def test_max_tokens_is_256_unless_told(talkative):
    assert len(generate(*talkative, "Why?").token_ids) == 256


@pytest.mark.parametrize(("room", "tokens"), [(0, 1), (1, 2), (5, 6)])
@pytest.mark.parametrize("max_tokens", [-1, 100])
def test_the_context_ends_the_answer(talkative, with_context, room, tokens, max_tokens):
    """The last token need not enter the model again, so one more fits than there is room for."""
    positions = generate(*talkative, "Why?", PHOTO, max_tokens=1).prompt_tokens
    answer = generate(*with_context(positions + room), "Why?", PHOTO, max_tokens=max_tokens)
    assert answer.finish_reason == "length"
    assert answer.token_ids == generate(*talkative, "Why?", PHOTO, max_tokens=tokens).token_ids


def test_max_tokens_of_minus_one_stops_where_the_model_stops(tiny_folder, talkative):
    model, tokenizer = load(tiny_folder)
    end = generate(*talkative, "Why?", max_tokens=20).token_ids[10]
    tokenizer.add_eos_token(str(end))
    answer = generate(model, tokenizer, "Why?", max_tokens=-1)
    assert (answer.finish_reason, answer.token_ids[-1]) == ("stop", end)


@pytest.mark.parametrize("max_tokens", [0, -2])
def test_other_limits_are_refused(tiny, max_tokens):
    with pytest.raises(InputError, match=f"max_tokens is {max_tokens}; expected 1 or more, or -1"):
        generate(*tiny, "Why?", max_tokens=max_tokens)


class Spy:
    """A logits processor that keeps what it was shown."""

    def __init__(self):
        self.seen: list[list[int]] = []

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        self.seen.append(tokens.tolist())
        return logits


def test_logits_processors_see_the_prompt_with_bos_for_visual_tokens_then_the_answer(talkative):
    spy = Spy()
    answer = generate(*talkative, "Why?", PHOTO, max_tokens=4, logits_processors=[spy])
    prompt = []
    for id in answer.prompt_token_ids:
        prompt += [1] * answer.views[0].visual_tokens if id == PLACEHOLDER_ID else [id]
    assert len(prompt) == answer.prompt_tokens
    for n, seen in enumerate(spy.seen[:4]):
        assert seen == [*prompt, *answer.token_ids[:n]]


def test_the_repetition_penalty_reaches_the_answer(talkative):
    """Without it a token comes again; with an extreme one none does, while its window lasts."""
    free = generate(*talkative, "Why?", PHOTO, max_tokens=40)
    assert len(set(free.token_ids)) < 40
    processors = make_logits_processors(repetition_penalty=1e6, repetition_context_size=1000)
    answer = generate(*talkative, "Why?", PHOTO, max_tokens=40, logits_processors=processors)
    assert len(set(answer.token_ids)) == 40


@pytest.mark.parametrize("extra", [0, 100])
def test_a_rotating_cache_that_is_large_enough_changes_nothing(talkative, extra):
    free = generate(*talkative, "Why?", PHOTO, max_tokens=10)
    size = free.prompt_tokens + 10 + extra
    assert generate(*talkative, "Why?", PHOTO, max_tokens=10, max_kv_size=size).token_ids == free.token_ids


def test_a_rotating_cache_keeps_no_more_positions(talkative, monkeypatch):
    caches = []

    class Kept(cache.RotatingKVCache):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            caches.append(self)

    monkeypatch.setattr(cache, "RotatingKVCache", Kept)
    answer = generate(*talkative, "Why?", PHOTO, max_tokens=30, max_kv_size=40)
    assert len(answer.token_ids) == 30
    assert len(caches) == 2  # one for each layer
    for kept in caches:
        assert kept.offset >= answer.prompt_tokens + 29 > 40
        assert kept.keys.shape[2] == 40


@pytest.mark.parametrize("bits", [4, 8])
def test_the_kv_cache_can_be_quantized(talkative, bits, monkeypatch):
    made = []
    original = cache.KVCache.to_quantized
    monkeypatch.setattr(cache.KVCache, "to_quantized", lambda *args, **kw: made.append(kw) or original(*args, **kw))
    options = {"kv_bits": bits, "quantized_kv_start": 0}  # groups of 64 would not fit heads of 32
    answer = generate(*talkative, "Why?", PHOTO, max_tokens=10, **options)
    assert len(answer.token_ids) == 10
    assert made == [{"group_size": 32, "bits": bits}] * 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_bits": 4, "max_kv_size": 64}, "cannot be quantized"),
        ({"kv_bits": 4, "kv_group_size": 64}, "kv_group_size 64 does not divide this model's head size 32"),
        ({"kv_bits": 4, "kv_group_size": 128}, "kv_group_size 128 does not divide"),
        ({"kv_bits": 4, "kv_group_size": 16}, "kv_group_size is 16; expected one of 32, 64, 128"),
        ({"kv_bits": 7}, "kv_bits is 7; expected one of 2, 3, 4, 5, 6, 8"),
        ({"max_kv_size": 4}, "max_kv_size is 4; expected 5 or more"),
    ],
)
def test_caches_that_cannot_be_are_refused(tiny, options, words):
    with pytest.raises(InputError, match=words):
        generate(*tiny, "Why?", max_tokens=1, **options)


def test_sampling_is_reproduced_by_its_seed(talkative):
    def sampled(seed: int) -> tuple[int, ...]:
        mx.random.seed(seed)
        return generate(*talkative, "Why?", PHOTO, max_tokens=12, sampler=make_sampler(5.0)).token_ids

    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in range(3)}) == 3


def test_routing_without_generating_agrees(talkative):
    photos = [PHOTO, PHOTO.rotate(90, expand=True)]
    for options in ({}, {"max_visual_tokens": 30}, {"system_prompt": "Be brief."}):
        answer = generate(*talkative, "Which?", photos, max_tokens=1, **options)
        assert route(*talkative, "Which?", photos, **options) == answer.views


def test_a_conversation_goes_on(talkative):
    """Its text is the template's, and its image stands in the first turn."""
    model, tokenizer = talkative
    messages = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "A fractal."},
        {"role": "user", "content": "Which?"},
    ]
    answer = generate(model, tokenizer, messages, PHOTO, max_tokens=3)
    text = tokenizer.decode([id for id in answer.prompt_token_ids if id != PLACEHOLDER_ID])
    assert text.endswith("\nWhat is it? ASSISTANT: A fractal.</s>USER: Which? ASSISTANT:")
    assert answer.prompt_token_ids.count(PLACEHOLDER_ID) == 1
    assert answer.prompt_tokens == len(answer.prompt_token_ids) - 1 + answer.views[0].visual_tokens


def test_a_system_prompt_changes_the_question_put(talkative):
    _, tokenizer = talkative
    answer = generate(*talkative, "Why?", max_tokens=1, system_prompt="Be brief.")
    assert tokenizer.decode(answer.prompt_token_ids, skip_special_tokens=True) == "Be brief. USER: Why? ASSISTANT:"


def test_an_image_may_come_as_a_path_bytes_or_an_image(talkative, tmp_path):
    PHOTO.save(tmp_path / "photo.png")
    sources = [PHOTO, tmp_path / "photo.png", str(tmp_path / "photo.png"), (tmp_path / "photo.png").read_bytes()]
    answers = [generate(*talkative, "Why?", source, max_tokens=4) for source in sources]
    assert len({answer.token_ids for answer in answers}) == 1
    assert len({answer.views for answer in answers}) == 1


def test_timings_and_rates_add_up(talkative):
    answer = generate(*talkative, "Why?", PHOTO, max_tokens=5)
    t = answer.timings
    assert min(t.preprocess, t.vision, t.router, t.prefill) > 0
    assert t.time_to_first_token == t.preprocess + t.vision + t.router + t.prefill
    assert np.isclose(t.prompt_tokens_per_second * t.prefill, answer.prompt_tokens)
    assert t.generation_tokens_per_second > 0
    assert answer.peak_memory_gb == mx.get_peak_memory() / 1e9 > 0


def test_mistakes_are_found_before_the_image_is_read(tiny):
    """What costs nothing to check is checked first."""
    for options, words in (({"max_tokens": 0}, "max_tokens"), ({"granularity": 3}, "granularity is 3")):
        with pytest.raises(InputError, match=words):
            generate(*tiny, "Why?", "absent.png", **options)


@pytest.mark.parametrize("prompt", [["hi"], [1], [{"role": "user"}], [None]])
def test_messages_of_another_form_are_refused(tiny, prompt):
    with pytest.raises(InputError, match=r"message 1 is .*expected role"):
        generate(*tiny, prompt)


def test_a_temperature_near_zero_is_greedy_in_16_bits(talkative):
    """There 1 / 1e-8 is infinite."""
    logprobs = mx.array([[-3.0, -0.1, -4.0]], mx.float16)
    sampler = Sampling(temp=1e-8, top_p=0.9, seed=0).sampler(talkative[1])
    assert [sampler(logprobs).item() for _ in range(20)] == [1] * 20
