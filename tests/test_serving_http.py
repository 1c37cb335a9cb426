"""The server as OpenAI's own client sees it: the answers of `generate`, in the types that the client knows."""

import json
import re

import openai
import pytest
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from serving import SMALL, TALL, WIDE, chat, data_uri, question, serving

from avg_mlx import Sampling, generate, load, route
from avg_mlx.inference.options import Looking
from avg_mlx.serving.asking import Defaults


@pytest.fixture(scope="module")
def own(tiny_folder):
    """A model of its own: the engine's thread and the test's take turns."""
    model, tokenizer = load(tiny_folder)
    tokenizer.eos_token_ids = set()
    return model, tokenizer


@pytest.fixture(scope="module")
def server(own):
    with serving(own) as server:
        yield server


def alone(own, prompt, *images, **options):
    return generate(*own, prompt, list(images) or None, **{"max_tokens": 8} | options)


CASES = {
    "text": (chat("Tell me a story."), ("Tell me a story.",), {}),
    "image": (chat("What is this?", WIDE), ("What is this?", WIDE), {}),
    "two images": (chat("Which is wide?", WIDE, TALL), ("Which is wide?", WIDE, TALL), {}),
    "forced": (chat("What is this?", TALL, granularity=4), ("What is this?", TALL), {"granularity": 4}),
    "budget": (chat("Why?", WIDE, max_visual_tokens=20), ("Why?", WIDE), {"max_visual_tokens": 20}),
    "cost": (chat("Why?", WIDE, token_cost=50), ("Why?", WIDE), {"token_cost": 50}),
    "short": (chat("Why?", SMALL, max_completion_tokens=3), ("Why?", SMALL), {"max_tokens": 3}),
    "sampled": (
        chat("Go on.", temperature=2.0, seed=7, top_p=0.9),
        ("Go on.",),
        {"temp": 2.0, "seed": 7, "top_p": 0.9},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_answer_is_what_generate_gives(server, own, case):
    """Streamed and not; `model_validate` checks each object against OpenAI's types."""
    body, (prompt, *images), options = CASES[case]
    names = {"temp", "seed", "top_p"}
    sampling = Sampling(**{key: value for key, value in options.items() if key in names})
    rest = {key: value for key, value in options.items() if key not in names}
    expected = alone(own, prompt, *images, sampler=sampling.sampler(own[1]), **rest)
    whole = ChatCompletion.model_validate(server.post(body).json())
    assert whole.choices[0].message.content == expected.text
    assert whole.choices[0].finish_reason == expected.finish_reason
    assert whole.usage.prompt_tokens == expected.prompt_tokens
    assert whole.usage.completion_tokens == len(expected.token_ids)
    chunks = [ChatCompletionChunk.model_validate(chunk) for chunk in server.chunks(body)]
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == expected.text
    assert chunks[0].avg["visual_tokens"] == sum(view.visual_tokens for view in expected.views)
    assert [image["granularity"] for image in whole.avg["images"]] == [view.granularity for view in expected.views]


def test_a_stream_has_the_order_that_clients_rely_on(server):
    events = server.events(chat("What is this?", WIDE, stream_options={"include_usage": True}))
    assert events[-1] == "[DONE]"
    first, *middle, last, usage = map(json.loads, events[:-1])
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(set(chunk["choices"][0]["delta"]) == {"content"} for chunk in middle)
    assert last["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    assert usage["choices"] == []
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in (first, *middle, last, usage)}) == 1
    assert all(chunk["usage"] is None for chunk in (first, *middle, last))
    assert CompletionUsage.model_validate(usage["usage"]).total_tokens > 8


def test_usage_tells_image_text_and_cached_tokens_apart(server, own):
    view = route(*own, "How many are there?", TALL)[0]
    used = [
        server.openai.chat.completions.create(model="tiny", **chat("How many are there?", TALL)).usage for _ in "12"
    ]
    for usage in used:
        details = usage.prompt_tokens_details
        assert details.image_tokens == view.visual_tokens
        assert details.image_tokens + details.text_tokens == usage.prompt_tokens
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert used[1].prompt_tokens_details.cached_tokens > used[1].prompt_tokens / 2


def test_detail_says_how_closely_each_image_is_looked_at(server, own):
    granularities = own[0].config.granularities
    chosen = route(*own, "Which?", [WIDE] * 5)[0].granularity
    parts = [
        {"type": "image_url", "image_url": {"url": data_uri(WIDE)} | more}
        for more in ({}, {"detail": "auto"}, {"detail": "low"}, {"detail": "high"}, {"detail": "original"})
    ]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "Which?"}]}]
    answer = server.openai.chat.completions.create(model="tiny", messages=messages, max_tokens=2)
    images = answer.avg["images"]
    finest = max(granularities)
    assert [image["granularity"] for image in images] == [chosen, chosen, min(granularities), finest, finest]
    assert [image["source"] for image in images] == ["router", "router", "forced", "forced", "forced"]
    assert sum(images[0]["probabilities"].values()) == pytest.approx(1, abs=1e-5)


def test_what_the_request_says_goes_before_the_servers_defaults(own):
    with serving(own, defaults=Defaults(Looking(granularity=2, system_prompt="Be brief."), max_tokens=3)) as server:
        plain = server.post({"messages": [question("Why?", WIDE)]}).json()
        said = alone(own, "Why?", WIDE, granularity=2, system_prompt="Be brief.", max_tokens=3)
        assert plain["choices"][0]["message"]["content"] == said.text
        assert plain["usage"]["completion_tokens"] == 3
        budget = server.post({"messages": [question("Why?", WIDE)], "max_visual_tokens": 20}).json()
        assert budget["avg"]["images"][0]["source"] in ("router", "budget")
        own_system = [{"role": "system", "content": "Rhyme."}, question("Why?", WIDE)]
        answer = server.post({"messages": own_system, "max_tokens": 5}).json()
        said = alone(own, "Why?", WIDE, granularity=2, system_prompt="Rhyme.", max_tokens=5)
        assert answer["choices"][0]["message"]["content"] == said.text


def test_a_conversation_goes_on(server, own):
    """Turns, a second picture later, a system message, and images where the messages have them."""
    messages = [
        {"role": "developer", "content": "Be brief."},
        question("What is this?", WIDE),
        {"role": "assistant", "content": "A shape."},
        {"role": "user", "content": [{"type": "text", "text": "And this:"}, *question("?", TALL)["content"][::-1]]},
    ]
    expected = alone(
        own,
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "<image>\nWhat is this?"},
            {"role": "assistant", "content": "A shape."},
            {"role": "user", "content": "And this:\n<image>\n?"},
        ],
        WIDE,
        TALL,
    )
    answer = server.openai.chat.completions.create(model="tiny", messages=messages, max_tokens=8)
    assert answer.choices[0].message.content == expected.text
    assert answer.usage.prompt_tokens == expected.prompt_tokens


def test_a_placeholder_that_a_user_writes_is_text(server):
    written = server.post(chat("What does <image> mean?")).json()
    other = server.post(chat("What does ~image~ mean?")).json()
    assert written["avg"]["images"] == []
    assert written["usage"]["prompt_tokens"] >= other["usage"]["prompt_tokens"]
    both = server.post(chat("What does <image> mean here?", WIDE)).json()
    assert len(both["avg"]["images"]) == 1


def test_stop_texts_end_an_answer_and_do_not_belong_to_it(server, own):
    text = alone(own, "Tell me a story.", max_tokens=20).text
    stop = text[len(text) // 2 :][:3]
    for stops in (stop, [stop, "never"]):
        body = chat("Tell me a story.", stop=stops, max_tokens=20)
        choice = server.post(body).json()["choices"][0]
        assert choice["message"]["content"] == text[: text.index(stop)]
        assert choice["finish_reason"] == "stop"
        pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in server.chunks(body)]
        assert "".join(pieces) == text[: text.index(stop)]


def test_a_seed_repeats_an_answer(server):
    answers = [server.post(chat("Go on.", temperature=3.0, seed=seed, max_tokens=20)).json() for seed in (1, 1, 2, -1)]
    texts = [answer["choices"][0]["message"]["content"] for answer in answers]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_logprobs_are_those_of_the_tokens_that_were_chosen(server, own):
    body = chat("Tell me.", logprobs=True, top_logprobs=3)
    whole = ChatCompletion.model_validate(server.post(body).json())
    streamed = [ChatCompletionChunk.model_validate(chunk) for chunk in server.chunks(body)]
    tokens = whole.choices[0].logprobs.content
    pieces = [c.logprobs.content for chunk in streamed for c in chunk.choices if c.logprobs]
    assert [token.token for piece in pieces for token in piece] == [token.token for token in tokens]
    assert len(tokens) == whole.usage.completion_tokens == 8
    for token in tokens:  # greedy: the likeliest is chosen
        assert len(token.top_logprobs) == 3
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob)
        assert token.logprob <= 0


def test_penalties_and_biases_change_the_answer(server, own):
    plain = alone(own, "Tell me a story.", max_tokens=6)
    biased = server.post(chat("Tell me a story.", logit_bias={str(plain.token_ids[0]): -100}, max_tokens=6)).json()
    assert biased["choices"][0]["message"]["content"] != plain.text
    body = chat("Tell me a story.", logprobs=True, presence_penalty=2, frequency_penalty=2, max_tokens=20)
    penalized = server.post(body).json()["choices"][0]["logprobs"]["content"]
    free = server.post(body | {"presence_penalty": None, "frequency_penalty": 0}).json()["choices"][0]
    assert len({token["token"] for token in penalized}) >= len({t["token"] for t in free["logprobs"]["content"]})


def test_routing_comes_with_the_places_of_crops_and_tokens(server, own):
    told = server.post(chat("What is this?", WIDE, TALL), "/v1/route").json()
    views = route(*own, "What is this?", [WIDE, TALL])
    for image, view in zip(told["images"], views, strict=True):
        geometry = image["geometry"]
        assert (image["granularity"], image["visual_tokens"]) == (view.granularity, view.visual_tokens)
        kept = [(c["kept_rows"], c["kept_columns"]) for c in geometry["crops"]]
        cells = sum((rows[1] - rows[0]) * (columns[1] - columns[0]) for rows, columns in kept)
        assert cells + geometry["newlines"] == view.visual_tokens
        assert len(geometry["crops"]) == view.crops
    assert told["images"][0]["geometry"]["image_size"] == [50, 100]


def test_errors_are_those_that_the_client_knows(server):
    create = server.openai.chat.completions.create
    with pytest.raises(openai.BadRequestError, match="granularity is 37") as error:
        create(model="tiny", **chat("Why?", WIDE) | {"extra_body": {"granularity": 37}})
    assert error.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="n is 2") as error:
        create(model="tiny", n=2, **chat("Why?"))
    assert error.value.param == "n"
    with pytest.raises(openai.NotFoundError, match="gpt-4o") as error:
        create(model="gpt-4o", **chat("Why?"))
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as error:
        create(model="tiny", messages=[question("far too long " * 2000)])
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="not an image") as error:
        create(model="tiny", messages=[question("Why?", b"nonsense")])
    assert error.value.param == "messages[0].content[1].image_url.url"


def test_messages_that_say_nothing_are_no_obstacle(server):
    """Clients send back an empty answer, and an empty system prompt."""
    said = [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "So?"},
    ]
    for messages in (said, [{"role": "system", "content": ""}, *said[:1]], [{"role": "system", "content": " "}, *said]):
        response = server.post({"messages": messages, "max_tokens": 3})
        assert response.status_code == 200, response.text
    assert server.post({"messages": [{"role": "system", "content": ""}]}).status_code == 400


def test_a_fault_in_the_middle_of_a_stream_is_an_error_event(own, monkeypatch, caplog):
    """The client raises, and the next request is served."""
    with serving(own) as server:
        decoder = server.engine._core.decoder
        step = type(decoder).step
        calls = []

        def third_fails(self, *args):
            calls.append(1)
            if len(calls) == 3:
                raise RuntimeError("broken")
            return step(self, *args)

        monkeypatch.setattr(type(decoder), "step", third_fails)
        with pytest.raises(openai.APIError, match="its log says what") as error:
            list(server.openai.chat.completions.create(model="tiny", stream=True, **chat("Tell me a story.")))
        assert error.value.type == "server_error"
        assert "broken" not in str(error.value)
        assert re.search(r"the engine failed: RuntimeError at .*test_serving_http.py, line \d+", caplog.text)
        assert "broken" not in caplog.text
        assert server.post(chat("Why?")).status_code == 200


def test_the_models_are_listed(server):
    [model] = server.openai.models.list().data
    assert (model.id, model.object) == ("tiny", "model")
    assert server.openai.models.retrieve("tiny").avg["router"] is True
    with pytest.raises(openai.NotFoundError):
        server.openai.models.retrieve("gpt-4o")
