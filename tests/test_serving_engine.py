"""The engine's answers are those of one-by-one greedy decoding, whoever comes, goes, or fails beside them."""

import random

import pytest
from engine_clients import SQUARE, TALL, WIDE, Client, Question, answer_all, ask, empty, finish, make_core, same

from avg_mlx import generate, load
from avg_mlx.inference.options import Looking
from avg_mlx.inference.steps import prepare
from avg_mlx.serving.engine.sizing import Sizing
from avg_mlx.serving.jobs import Done, Failed, Job, Piece, Routed

QUESTIONS = [
    Question("Why?", (WIDE,)),
    Question("What is the long answer to this long question about the sign?", (SQUARE,), (16,), {"max_tokens": 3}),
    Question("Why?", options={"max_tokens": 7}),
    Question("Which?", (TALL, WIDE), options={"max_tokens": 20}),
    Question("Where?", (SQUARE,), (1,), {"max_tokens": 1}),
    Question("See <image>. Why?", (TALL,), (4,), {"max_tokens": 9}),
    Question("<image> or <image>?", (SQUARE, SQUARE), (2, 2), {"max_tokens": 11}),
    Question("Why is it so?", (WIDE,), (16,), {"max_tokens": 15}),
]


@pytest.fixture(scope="module")
def stopping(tiny_folder):
    """(model, tokenizer) that ends some answers early: at what one of them says third."""
    model, tokenizer = load(tiny_folder)
    tokenizer.eos_token_ids = set()
    end = QUESTIONS[0].alone((model, tokenizer)).token_ids[2]
    tokenizer.eos_token_ids = {end}
    return model, tokenizer


@pytest.fixture(scope="module")
def endless(tiny_folder):
    """(model, tokenizer) whose answers go on to their limit."""
    model, tokenizer = load(tiny_folder)
    tokenizer.eos_token_ids = set()
    return model, tokenizer


@pytest.fixture(scope="module")
def expected(stopping):
    """The answers of `generate`."""
    return [question.alone(stopping) for question in QUESTIONS]


def test_answers_that_join_and_leave_are_those_that_each_has_alone(stopping, expected):
    """Thirty-two questions, each image and beginning several times, come between the steps of others."""
    assert {answer.finish_reason for answer in expected} == {"stop", "length"}
    core, config = make_core(stopping), stopping[0].config
    keep = core.prefixes.keep
    core.prefixes.keep = lambda keys, layers: keep(keys, layers) if len(keys) == layers[0].offset else 1 / 0
    chance, asked, together = random.Random(0), [], 0
    for n in chance.sample([*range(8)] * 4, 32):
        asked.append((n, ask(core, QUESTIONS[n].job(config))[0]))
        for _ in range(chance.randrange(6)):
            core.step()
            together = max(together, len(core.decoder))
    finish(core)
    for n, client in asked:
        same(client, expected[n])
    assert together > 1
    status = core.status()
    assert status.totals.outcomes == {"done": 32}
    assert status.totals.reused_positions > 0
    assert status.totals.vision_hits > status.totals.vision_calls == 3
    empty(core)


@pytest.mark.parametrize("slots", [1, 3])
def test_any_slots_give_the_same_answers(stopping, expected, slots):
    config = stopping[0].config
    clients = answer_all(make_core(stopping, slots=slots), [question.job(config) for question in QUESTIONS])
    for client, answer in zip(clients, expected, strict=True):
        same(client, answer)


def test_caches_of_no_size_change_nothing(stopping, expected):
    core = make_core(stopping, vision_bytes=0, prefix_bytes=0)
    clients = answer_all(core, [question.job(stopping[0].config) for question in QUESTIONS])
    for client, answer in zip(clients, expected, strict=True):
        same(client, answer)
    status = core.status()
    assert (status.vision_bytes, status.prefix_bytes, status.totals.reused_positions) == (0, 0, 0)


def test_a_prompt_that_was_prefilled_is_reused_while_its_answer_still_runs(stopping, expected):
    core, config = make_core(stopping), stopping[0].config
    first, _ = ask(core, QUESTIONS[0].job(config))
    while not len(core.decoder):
        core.step()
    second, _ = ask(core, QUESTIONS[0].job(config))
    finish(core)
    for client in (first, second):
        same(client, expected[0])
    positions = expected[0].prompt_tokens
    assert first.answer.counters.prefilled == positions
    assert (second.answer.counters.reused, second.answer.counters.vision_calls) == (positions - 1, 0)


@pytest.mark.parametrize("options", [{}, {"stop": ("e",)}], ids=["to its end", "to a stop text"])
def test_the_kv_of_an_answer_is_kept_for_the_turn_after_it(stopping, options):
    core, (model, tokenizer) = make_core(stopping), stopping
    question = QUESTIONS[5]
    [client] = answer_all(core, [question.job(model.config, **options)])
    prompt = prepare(model, tokenizer, question.text, list(question.images), Looking(granularity=4)).layout
    keys = [*prompt.position_keys(), *client.answer.token_ids]
    layers, held = core.prefixes.find([*keys, 7])
    assert held == len(keys) == layers[0].offset
    turns = [{"role": "user", "content": "See <image>. Why?"}, {"role": "assistant", "content": "So."}]
    turns.append({"role": "user", "content": "And?"})
    job = question.job(model.config)
    [next_turn] = answer_all(core, [Job(tuple(turns), job.images, job.looking, max_tokens=9)])
    same(next_turn, generate(*stopping, turns, list(question.images), granularity=4, max_tokens=9))
    assert next_turn.answer.counters.reused >= prompt.positions - 1


def test_each_image_is_looked_at_in_its_own_way(stopping):
    core = make_core(stopping)
    job = Question("Which?", (TALL, WIDE, SQUARE), (16, 1, "auto")).job(stopping[0].config)
    [client] = answer_all(core, [job])
    [routed, *_] = client.events
    assert [view.granularity for view in routed.views][:2] == [16, 1]
    assert [view.source for view in routed.views] == ["forced", "forced", "router"]
    assert routed.vision_calls == 3
    assert routed.image_positions == sum(view.visual_tokens for view in client.answer.views)


def test_routing_alone_takes_no_place_and_decodes_nothing(stopping):
    core = make_core(stopping, slots=1)
    [client] = answer_all(core, [QUESTIONS[0].job(stopping[0].config, route_only=True)])
    [routed] = client.events
    assert isinstance(routed, Routed)
    assert routed.views == QUESTIONS[0].alone(stopping).views
    assert core.status().totals.outcomes == {"routed": 1}
    assert core.status().prefix_bytes == 0
    empty(core)


STAGES = {
    "queued": lambda core, client: True,
    "looking": lambda core, client: core.status().preparing and not client.events,
    "prefill": lambda core, client: core.status().preparing and client.events,
    "decoding": lambda core, client: len(client.events) > 2,
}


@pytest.mark.parametrize("stage", STAGES)
def test_who_gives_up_frees_their_place_within_one_step(endless, stage):
    core, config = make_core(endless, slots=2, prefix_bytes=0), endless[0].config
    question = Question("Why is it so?", (WIDE,), (16,), {"max_tokens": 60})
    other, _ = ask(core, question.job(config))
    if stage != "queued":
        while core.status().preparing or not len(core.decoder):
            core.step()
    long = Question("Which one of them is it?", (TALL, WIDE), (16, 16), {"max_tokens": 200})
    client, ticket = ask(core, long.job(config))
    while not STAGES[stage](core, client):
        core.step()
    told = len(client.events)
    ticket.cancel()
    core.step()
    status = core.status()
    assert (status.waiting, len(client.events)) == (0, told)
    assert len(core.admission) == status.decoding
    assert status.decoding + status.preparing == 1  # the other one
    finish(core)
    same(other, question.alone(endless))
    assert core.status().totals.outcomes == {"done": 1, "cancelled": 1}
    empty(core)


def test_requests_given_up_at_random_leave_nothing_behind(stopping, expected):
    core, config, chance = make_core(stopping, slots=3), stopping[0].config, random.Random(1)
    asked, tickets = [], []
    for n in chance.sample([*range(8)] * 5, 40):
        client, ticket = ask(core, QUESTIONS[n].job(config))
        asked.append((n, client, ticket))
        tickets.append(ticket)
        for _ in range(chance.randrange(5)):
            core.step()
        if chance.random() < 0.3:
            tickets.pop(chance.randrange(len(tickets))).cancel()
    finish(core)
    for n, client, ticket in asked:
        if ticket.cancelled:
            assert not isinstance(client.last, Failed)
        else:
            same(client, expected[n])
    assert sum(core.status().totals.outcomes.values()) == 40
    assert core.status().totals.outcomes["cancelled"] > 3
    empty(core)


def test_a_client_that_cannot_be_told_has_given_up(stopping, expected, caplog):
    core, config = make_core(stopping), stopping[0].config
    broken, _ = ask(core, QUESTIONS[0].job(config))
    broken.__class__ = type("Broken", (Client,), {"__call__": lambda self, event: 1 / 0})
    other, _ = ask(core, QUESTIONS[7].job(config))
    finish(core)
    same(other, expected[7])
    assert core.status().totals.outcomes == {"cancelled": 1, "done": 1}
    assert "could not be delivered" in caplog.text
    empty(core)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"messages": ({"role": "user", "content": ""},)}, "prompt is empty"),
        ({"messages": ({"role": "user", "content": "Why? " * 300},)}, "but the model has 512"),
        ({"looking": (Looking(max_visual_tokens=1),)}, "no granularity fits"),
        ({"messages": ({"role": "user", "content": "<image><image>?"},)}, "2 <image>, but 1 image"),
        ({"max_tokens": 400}, "memory for"),
    ],
    ids=range(5),
)
def test_what_the_client_gave_fails_before_it_is_routed(stopping, expected, changes, words):
    core, config = make_core(stopping, kv_bytes=700 * Sizing.of(stopping[0]).per_position), stopping[0].config
    good = QUESTIONS[7].job(config)
    job = QUESTIONS[0].job(config)
    bad, _ = ask(core, Job(**{**vars(job), **changes}))
    other, _ = ask(core, good)
    finish(core)
    [failed] = bad.events
    assert isinstance(failed, Failed)
    assert (failed.kind, words in str(failed.error)) == ("input", True), failed.error
    same(other, expected[7])
    assert core.status().totals.outcomes == {"input": 1, "done": 1}
    assert core.status().vision_bytes > 0  # a client's mistake costs the others nothing
    empty(core)


def test_as_many_tokens_as_there_is_memory_for(endless):
    """A limit that is left to the server is bounded by its memory too."""
    core = make_core(endless, kv_bytes=(256 + 200) * Sizing.of(endless[0]).per_position)
    [client] = answer_all(core, [QUESTIONS[2].job(endless[0].config, max_tokens=-1)])
    answer = client.answer
    assert answer.prompt_tokens + len(answer.token_ids) - 1 == 200
    assert answer.finish_reason == "length"


def test_pieces_and_the_end_come_in_order(stopping):
    [client] = answer_all(make_core(stopping), [QUESTIONS[7].job(stopping[0].config)])
    assert [type(event) for event in client.events] == [Routed, *[Piece] * (len(client.events) - 2), Done]
    assert client.last.waited >= 0
