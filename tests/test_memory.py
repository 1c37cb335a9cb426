"""What is held while an answer is decoded and after it: nothing but what is needed."""

import gc
import itertools
import weakref

import mlx.core as mx
import pytest
from mlx_lm.generate import generation_stream
from PIL import Image

from avg_mlx import ChatSession, generate, load, stream_generate
from avg_mlx.inference import steps
from avg_mlx.inference.caches import PrefixCache

PHOTO, OTHER = (Image.effect_mandelbrot(size, (-2, -1, 1, 1), 50).convert("RGB") for size in ((100, 100), (40, 90)))


@pytest.fixture(scope="module")
def talkative(tiny_folder):
    """(model, tokenizer) that never ends of its own accord."""
    model, tokenizer = load(tiny_folder)
    tokenizer.eos_token_ids = set()
    return model, tokenizer


def held() -> int:
    gc.collect()
    mx.synchronize(generation_stream)  # decoding is a token ahead
    return mx.get_active_memory()


def test_every_answer_gives_back_what_it_took(talkative, no_spare_buffers):
    """Whatever granularity and image: memory is what it was, and its peak stays that of the first few."""
    calls = itertools.cycle(itertools.product((PHOTO, OTHER, None), ("auto", 16)))
    after, peaks = [], []
    mx.reset_peak_memory()
    for image, granularity in itertools.islice(calls, 20):
        generate(*talkative, "Why?", image, granularity=granularity, max_tokens=3)
        after.append(held())
        peaks.append(mx.get_peak_memory())
    assert set(after[5:]) == {after[5]}
    assert peaks[-1] <= 1.1 * peaks[9]  # buffers are reused if larger; an answer's KV adds 6 %, so ten would show


def test_an_abandoned_answer_gives_back_what_it_took(talkative, no_spare_buffers):
    generate(*talkative, "Why?", PHOTO, max_tokens=3)
    before = held()
    for _ in range(3):
        next(stream_generate(*talkative, "Why?", PHOTO, max_tokens=20))
    assert held() == before


def test_features_are_gone_while_the_answer_is_decoded(talkative, monkeypatch):
    features = []
    encode = steps.encode_images

    def spy(*args):
        encoded = encode(*args)
        features.extend(map(weakref.ref, encoded))
        return encoded

    monkeypatch.setattr(steps, "encode_images", spy)
    segments = stream_generate(*talkative, "Why?", [PHOTO, OTHER], max_tokens=20)
    next(segments)
    gc.collect()
    assert [reference() is None for reference in features] == [True, True]
    next(segments)


def test_decoding_holds_the_kv_and_the_chosen_visual_tokens(talkative):
    """Not the features, which are many times the coarsest granularity's tokens."""
    model, _ = talkative
    D = model.config.hidden_size
    question = {"prompt": "Why?", "image": [PHOTO] * 8, "granularity": 1}
    positions = generate(*talkative, **question, max_tokens=1).prompt_tokens
    before = held()
    segments = stream_generate(*talkative, **question)
    for _ in range(3):
        next(segments)
    kv = 2 * 2 * 32 * 4 * -(-positions // 256) * 256  # keys and values, layers, head size, bytes; 256 at a time
    features = 8 * 5 * 16 * D * 4
    assert held() - before < kv + positions * D * 4 + features / 2
    segments.close()


def test_a_session_says_what_it_holds(talkative):
    generate(*talkative, "Why?", PHOTO, max_tokens=3)
    before = held()
    session = ChatSession(*talkative)
    for image in (PHOTO, OTHER, None):
        list(session.ask("Why?", image, max_tokens=3))
        assert session.bytes_held <= held() - before <= 1.5 * session.bytes_held  # buffers are reused if larger
    del session
    assert held() == before


def test_a_sessions_memory_is_bounded(talkative):
    """By its limit for features and the longest conversation: clearing it over and over adds nothing."""
    session = ChatSession(*talkative, vision_cache_bytes=50_000)
    sizes = []
    for n in range(12):
        session.clear()
        list(session.ask("Why?", PHOTO.rotate(n), granularity=16, max_tokens=3))
        sizes.append(held())
        assert session._vision.nbytes <= 50_000
    assert sizes[-1] <= 1.02 * sizes[3]


def test_kv_that_nobody_keeps_is_dropped(talkative):
    """`PrefixCache` holds the last prompt's KV only."""
    store = PrefixCache()
    kept = []
    for keys in ([1, 2, 3], [4, 5]):
        with store.lend(keys, [Layer()]) as loan:
            kept.append(weakref.ref(loan.layers[0]))
            loan.layers[0].offset = len(keys)
    del loan
    gc.collect()
    assert [reference() is None for reference in kept] == [True, False]


class Layer:
    """As little of a KV cache as is needed."""

    offset = nbytes = 0

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        self.offset -= n
        return n
