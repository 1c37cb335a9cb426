"""Requests are read without loss: what each field becomes, and that nothing else than a refusal comes of bad ones."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avg_mlx.config import Config
from avg_mlx.inference.options import AUTO, Looking
from avg_mlx.inference.sampling import Sampling
from avg_mlx.inputs.prompt import PLACEHOLDER
from avg_mlx.serving import chat_completions, responses
from avg_mlx.serving.asking import Defaults, read_looking
from avg_mlx.serving.conversation import read_conversation
from avg_mlx.serving.fields import Fields
from avg_mlx.serving.problems import Problem

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
URL = "data:image/png;base64,AAAA"


@pytest.fixture(scope="module")
def config(tiny) -> Config:
    return tiny[0].config


def image(url: str = URL, **more) -> dict:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def said(text: str) -> dict:
    return {"type": "text", "text": text}


def read(*messages: dict, system_prompt: str | None = None):
    return read_conversation([Fields(message, f"messages[{n}]") for n, message in enumerate(messages)], system_prompt)


@pytest.mark.parametrize(
    ("parts", "written"),
    [
        ([said("Why?")], "Why?"),
        ([image(), said("Why?")], "<image>\nWhy?"),
        ([said("Why?"), image()], "<image>\nWhy?"),
        ([said("Why?"), image(), image()], "<image>\n<image>\nWhy?"),
        ([said("One:"), image(), said("two?")], "One:\n<image>\ntwo?"),
        ([image(), said("or"), image()], "<image>\nor\n<image>"),
        ([said("a"), said("b")], "a\nb"),
    ],
)
def test_images_stand_where_they_were_named_or_in_front(parts, written):
    conversation = read({"role": "user", "content": parts})
    assert [dict(message) for message in conversation.messages] == [{"role": "user", "content": written}]
    assert len(conversation.images) == written.count(PLACEHOLDER)


@given(st.lists(st.one_of(TEXT.map(said), st.just(image()))))
def test_there_is_a_placeholder_for_each_image_whatever_is_written(parts):
    content = [*parts, said("<image>")]
    conversation = read({"role": "user", "content": content})
    images = sum(part["type"] == "image_url" for part in content)
    assert "".join(message["content"] for message in conversation.messages).count(PLACEHOLDER) == images
    assert len(conversation.images) == images


def test_system_messages_come_first_and_are_joined():
    user = {"role": "user", "content": "Why?"}
    system, developer = {"role": "system", "content": "Be brief."}, {"role": "developer", "content": "Rhyme."}
    assert read(system, developer, user).messages[0] == {"role": "system", "content": "Be brief.\n\nRhyme."}
    assert read(user, system_prompt="Ours.").messages[0] == {"role": "system", "content": "Ours."}
    assert read(system, user, system_prompt="Ours.").messages[0] == system
    with pytest.raises(Problem) as refused:
        read(user, system)
    assert refused.value.param == "messages[1].role"


@pytest.mark.parametrize(
    ("detail", "fields", "defaults", "expected"),
    [
        ("auto", {}, Looking(granularity=4), Looking(granularity=4)),
        ("auto", {"granularity": 2}, Looking(max_visual_tokens=9), Looking(granularity=2)),
        ("auto", {"granularity": "auto"}, Looking(granularity=4), Looking()),
        ("auto", {"granularity": "auto"}, Looking(max_visual_tokens=9), Looking(max_visual_tokens=9)),
        ("auto", {"max_visual_tokens": 9}, Looking(granularity=4), Looking(max_visual_tokens=9)),
        ("auto", {"token_cost": 2}, Looking(max_visual_tokens=9), Looking(AUTO, 9, 2.0)),
        ("low", {}, Looking(max_visual_tokens=9), Looking(granularity=1)),
        ("high", {}, Looking(token_cost=3), Looking(granularity=16)),
        ("original", {"granularity": 2}, Looking(), Looking(granularity=16)),
        ("low", {"max_visual_tokens": 9}, Looking(), Looking(1, 9)),
    ],
)
def test_detail_goes_before_the_request_and_the_request_before_the_defaults(config, detail, fields, defaults, expected):
    assert read_looking(Fields(fields), detail, defaults, config) == expected


def test_every_field_has_its_place_in_the_job(config):
    body = {
        "messages": [{"role": "user", "content": "Why?"}],
        "max_tokens": 5,
        "max_completion_tokens": 7,
        "temperature": 0.5,
        "top_p": 0,
        "top_k": 3,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "seed": -1,
        "stop": "x",
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "logit_bias": {"5": 2, "6": None},
        "logprobs": True,
        "top_logprobs": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    asked = chat_completions.read(Fields(body), Defaults(sampling=Sampling(min_tokens_to_keep=4)), config, "tiny")
    job, sampling = asked.job, asked.job.sampling
    assert (job.max_tokens, job.stop, job.logprobs, job.logit_bias) == (7, ("x",), 2, {5: 2.0})
    assert (job.presence_penalty, job.frequency_penalty) == (1, -1)
    assert (sampling.temp, sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (0.5, 3, 0.1, 1.1)
    assert (sampling.seed, sampling.min_tokens_to_keep) == (2**64 - 1, 4)
    assert 0 < sampling.top_p < 1e-6  # mlx-lm takes 0 for off, OpenAI for the likeliest token alone
    assert (asked.stream, asked.include_usage) == (True, True)
    job.check(config)


def outcome(function, *arguments):
    """What a function returns, or the problem that it raises."""
    try:
        return function(*arguments)
    except Problem as problem:
        return problem


FIELDS = st.sampled_from(
    [
        *("messages", "input", "model", "granularity", "max_visual_tokens", "token_cost", "max_tokens", "temperature"),
        *("max_completion_tokens", "max_output_tokens", "top_p", "top_k", "min_p", "seed", "stop", "logit_bias"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty", "logprobs", "top_logprobs", "stream", "n"),
        *("stream_options", "tools", "tool_choice", "response_format", "text", "include", "instructions", "audio"),
        *("modalities", "background", "previous_response_id", "conversation", "prompt", "function_call"),
    ]
)


@given(st.dictionaries(FIELDS, JSON, max_size=6), st.booleans())
def test_any_json_is_read_or_refused_by_name(config, values, whole):
    """And nothing else is raised: that would be a fault of ours."""
    good = {"messages": [{"role": "user", "content": "Why?"}], "input": "Why?"} if whole else {}
    for reading in (chat_completions.read, chat_completions.read_route, responses.read):
        asked = outcome(reading, Fields(good | values), Defaults(), config, "tiny")
        if isinstance(asked, Problem):
            assert 400 <= asked.status < 500
            assert asked.param
        else:
            assert len(asked.images) == len(asked.job.looking)


@given(st.lists(JSON, max_size=3))
def test_any_content_is_read_or_refused_by_name(parts):
    conversation = outcome(read, {"role": "user", "content": parts})
    if isinstance(conversation, Problem):
        assert conversation.status == 400
        assert conversation.param.startswith("messages[0].content")
    else:
        assert len(conversation.messages) == 1
