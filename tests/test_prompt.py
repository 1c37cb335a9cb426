"""The conversation template, where placeholders go, and ids around them."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avg_mlx import InputError
from avg_mlx.inputs.prompt import PLACEHOLDER_ID, build_messages, encode_messages, encode_text

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


def rendered(tokenizer, messages) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([user("Why?")], f"{SYSTEM} USER: Why? ASSISTANT:"),
        ([user("<image>\nWhy?")], f"{SYSTEM} USER: <image>\nWhy? ASSISTANT:"),
        (
            [user("<image>\nWhy?"), assistant("So."), user("How?"), assistant("Thus."), user("Who?")],
            f"{SYSTEM} USER: <image>\nWhy? ASSISTANT: So.</s>USER: How? ASSISTANT: Thus.</s>USER: Who? ASSISTANT:",
        ),
        ([system("Be brief."), user("Why?")], "Be brief. USER: Why? ASSISTANT:"),
    ],
    ids=["single turn", "image", "multi turn", "system prompt"],
)
def test_chat_template_is_vicuna_v1(tokenizer, messages, text):
    assert rendered(tokenizer, messages) == text


def test_a_finished_conversation_ends_with_its_answer(tokenizer):
    messages = [user("Why?"), assistant("So.")]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    assert text == f"{SYSTEM} USER: Why? ASSISTANT: So.</s>"


@pytest.mark.parametrize(
    ("prompt", "images", "contents"),
    [
        ("Why?", 0, ["Why?"]),
        ("Why?", 1, ["<image>\nWhy?"]),
        ("Why?", 2, ["<image>\n<image>\nWhy?"]),
        ("Is <image> like <image>?", 2, ["Is <image> like <image>?"]),
        ("Why? <image>", 1, ["Why? <image>"]),
        ([user("One?"), assistant("1"), user("Two?")], 1, ["<image>\nOne?", "1", "Two?"]),
        ([user("One?"), assistant("1"), user("<image>Two?")], 1, ["One?", "1", "<image>Two?"]),
        ([user("<image>One?"), assistant("1"), user("<image>Two?")], 2, ["<image>One?", "1", "<image>Two?"]),
        ([system("Be brief."), user("Why?")], 1, ["Be brief.", "<image>\nWhy?"]),
    ],
)
def test_every_image_gets_one_placeholder(prompt, images, contents):
    before = copy.deepcopy(prompt)
    messages = build_messages(prompt, images)
    assert [message["content"] for message in messages] == contents
    if not isinstance(prompt, str):
        assert [message["role"] for message in messages] == [message["role"] for message in prompt]
    assert prompt == before  # the caller's messages are left alone


@pytest.mark.parametrize("prompt", ["Why?", [user("Why?")], [system("Be long."), user("Why?")]])
@pytest.mark.parametrize("text", ["Be brief.", ""])
def test_a_system_prompt_replaces_the_conversations(prompt, text):
    assert build_messages(prompt, 0, system_prompt=text) == [system(text), user("Why?")]


def test_an_answer_may_be_empty():
    messages = [user("Why?"), assistant(""), user("So?")]
    assert build_messages(messages, 0) == messages


@pytest.mark.parametrize(
    ("prompt", "images", "words"),
    [
        ("", 0, "prompt is empty"),
        (" \n\t", 1, "prompt is empty"),
        ("<image>", 1, "prompt is empty"),
        ("<image> \n <image>", 2, "prompt is empty"),
        ([], 0, "prompt is empty"),
        ([user("Why?"), assistant("So."), user(" ")], 0, "prompt is empty"),
        ([system(""), user("Why?")], 0, "prompt is empty"),
        ([{"role": "user"}], 0, r"message 1 is .*expected role \(system, user, assistant\) and content"),
        ([{"content": "Why?"}], 0, "message 1 is .*expected role"),
        ([{"role": "user", "content": [{"type": "text"}]}], 0, "message 1 is .*expected role"),
        ([user("Why?"), {"role": "tool", "content": "42"}], 0, "message 2 is .*expected role"),
        ([user("Why?"), system("Be brief.")], 0, r"message 2 is .*expected role \(user, assistant\)"),
        ([system("Be brief.")], 0, "no user message"),
        ([assistant("So.")], 1, "no user message"),
        ("<image> Why?", 0, "1 <image>, but 0 images"),
        ("<image> <image> Why?", 1, "2 <image>, but 1 images"),
        ("<image> Why?", 3, "1 <image>, but 3 images"),
        ([user("<image> Why?"), assistant("So."), user("<image> How?")], 1, "2 <image>, but 1 images"),
    ],
)
def test_prompts_that_are_refused(prompt, images, words):
    with pytest.raises(InputError, match=words):
        build_messages(prompt, images)


class Letters:
    """A tokenizer of one id a character, that puts BOS in front."""

    bos_token_id = 1

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [ord(letter) for letter in text]


@given(st.lists(st.text("abc ▁\n"), min_size=1, max_size=6))
def test_each_piece_is_tokenized_by_itself_and_only_the_first_keeps_bos(pieces):
    expected = [1] + [ord(letter) for letter in pieces[0]]
    for piece in pieces[1:]:
        expected += [PLACEHOLDER_ID, *(ord(letter) for letter in piece)]
    assert encode_text(Letters(), "<image>".join(pieces)) == expected


def test_a_tokenizer_without_bos_loses_nothing():
    class Bare(Letters):
        bos_token_id = None

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [ord(letter) for letter in text]

    assert encode_text(Bare(), "a<image>b") == [ord("a"), -200, ord("b")]


def test_a_conversation_is_encoded_awaiting_its_answer(tokenizer):
    ids = encode_messages(tokenizer, [user("<image>\nWhy?")])
    assert ids.count(PLACEHOLDER_ID) == 1
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode([i for i in ids if i >= 0]).endswith("Why? ASSISTANT:")
