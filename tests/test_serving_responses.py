"""OpenAI's responses API: stateless, whole and as a sequence of events."""

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from serving import TALL, WIDE, data_uri, serving

from avg_mlx import generate, load

EVENT = TypeAdapter(ResponseStreamEvent)


@pytest.fixture(scope="module")
def own(tiny_folder):
    model, tokenizer = load(tiny_folder)
    tokenizer.eos_token_ids = set()
    return model, tokenizer


@pytest.fixture(scope="module")
def server(own):
    with serving(own) as server:
        yield server


def asked(text: str, *images: bytes, detail: str = "auto") -> list:
    parts = [{"type": "input_image", "image_url": data_uri(image), "detail": detail} for image in images]
    return [{"role": "user", "content": [{"type": "input_text", "text": text}, *parts]}]


def test_a_response_is_what_generate_gives(server, own):
    expected = generate(*own, "What is this?", WIDE, max_tokens=8, system_prompt="Be brief.")
    body = {"input": asked("What is this?", WIDE), "instructions": "Be brief.", "max_output_tokens": 8}
    response = server.openai.responses.create(model="tiny", **body)
    assert response.output_text == expected.text
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.usage.input_tokens == expected.prompt_tokens
    assert response.usage.output_tokens == 8
    told = server.post(body, "/v1/responses").json()
    Response.model_validate(told)
    assert told["avg"]["images"][0]["granularity"] == expected.views[0].granularity
    assert told["usage"]["input_tokens_details"]["image_tokens"] == expected.views[0].visual_tokens


def test_a_text_alone_is_an_input(server, own):
    expected = generate(*own, "Tell me a story.", max_tokens=6).text
    response = server.openai.responses.create(input="Tell me a story.", max_output_tokens=6)
    assert response.output_text == expected


def test_a_conversation_is_sent_whole(server, own):
    turns = [*asked("What is this?", TALL), {"role": "assistant", "content": [{"type": "output_text", "text": "A."}]}]
    messages = [
        {"role": "user", "content": "<image>\nWhat is this?"},
        {"role": "assistant", "content": "A."},
        {"role": "user", "content": "Really?"},
    ]
    expected = generate(*own, messages, TALL, max_tokens=6).text
    response = server.openai.responses.create(
        model="tiny", input=[*turns, {"type": "message", "role": "user", "content": "Really?"}], max_output_tokens=6
    )
    assert response.output_text == expected


def test_the_events_of_a_stream_come_in_order_and_have_their_types(server, own):
    expected = generate(*own, "What is this?", WIDE, max_tokens=8).text
    body = {"input": asked("What is this?", WIDE), "max_output_tokens": 8, "top_logprobs": 2}
    events = server.chunks(body, "/v1/responses")
    for event in events:
        EVENT.validate_python(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * len(deltas),
        *("output_text.done", "content_part.done", "output_item.done", "incomplete"),
    ]
    assert "".join(event["delta"] for event in deltas) == expected == events[-4]["text"]
    assert events[0]["response"]["avg"]["images"][0]["visual_tokens"] > 0
    final = events[-1]["response"]
    assert final["output"][0]["content"][0]["text"] == expected
    assert len(final["output"][0]["content"][0]["logprobs"]) == 8
    assert final["id"] == events[0]["response"]["id"]
    with server.openai.responses.stream(model="tiny", input="Tell me.", max_output_tokens=4) as stream:
        assert next(event.type for event in stream) == "response.created"


def user(part: dict) -> list:
    return [{"role": "user", "content": [part]}]


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format.type"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]},
            "input[0].content[0].type",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
            "input[0].content[0].file_id",
        ),
        ({"input": ""}, "input.content"),
    ],
)
def test_what_is_not_done_is_refused_by_name(server, options, param):
    with pytest.raises(openai.BadRequestError) as error:
        server.openai.responses.create(model="tiny", **{"input": "Why?"} | options)
    assert error.value.param == param


def test_a_fault_in_the_middle_is_told_in_the_stream(own, monkeypatch):
    with serving(own) as server:
        decoder = type(server.engine._core.decoder)
        step, calls = decoder.step, []

        def third_fails(self, *args):
            calls.append(1)
            if len(calls) == 3:
                raise RuntimeError("broken")
            return step(self, *args)

        monkeypatch.setattr(decoder, "step", third_fails)
        *_, error, failed = server.chunks({"input": "Tell me a story."}, "/v1/responses")
        EVENT.validate_python(error)
        EVENT.validate_python(failed)
        assert (error["type"], failed["type"]) == ("error", "response.failed")
        assert failed["response"]["error"]["message"] == error["message"]
