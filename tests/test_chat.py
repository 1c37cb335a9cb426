"""Conversations: the answers of `stream_generate`, with nothing computed twice."""

import itertools
import re

import mlx.core as mx
import pytest
from conftest import PHOTO, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from avg_mlx import ChatSession, InputError, generate, load
from avg_mlx.files import read_json
from avg_mlx.inputs.prompt import PLACEHOLDER_ID
from avg_mlx.weights.checkpoint import load_model

WIDE, TALL, SQUARE = (
    Image.effect_mandelbrot(size, (-2, -1, 1, 1), 50).convert("RGB") for size in ((160, 40), (40, 90), (100, 100))
)
NEGATIVE = SQUARE.point(lambda value: 255 - value)  # as large as SQUARE
PHOTOS = (WIDE, SQUARE, NEGATIVE)
THE, EOS = 263, 2


@pytest.fixture(scope="module")
def roomy(tiny_folder):
    """(model, tokenizer) that never ends of its own accord, with room for long conversations."""
    model = load_model(tiny_folder, read_json(tiny_folder / "config.json") | {"max_position_embeddings": 4096})
    tokenizer = load(tiny_folder)[1]
    tokenizer.eos_token_ids = set()
    return model, tokenizer


@pytest.fixture(scope="module")
def ending(roomy, tiny_folder):
    """The same, and it may end."""
    return roomy[0], load(tiny_folder)[1]


def ask(session, prompt="Why?", image=None, **options):
    *_, last = session.ask(prompt, image, **({"max_tokens": 4} | options))
    return last.answer


class Notes:
    """What a session has been asked and has answered, to be put to `generate` from the beginning."""

    def __init__(self, loaded):
        self.loaded, self.messages, self.images = loaded, [], []

    def ask(self, prompt, images, **options):
        content = "<image>\n" * len(images) + prompt
        messages = [*self.messages, {"role": "user", "content": content}]
        answer = generate(*self.loaded, messages, [*self.images, *images], **options)
        if answer.text.strip():
            self.messages = [*messages, {"role": "assistant", "content": answer.text}]
            self.images += images
        return answer


def says(*tokens: int):
    """Makes the model say these tokens, whatever it has been asked."""

    class Force:
        def __init__(self):
            self.left = iter([*tokens, *[0] * 9])

        def __call__(self, _, logits):
            return mx.where(mx.arange(logits.shape[-1]) == next(self.left), 1e9, logits)

    return {"logits_processors": [Force()], "max_tokens": len(tokens)}


def before_image(answer) -> int:
    """Positions before the first image."""
    return answer.prompt_token_ids.index(PLACEHOLDER_ID)


turns = st.one_of(
    st.just("clear"),
    st.tuples(
        st.sampled_from(["Why?", "Which colour is the sign?"]),
        st.lists(st.integers(0, len(PHOTOS) - 1), max_size=2),
        st.sampled_from(["auto", "auto", 1, 8, 16]),
        st.integers(1, 5),  # new tokens
        st.sampled_from(["whole", "whole", "abandoned", "interrupted"]),
    ),
)


@settings(max_examples=12)
@given(st.lists(turns, min_size=2, max_size=5))
def test_answers_are_those_of_generate_on_the_same_messages(roomy, turns):
    session, notes = ChatSession(*roomy), Notes(roomy)
    for turn in turns:
        if turn == "clear":
            session.clear()
            notes = Notes(roomy)
            continue
        prompt, photos, granularity, count, way = turn
        images = [PHOTOS[n] for n in photos]
        if way == "abandoned":
            next(session.ask(prompt, images, granularity=granularity, max_tokens=9))
        elif way == "interrupted":
            interrupt(session, prompt, images, after=count, granularity=granularity)
        else:
            ours = ask(session, prompt, images, granularity=granularity, max_tokens=count)
            theirs = notes.ask(prompt, images, granularity=granularity, max_tokens=count)
            assert (ours.token_ids, ours.text) == (theirs.token_ids, theirs.text)
            assert ours.prompt_token_ids == theirs.prompt_token_ids
            assert [view.granularity for view in ours.views] == [view.granularity for view in theirs.views]
            assert ours.counters.reused + ours.counters.prefilled == theirs.counters.prefilled
        assert session.messages == notes.messages


def interrupt(session, prompt, images, after, **options):
    """Ask, and press Ctrl-C when so many tokens have been computed."""
    steps = itertools.count(1)

    def press(_, logits):
        if next(steps) > after:
            raise KeyboardInterrupt
        return logits

    with pytest.raises(KeyboardInterrupt):
        ask(session, prompt, images, max_tokens=20, logits_processors=[press], **options)


def test_a_question_alone_takes_what_generate_takes(roomy):
    answer = ask(ChatSession(*roomy), "Why?", SQUARE)
    assert answer.counters == generate(*roomy, "Why?", SQUARE, max_tokens=4).counters
    assert answer.counters.vision_calls == answer.counters.router_calls == 1
    assert (answer.counters.prefilled, answer.counters.reused) == (answer.prompt_tokens, 0)


def test_generate_counts_its_work(roomy):
    assert generate(*roomy, "Why?", max_tokens=1).counters.vision_calls == 0
    both = generate(*roomy, "Why?", [SQUARE, WIDE], max_tokens=1).counters
    assert (both.vision_calls, both.router_calls) == (2, 2)
    forced = generate(*roomy, "Why?", SQUARE, granularity=4, max_tokens=1).counters
    assert (forced.vision_calls, forced.router_calls) == (1, 0)


def test_a_second_question_needs_no_vision_but_the_router(roomy):
    session = ChatSession(*roomy)
    ask(session, "Why?", SQUARE)
    counters = ask(session, "Where is it?").counters
    assert (counters.vision_calls, counters.router_calls) == (0, 1)


def test_with_the_same_granularity_only_the_new_tokens_are_prefilled(ending):
    session = ChatSession(*ending)
    first = ask(session, "Why?", SQUARE, granularity=8, **says(THE, THE, EOS))
    assert first.finish_reason == "stop"
    second = ask(session, "Where is it?", granularity=8)
    assert second.counters.reused == first.prompt_tokens + len(first.token_ids)
    assert second.counters.prefilled == second.prompt_tokens - second.counters.reused > 0
    asked = ending[1].decode(second.prompt_token_ids[-second.counters.prefilled :])
    assert asked == "USER: Where is it? ASSISTANT:"


def test_an_answer_that_was_cut_off_is_reused_but_for_its_end(ending):
    session = ChatSession(*ending)
    first = ask(session, "Why?", SQUARE, granularity=8, **says(THE, THE))
    second = ask(session, "Where is it?", granularity=8)
    assert second.counters.reused == first.prompt_tokens + len(first.token_ids)
    assert second.prompt_token_ids[-second.counters.prefilled] == EOS


@pytest.mark.parametrize("other", [1, 16])
def test_with_another_granularity_everything_from_the_image_on_is_prefilled(roomy, other):
    session = ChatSession(*roomy)
    ask(session, "Why?", SQUARE, granularity=8)
    second = ask(session, "Where is it?", granularity=other)
    assert second.counters.reused == before_image(second)
    assert second.counters.vision_calls == 0


def test_nothing_of_an_image_is_reused_for_another(roomy):
    session = ChatSession(*roomy)
    ask(session, "Why?", SQUARE, granularity=8)
    session.clear()
    swapped = ask(session, "Why?", NEGATIVE, granularity=8)
    assert swapped.counters.reused == before_image(swapped)
    assert swapped.counters.vision_calls == 1
    fresh = generate(*roomy, "Why?", NEGATIVE, granularity=8, max_tokens=4)
    assert swapped.token_ids == fresh.token_ids
    assert fresh.token_ids != generate(*roomy, "Why?", SQUARE, granularity=8, max_tokens=4).token_ids


def test_an_image_that_comes_back_is_not_seen_again(roomy):
    session = ChatSession(*roomy)
    for photo, seen in ((SQUARE, 1), (WIDE, 1), (SQUARE, 0), (WIDE, 0)):
        session.clear()
        assert ask(session, "Why?", photo).counters.vision_calls == seen


def test_the_same_question_again_prefills_its_last_position(roomy):
    session = ChatSession(*roomy)
    first = ask(session, "Why?", SQUARE)
    session.clear()
    again = ask(session, "Why?", SQUARE)
    assert again.token_ids == first.token_ids
    assert (again.counters.prefilled, again.counters.vision_calls) == (1, 0)


def test_a_later_image_leaves_what_is_before_it(roomy):
    session = ChatSession(*roomy)
    first = ask(session, "Why?", SQUARE, granularity=4)
    second = ask(session, "And this?", TALL, granularity=4)
    assert second.counters.reused >= first.prompt_tokens
    assert second.counters.vision_calls == 1
    assert [view.crops for view in second.views] == [5, 3]


def test_features_that_were_dropped_are_computed_again(roomy):
    frugal = ChatSession(*roomy, vision_cache_bytes=0)
    ask(frugal, "Why?", SQUARE, granularity=8)
    second = ask(frugal, "Where?", granularity=8)
    assert second.counters.vision_calls == 1
    assert second.counters.reused > before_image(second)


class Spy:
    def __init__(self):
        self.seen = []

    def __call__(self, tokens, logits):
        self.seen.append(tokens.tolist())
        return logits


def test_logits_processors_see_what_was_not_prefilled_too(roomy):
    session, notes = ChatSession(*roomy), Notes(roomy)
    for prompt, images in (("Why?", [SQUARE]), ("Where?", [])):
        ours, theirs = Spy(), Spy()
        reused = ask(session, prompt, images, logits_processors=[ours], granularity=4).counters.reused
        notes.ask(prompt, images, logits_processors=[theirs], granularity=4, max_tokens=4)
        assert ours.seen == theirs.seen
    assert reused > 0


@pytest.mark.parametrize("options", [{"max_kv_size": 60}, {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 0}])
def test_rotating_and_quantized_caches_start_afresh(roomy, options):
    session, notes = ChatSession(*roomy), Notes(roomy)
    for prompt, images, extra in (("Why?", [SQUARE], {}), ("Where?", [], options), ("When?", [], options)):
        ours = ask(session, prompt, images, **extra)
        assert ours.token_ids == notes.ask(prompt, images, max_tokens=4, **extra).token_ids
        assert ours.counters.reused == 0
    plain = ask(session, "What?")
    assert plain.token_ids == notes.ask("What?", [], max_tokens=4).token_ids
    assert plain.counters.reused > 0


def test_an_abandoned_answer_leaves_the_conversation_as_it_was_and_its_kv(roomy):
    session = ChatSession(*roomy)
    first = ask(session, "Why?", SQUARE, granularity=8)
    before = list(session.messages), list(session.images)
    segments = session.ask("Where?", WIDE, granularity=8, max_tokens=30)
    for _ in range(3):
        next(segments)
    segments.close()
    assert (session.messages, session.images) == before
    again = ask(session, "Where?", WIDE, granularity=8)
    assert again.counters.prefilled == 1
    assert again.prompt_tokens > first.prompt_tokens


def test_ctrl_c_leaves_the_conversation_as_it_was_and_no_kv(roomy):
    session = ChatSession(*roomy)
    ask(session, "Why?", SQUARE)
    before = list(session.messages), list(session.images)
    interrupt(session, "Where?", [WIDE], after=3)
    assert (session.messages, session.images) == before
    counters = ask(session, "Where?").counters
    assert (counters.reused, counters.vision_calls) == (0, 0)


def test_two_answers_at_a_time_do_not_mix(roomy):
    session, options = ChatSession(*roomy), {"max_tokens": 6, "granularity": 8}
    ask(session, "Hello", granularity=8)
    one, other = session.ask("Why?", SQUARE, **options), session.ask("Where?", WIDE, **options)
    before = session.messages
    *_, last = zip(one, other, strict=True)
    for segment, prompt, photo in zip(last, ("Why?", "Where?"), (SQUARE, WIDE), strict=True):
        messages = [*before, {"role": "user", "content": f"<image>\n{prompt}"}]
        assert segment.answer.token_ids == generate(*roomy, messages, photo, **options).token_ids


@pytest.mark.parametrize("tokens", [(EOS,), (29871, EOS)], ids=["nothing", "a space"])
def test_an_answer_without_text_leaves_no_trace(ending, tokens):
    tokens = [token if token < 512 else ending[1].convert_tokens_to_ids("▁") for token in tokens]
    session = ChatSession(*ending)
    assert not ask(session, "Why?", SQUARE, **says(*tokens)).text.strip()
    assert (session.messages, session.images) == ([], [])
    assert ask(session, "Where?", **says(THE, EOS)).text == "the"


def test_an_answer_that_spells_a_placeholder_is_no_image(ending):
    tokenizer = ending[1]
    session = ChatSession(*ending)
    spelled = tokenizer.encode("a <image> b", add_special_tokens=False)
    assert "<image>" in ask(session, "Why?", SQUARE, **says(*spelled, EOS)).text
    assert "<image>" not in session.messages[-1]["content"]
    assert ask(session, "Where?", **says(THE, EOS)).text == "the"


@pytest.mark.parametrize(
    ("prompt", "image", "options", "words"),
    [
        ("", None, {}, "prompt is empty"),
        ("<image> What?", None, {}, "1 <image>, but 0 images"),
        ("What?", "absent.png", {}, "no image at absent.png"),
        ("What?", b"no image", {}, "not an image"),
        ("What?", WIDE, {"granularity": 3}, "granularity is 3"),
        ("What?", WIDE, {"max_visual_tokens": 1}, "no granularity fits into 1"),
        ("What?", WIDE, {"max_tokens": 0}, "max_tokens is 0"),
        ("What? " * 4000, None, {}, "but the model has 4096"),
    ],
)
def test_what_cannot_be_asked_changes_nothing(roomy, prompt, image, options, words):
    session = ChatSession(*roomy)
    first = ask(session, "Why?", SQUARE, granularity=8)
    before = list(session.messages), list(session.images)
    with pytest.raises(InputError, match=words):
        ask(session, prompt, image, **options)
    assert (session.messages, session.images) == before
    assert ask(session, "Where?", granularity=8).counters.reused > first.prompt_tokens - 2


def test_a_system_prompt_and_a_pixel_limit_are_the_sessions(roomy):
    session = ChatSession(*roomy, system_prompt="Be brief.", max_pixels=SQUARE.width * SQUARE.height)
    answers = [ask(session, "Why?", SQUARE), ask(session, "Where?")]
    assert answers[0].token_ids == generate(*roomy, "Why?", SQUARE, system_prompt="Be brief.", max_tokens=4).token_ids
    for answer in answers:
        assert roomy[1].decode(answer.prompt_token_ids[1 : before_image(answer)]).startswith("Be brief. USER:")
    with pytest.raises(InputError, match="above the limit"):
        ask(session, "Why?", SQUARE.resize((101, 100)))


def test_messages_and_images_are_what_generate_takes(roomy):
    session = ChatSession(*roomy)
    ask(session, "Why?", SQUARE)
    ask(session, "<image> or <image>?", [WIDE, TALL])
    messages = [*session.messages, {"role": "user", "content": "So?"}]
    theirs = generate(*roomy, messages, [SQUARE, WIDE, TALL], max_tokens=4)
    assert ask(session, "So?").token_ids == theirs.token_ids
    assert theirs.prompt_token_ids.count(PLACEHOLDER_ID) == 3


def test_the_examples_of_the_docs_run(converted, capsys):
    page = (ROOT / "docs" / "chat.md").read_text(encoding="utf-8")
    conversation, batch = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for code in (conversation, batch):
        code = code.replace('"mlx_model"', repr(str(converted))).replace('"photo.jpg"', repr(str(PHOTO)))
        names: dict = {}
        exec(compile(code, "chat.md", "exec"), names)
        out = capsys.readouterr().out
        answer = names["answer"] if "answer" in names else names["segment"].answer
        assert answer.text in out
