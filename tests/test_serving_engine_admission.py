"""What runs together: never more than slots and memory allow, and nobody waits for ever."""

import mlx.core as mx
import pytest
from engine_clients import SQUARE, TALL, WIDE, Question, answer_all, ask, empty, finish, make_core
from hypothesis import given, settings
from hypothesis import strategies as st

from avg_mlx import InputError
from avg_mlx.serving.engine.admission import KV_STEP, Admission
from avg_mlx.serving.engine.queue import Queue
from avg_mlx.serving.engine.sizing import Sizing
from avg_mlx.serving.engine.work import Work
from avg_mlx.serving.jobs import Job

requests = st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 30)), max_size=40)


@given(requests, st.integers(1, 8), st.integers(KV_STEP + 1, 20_000))
def test_any_requests_stay_within_slots_and_bytes_and_all_are_admitted(asked, slots, limit):
    """Requests of some positions each run for some steps, in the order they came."""
    admission, running = Admission(slots, limit), {}
    waiting = [(n, size, steps) for n, (size, steps) in enumerate(asked) if size <= admission.longest]
    admitted = 0
    while waiting or running:
        if waiting and admission.admit(waiting[0][0], waiting[0][1]):
            n, size, steps = waiting.pop(0)
            running[n], admitted = (size, steps), admitted + 1
        padded = len(running) * max([size + KV_STEP for size, _ in running.values()], default=0)
        assert padded == admission.positions <= limit
        assert len(running) == len(admission) <= slots
        assert running or not waiting  # whoever is alone gets in
        running = {n: (size, steps - 1) for n, (size, steps) in running.items()}
        for n in [n for n, (_, steps) in running.items() if not steps]:
            del running[n]
            admission.release(n)
    assert admitted == sum(size <= admission.longest for size, _ in asked)


def test_releasing_what_was_not_admitted_changes_nothing():
    admission = Admission(1, 1000)
    assert admission.admit("a", 10)
    admission.release("b")
    assert not admission.admit("b", 10)
    admission.release("a")
    assert admission.admit("b", 10)


@given(st.lists(st.sampled_from(["offer", "take", "cancel"]), max_size=60), st.integers(1, 5))
def test_a_queue_keeps_order_and_bound(actions, limit):
    queue, model, job = Queue(limit), [], Job(())
    for action in actions:
        if action == "offer":
            work = Work(job, lambda event: None, lambda: None)
            assert queue.offer(work) == (len(model) < limit)
            model += [work] if len(model) < limit else []
        elif action == "take":
            assert queue.take() is (model.pop(0) if model else None)
        elif model:
            model[len(model) // 2].cancel()
            assert queue.take_cancelled() == [model.pop(len(model) // 2)]
        assert len(queue) == len(model)


QUESTIONS = [
    Question("Why?", (WIDE,), (1,), {"max_tokens": 5}),
    Question("Which?", (TALL, WIDE, SQUARE), (16, 16, 16), {"max_tokens": 30}),
    Question("Who?", options={"max_tokens": 200}),
    Question("What is it?", (SQUARE,), (2,), {"max_tokens": 12}),
]


@settings(max_examples=8)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.integers(1, 4), st.integers(800, 3000))
def test_running_batches_hold_no_more_kv_than_they_may(tiny, asked, slots, positions):
    per_position = Sizing.of(tiny[0]).per_position
    limit = positions * per_position
    core, config = make_core(tiny, slots=slots, kv_bytes=limit, prefix_bytes=0), tiny[0].config
    clients = [ask(core, QUESTIONS[n].job(config))[0] for n in asked]
    while core.busy:
        core.step()
        assert core.status().kv_bytes <= core.admission.positions * per_position <= limit
    assert all(client.ended for client in clients)
    assert core.status().totals.outcomes == {"done": len(asked)}
    empty(core)


def test_kept_features_and_kv_stay_within_their_bytes(tiny):
    config, answered = tiny[0].config, []
    features = tiny[0].encode(QUESTIONS[0].job(config).images[0]).nbytes
    core = make_core(tiny, prefix_bytes=200 * Sizing.of(tiny[0]).per_position, vision_bytes=3 * features)
    for question in QUESTIONS * 2:
        answered.append(ask(core, question.job(config, max_tokens=9))[0])
    while core.busy:
        core.step()
        status = core.status()
        assert status.prefix_bytes <= 200 * Sizing.of(tiny[0]).per_position
        assert status.vision_bytes <= 3 * features
    assert core.status().vision_bytes > 0


def test_what_a_position_takes_is_what_the_caches_grow_by(tiny):
    from mlx_lm.models.cache import make_prompt_cache

    model = tiny[0]
    layers = make_prompt_cache(model.language_model)
    model.hidden(mx.zeros((1, 3 * KV_STEP, model.config.hidden_size)), layers)
    sizing = Sizing.of(model)
    assert sizing.per_position * 3 * KV_STEP == sum(layer.nbytes for layer in layers)
    assert sizing.slots(sizing.kv_bytes(5, 300), 300) == 5
    assert sizing.slots(sizing.kv_bytes(5) - 1) == 4
    assert sizing.kv_limit >= sizing.kv_bytes(1)


def test_sizing_leaves_room_for_weights():
    tight = Sizing(per_position=1000, context_length=100, weights=900_000, memory=1_000_000)
    assert tight.kv_limit == tight.kv_bytes(1) == 356_000  # one full context, whatever else there is
    wide = Sizing(per_position=1000, context_length=100, weights=10**6, memory=11 * 10**6)
    assert (wide.kv_limit, wide.cache_limit) == (5 * 10**6, 1_250_000)


def test_a_limit_below_one_step_of_a_cache_is_refused(tiny):
    with pytest.raises(InputError, match=r"kv_bytes is 1,000; this model takes"):
        make_core(tiny, kv_bytes=1000)


def test_prompts_that_wait_for_memory_have_been_looked_at(tiny):
    """Their client knows the routing while the answers before run on."""
    per_position, config = Sizing.of(tiny[0]).per_position, tiny[0].config
    core = make_core(tiny, kv_bytes=(KV_STEP + 400) * per_position)
    first, _ = ask(core, QUESTIONS[2].job(config))
    second, ticket = ask(core, QUESTIONS[0].job(config))
    while not second.events:
        core.step()
    for _ in range(5):
        core.step()
    assert (core.status().decoding, core.status().preparing, len(second.events)) == (1, 1, 1)
    ticket.cancel()
    core.step()
    assert core.status().preparing == 0
    finish(core)
    assert first.ended
    empty(core)


@pytest.mark.parametrize(("waiting", "costly"), [(2, False), (3, False), (4, True), (6, True)])
def test_a_full_queue_makes_visual_tokens_dearer(tiny, waiting, costly):
    """Of the requests in the queue the first is looked at while the others wait: more than there are slots, or not."""
    config = tiny[0].config
    core = make_core(tiny, slots=2, token_cost_under_load=1e9)
    job = Question("Why?", (TALL,)).job(config, route_only=True)
    [plain] = answer_all(make_core(tiny), [job])
    clients = answer_all(core, [job] * waiting)
    [first, *_, last] = clients
    assert first.events[0].under_load == costly
    assert (first.events[0].views == plain.events[0].views) == (not costly)
    if costly:
        [view] = first.events[0].views
        counts = {g: config.visual_tokens(g, job.images[0].image_size) for g in config.granularities}
        assert (view.granularity, view.source) == (min(counts, key=counts.get), "cost")
        assert view.routing == plain.events[0].views[0].routing
    assert not last.events[0].under_load
    assert last.events[0].views == plain.events[0].views
    assert core.status().totals.under_load == sum(client.events[0].under_load for client in clients)


def test_load_changes_nothing_that_was_forced(tiny):
    config = tiny[0].config
    core = make_core(tiny, slots=1, token_cost_under_load=1e9)
    job = Question("Why?", (WIDE,), (16,)).job(config, route_only=True)
    clients = [ask(core, job)[0] for _ in range(4)]
    finish(core)
    for client in clients:
        [view] = client.events[0].views
        assert (view.granularity, view.source, client.events[0].under_load) == (16, "forced", False)
