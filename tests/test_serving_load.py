"""Many clients at a time: every answer is what `generate` gives, and whoever hangs up leaves nothing behind."""

import asyncio
import gc
import random

import httpx
import mlx.core as mx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from serving import SMALL, TALL, WIDE, chat, serving, until

from avg_mlx import generate, load
from avg_mlx.serving.asking import Defaults
from avg_mlx.serving.jobs import EngineOptions

pytestmark = pytest.mark.slow

CLIENTS, REQUESTS, HANGING, EXAMPLES = 32, 500, 1000, 100
PATH = "/v1/chat/completions"
ASKED = [
    (("What is this?", WIDE), {}),
    (("What is this?", TALL), {"granularity": 1}),
    (("What is this?", WIDE), {"granularity": 16}),
    (("Which of the two is wide, and why is it so?", WIDE, TALL), {"granularity": 4}),
    (("Tell me a story.",), {}),
    (("Where?", SMALL), {"max_visual_tokens": 20}),
    (("Why?", SMALL), {"token_cost": 30}),
    (("Is the long question about this picture of any use to those who ask it?", TALL), {"granularity": 2}),
]
LENGTHS = (1, 5, 12, 30)


@pytest.fixture(scope="module")
def own(tiny_folder):
    return load(tiny_folder)


@pytest.fixture(scope="module")
def server(own):
    options = EngineOptions(slots=8, queue=64, prefill_step_size=32, kv_bytes=1 << 24, vision_bytes=1 << 20)
    with serving(own, options) as server:
        yield server


def body_of(n: int) -> dict:
    (prompt, *images), options = ASKED[n % len(ASKED)]
    length = LENGTHS[n // len(ASKED) % len(LENGTHS)]
    return chat(prompt, *images, **options, max_tokens=length, logprobs=True, stream=n % 3 == 0)


async def ask(client: httpx.AsyncClient, n: int) -> tuple[int, str, int]:
    """The status, the text and the number of tokens of an answer, streamed or not."""
    body = body_of(n)
    if not body["stream"]:
        response = await client.post(PATH, json=body)
        if response.status_code != 200:
            return response.status_code, response.text, 0
        answer = response.json()
        return 200, answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]
    text, tokens = "", 0
    async with client.stream("POST", PATH, json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                for choice in httpx.Response(200, text=line[6:]).json()["choices"]:
                    text += choice["delta"].get("content", "")
                    tokens += len((choice["logprobs"] or {}).get("content", ()))
        return response.status_code, text, tokens


async def by_clients(url: str, numbers, work) -> list:
    """Let `CLIENTS` clients do `work` on the numbers, each one after the other."""
    waiting, done = list(reversed(numbers)), []

    async def client() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=600) as http:
            while waiting:
                n = waiting.pop()
                done.append((n, await work(http, n)))

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return done


def test_five_hundred_answers_to_thirty_two_clients_are_those_of_generate(server, own):
    kinds = len(ASKED) * len(LENGTHS)
    answered = asyncio.run(by_clients(server.url, range(REQUESTS), ask))
    assert {status for _, (status, *_) in answered} == {200}
    expected = {}
    for n in range(kinds):
        (prompt, *images), options = ASKED[n % len(ASKED)]
        length = LENGTHS[n // len(ASKED)]
        answer = generate(*own, prompt, images or None, **options, max_tokens=length)
        expected[n] = (answer.text, len(answer.token_ids))
    assert len(answered) == REQUESTS
    for n, (_, text, tokens) in answered:
        assert (text, tokens) == expected[n % kinds], ASKED[n % len(ASKED)]
    assert server.idle


async def hang_up(client: httpx.AsyncClient, n: int, chance: random.Random) -> None:
    """Leave while the body is sent, while images are looked at, in the middle of a stream, or of an answer at once."""
    stage, body = chance.choice(("upload", "look", "stream", "answer")), body_of(n) | {"max_tokens": 200}

    async def halting():
        yield b'{"messages": '
        await asyncio.sleep(chance.random() / 50)
        raise httpx.WriteError("the client leaves")

    try:
        if stage == "upload":
            await client.post(PATH, content=halting(), headers={"Content-Type": "application/json"})
        elif stage == "stream":
            async with client.stream("POST", PATH, json=body | {"stream": True}) as response:
                lines = response.aiter_lines()
                for _ in range(chance.randrange(1, 20)):
                    await anext(lines, None)
        else:
            seconds = chance.random() * (0.05 if stage == "look" else 1.0)
            await client.post(PATH, json=body | {"stream": False}, timeout=httpx.Timeout(600, read=seconds))
    except httpx.HTTPError:
        pass


def test_a_thousand_requests_of_which_many_hang_up_leave_nothing_behind(server):
    chance = random.Random(0)
    leaving = set(chance.sample(range(HANGING), HANGING * 3 // 10))
    statuses = []

    async def work(client, n):
        if n in leaving:
            await hang_up(client, n, chance)
        else:
            statuses.append((await ask(client, n))[0])

    held = []
    for part in (range(HANGING // 5), range(HANGING // 5, HANGING)):  # the first fills caches and pools
        asyncio.run(by_clients(server.url, part, work))
        until(lambda: server.idle)
        gc.collect()
        status = server.engine.snapshot()
        held.append(mx.get_active_memory() - status.prefix_bytes - status.vision_bytes)
    assert set(statuses) == {200}
    assert len(statuses) == HANGING - len(leaving)
    assert server.engine.snapshot().totals.outcomes["cancelled"] > 0
    assert held[1] <= 1.05 * held[0]


def statuses_of(operation, mode: GenerationMode) -> set[int]:
    """The statuses that requests drawn for an endpoint get, none of them from 500."""
    statuses = set()

    @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy(generation_mode=mode))
    def draw(case) -> None:
        response = case.call(timeout=300)
        statuses.add(response.status_code)
        assert response.status_code < 500, response.text

    draw()
    return statuses


@pytest.mark.parametrize("mode", GenerationMode)
def test_no_request_that_the_description_allows_or_forbids_is_a_fault_of_ours(own, mode):
    """schemathesis draws requests from the OpenAPI text; what takes nothing cannot be given it wrongly."""
    positive = mode is GenerationMode.POSITIVE
    with serving(own, defaults=Defaults(max_tokens=4)) as server:
        found = schemathesis.openapi.from_url(f"{server.url}/openapi.json").get_all_operations()
        operations = {o.ok().path: o.ok() for o in found if positive or o.ok().body}
        statuses = {path: statuses_of(operation, mode) for path, operation in operations.items()}
        assert server.idle
        assert server.post(chat("Why?")).status_code == 200
    assert len(statuses) == (7 if positive else 3)  # schemathesis leaves the description itself out
    reached = set.union(*(told for path, told in statuses.items() if operations[path].body))
    assert (200 if positive else 400) in reached
