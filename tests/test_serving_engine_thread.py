"""The engine's thread: loading, stopping, faults, and what it says of itself."""

import subprocess
import sys
import threading
import time

import pytest
from engine_clients import SQUARE, TALL, WIDE, Client, Question, ask, empty, finish, make_core, same, until

from avg_mlx import InputError
from avg_mlx.inference.caches import VisionCache
from avg_mlx.inference.options import Looking
from avg_mlx.inference.sampling import Sampling
from avg_mlx.serving.engine import preparation
from avg_mlx.serving.engine import thread as engine_thread
from avg_mlx.serving.engine.decoder import BatchGenerator
from avg_mlx.serving.engine.thread import Engine
from avg_mlx.serving.jobs import Done, EngineOptions, Failed, Full, Job, Piece, Routed, Stopping

QUESTIONS = [
    Question("Why?", (WIDE,), (4,), {"max_tokens": 9}),
    Question("Which?", (TALL, SQUARE), options={"max_tokens": 14}),
    Question("Who?", options={"max_tokens": 11}),
]
OPTIONS = EngineOptions(slots=2, queue=3, kv_bytes=1 << 24, prefill_step_size=16)


@pytest.fixture(scope="module")
def expected(tiny):
    return [question.alone(tiny) for question in QUESTIONS]


@pytest.fixture
def engine(tiny_folder):
    """A started engine of two slots and a queue of three, which loads its model in its own thread."""
    from avg_mlx import load

    engine = Engine(lambda: load(tiny_folder), OPTIONS)
    engine.start()
    yield engine
    engine.stop(0)
    assert not engine.snapshot().alive


class Gate:
    """Holds the engine within its next step until it is opened."""

    def __init__(self, monkeypatch):
        self.reached, self.open = threading.Event(), threading.Event()
        step = BatchGenerator.next

        def wait(generator):
            self.reached.set()
            assert self.open.wait(120)
            return step(generator)

        monkeypatch.setattr(BatchGenerator, "next", wait)


@pytest.fixture
def gate(monkeypatch):
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()


def submit(engine, question, **options):
    client = Client()
    return client, engine.submit(question.job(engine.config, **options), client)


def fail(error):
    raise error


def test_many_threads_ask_and_each_gets_its_answer(engine, expected):
    clients = {}

    def asking(n):
        while True:
            try:
                clients[n], _ = submit(engine, QUESTIONS[n % 3])
                return
            except Full:
                time.sleep(0.01)

    threads = [threading.Thread(target=asking, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: all(client.ended for client in clients.values()))
    for n, client in clients.items():
        same(client, expected[n % 3])
    until(lambda: engine.snapshot().decoding == 0)
    status = engine.snapshot()
    assert (status.alive, status.stopping, status.waiting, status.kv_bytes) == (True, False, 0, 0)
    assert status.totals.outcomes["done"] == 12
    assert status.totals.generated_tokens == sum(len(client.answer.token_ids) for client in clients.values())
    assert sum(status.totals.granularities.values()) == 12  # images


def test_the_queue_is_bounded_and_says_when_to_come_again(engine, gate):
    first, _ = submit(engine, QUESTIONS[2])
    assert gate.reached.wait(120)
    tickets = [submit(engine, QUESTIONS[2])[1] for _ in range(3)]
    with pytest.raises(Full, match="3 requests wait already") as full:
        submit(engine, QUESTIONS[2])
    assert 1 <= full.value.retry_after <= 60
    assert engine.snapshot().totals.outcomes["full"] == 1
    for ticket in tickets:
        ticket.cancel()
    gate.open.set()
    until(lambda: first.ended and engine.snapshot().waiting == 0)
    last, _ = submit(engine, QUESTIONS[2])
    until(lambda: last.ended)
    until(lambda: engine.snapshot().totals.outcomes == {"done": 2, "cancelled": 3, "full": 1})  # told a moment later


def test_a_client_that_gives_up_from_another_thread_is_told_no_more(engine, gate):
    client, ticket = submit(engine, QUESTIONS[2], max_tokens=300)
    assert gate.reached.wait(120)
    ticket.cancel()
    gate.open.set()
    until(lambda: engine.snapshot().totals.outcomes.get("cancelled"))
    assert [type(event) for event in client.events] == [Routed]
    assert engine.snapshot().decoding == 0


def test_a_step_that_stands_is_seen_and_rest_is_not(engine, gate):
    assert engine.snapshot().standing == 0
    client, _ = submit(engine, QUESTIONS[2])
    assert gate.reached.wait(120)
    first = engine.snapshot().standing
    until(lambda: engine.snapshot().standing > first > 0)
    gate.open.set()
    until(lambda: client.ended and engine.snapshot().standing == 0)


def test_stopping_finishes_what_runs_and_fails_what_waits(engine, gate, expected):
    running, _ = submit(engine, QUESTIONS[2])
    assert gate.reached.wait(120)
    waiting, _ = submit(engine, QUESTIONS[0])
    stopping = threading.Thread(target=engine.stop, args=(120,))
    stopping.start()
    until(lambda: engine.snapshot().stopping)
    with pytest.raises(Stopping):
        submit(engine, QUESTIONS[2])
    gate.open.set()
    stopping.join()
    same(running, expected[2])
    [failed] = waiting.events
    assert (failed.kind, type(failed.error)) == ("stopping", Stopping)
    assert not engine.snapshot().alive


def test_without_grace_what_runs_is_told_that_it_ends(engine, gate):
    client, _ = submit(engine, QUESTIONS[2], max_tokens=300)
    assert gate.reached.wait(120)
    stopping = threading.Thread(target=engine.stop, args=(120,))
    stopping.start()
    until(lambda: engine.snapshot().stopping)
    engine_ends = threading.Thread(target=engine.stop, args=(0,))
    engine_ends.start()
    gate.open.set()
    for thread in (stopping, engine_ends):
        thread.join()
    assert isinstance(client.last, Failed)
    assert client.last.kind == "stopping"
    assert (engine.snapshot().decoding, engine.snapshot().kv_bytes) == (0, 0)


EXITING = """
import sys

import mlx.core as mx

from avg_mlx import load
from avg_mlx.serving.engine.thread import Engine

mx.eval(mx.zeros(1) + 1)
engine = Engine(lambda: load(sys.argv[1]))
engine.start()
engine.stop(0)
"""


def test_a_process_ends_in_peace_after_its_engine(tiny_folder):
    ended = subprocess.run([sys.executable, "-c", EXITING, str(tiny_folder)], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_what_loading_raises_is_raised():
    engine = Engine(lambda: fail(InputError("no such model")))
    with pytest.raises(InputError, match="no such model"):
        engine.start()
    engine.stop(0)


def test_stopping_does_not_wait_for_a_model_that_loads(monkeypatch):
    monkeypatch.setattr(engine_thread, "LOADING", 0.01)
    loads, loading = threading.Event(), threading.Event()

    def load():
        loads.set()
        loading.wait(120)
        raise InputError("too late")

    engine = Engine(load)

    def start():
        with pytest.raises(InputError, match="too late"):
            engine.start()

    starting = threading.Thread(target=start)
    starting.start()
    assert loads.wait(120)
    engine.stop(0)
    assert not loading.is_set()
    loading.set()
    starting.join()


def test_an_engine_that_was_never_started_stops():
    Engine(lambda: None).stop(0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"slots": 0}, "slots is 0"),
        ({"queue": 0}, "queue is 0"),
        ({"kv_bytes": -1}, "kv_bytes is -1"),
        ({"prefill_step_size": 0}, "prefill_step_size is 0"),
        ({"token_cost_under_load": float("nan")}, "token_cost_under_load is nan"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_options_out_of_bounds_are_refused_before_anything_is_loaded(options, words):
    with pytest.raises(InputError, match=words):
        Engine(lambda: None, EngineOptions(**options))


def test_several_processes_are_refused(monkeypatch):
    group = type("Group", (), {"size": lambda self: 2})
    monkeypatch.setattr("mlx.core.distributed.init", group)
    with pytest.raises(InputError, match=r"answers from one process; start it without mlx\.launch"):
        Engine(lambda: None).start()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"looking": ()}, "1 images have 0 ways"),
        ({"looking": (Looking(granularity=3),)}, "granularity is 3"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"sampling": Sampling(temp=-1.0)}, "temperature is -1"),
        ({"sampling": Sampling(temp=float("inf"))}, "temperature is inf"),
        ({"sampling": Sampling(top_p=1.5)}, "top_p is 1.5"),
        ({"sampling": Sampling(min_p=-0.1)}, "min_p is -0.1"),
        ({"sampling": Sampling(temp=1.0, top_k=512)}, "top_k is 512"),
        ({"sampling": Sampling(seed=-1)}, "seed is -1"),
        ({"sampling": Sampling(temp=1.0, min_p=0.1, min_tokens_to_keep=600)}, "min_tokens_to_keep is 600"),
        ({"sampling": Sampling(xtc_probability=0.5)}, "XTC"),
        ({"presence_penalty": float("nan")}, "presence_penalty is nan"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty is inf"),
        ({"logit_bias": {512: 1.0}}, "logit_bias is 512"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias is nan"),
        ({"logprobs": 21}, "logprobs is 21"),
        ({"stop": ("a", "")}, "stop text is empty"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_what_would_fail_in_a_batch_is_refused_when_it_is_submitted(engine, changes, words):
    job = QUESTIONS[0].job(engine.config)
    with pytest.raises(InputError, match=words):
        engine.submit(Job(**{**vars(job), **changes}), Client())
    assert engine.snapshot().waiting == 0


# Faults are injected into an engine that is stepped by hand, so that the moment is known.

ERRORS = [RuntimeError("[metal] out of memory"), MemoryError(), OSError(5, "Input/output error", "x")]


@pytest.mark.parametrize("error", ERRORS, ids=["MLX", "memory", "disk"])
def test_a_fault_between_two_tokens_fails_those_that_run_and_no_other(tiny, expected, monkeypatch, error):
    core, config = make_core(tiny, slots=2), tiny[0].config
    running = [ask(core, QUESTIONS[n].job(config, max_tokens=60))[0] for n in (0, 2)]
    while len(core.decoder) < 2:
        core.step()
    waiting, _ = ask(core, QUESTIONS[1].job(config))
    with monkeypatch.context() as patch:
        patch.setattr(BatchGenerator, "next", lambda self: fail(error))
        core.step()
    for client in running:
        assert isinstance(client.last, Failed)
        assert client.last.kind == "fault"
        assert "\n" not in str(client.last.error)
    status = core.status()
    assert (status.decoding, status.kv_bytes, len(core.admission)) == (0, 0, 0)
    assert status.prefix_bytes == 0  # it may be what failed
    finish(core)
    same(waiting, expected[1])
    assert core.status().totals.outcomes == {"fault": 2, "done": 1}
    empty(core)


@pytest.mark.parametrize("error", ERRORS, ids=["MLX", "memory", "disk"])
@pytest.mark.parametrize(
    ("owner", "name"),
    [(VisionCache, "features"), (preparation, "choose"), (preparation, "compose"), (preparation, "prefill")],
    ids=["looking", "routing", "composing", "prefill"],
)
def test_a_fault_before_an_answer_fails_that_request_alone(tiny, expected, monkeypatch, owner, name, error):
    core, config = make_core(tiny, slots=2), tiny[0].config
    running, _ = ask(core, QUESTIONS[2].job(config))
    while not len(core.decoder):
        core.step()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, lambda *_: fail(error))
        bad, _ = ask(core, QUESTIONS[0].job(config))
        while not bad.ended:
            core.step()
    assert bad.last.kind == "fault"
    good, _ = ask(core, QUESTIONS[0].job(config))
    finish(core)
    same(running, expected[2])
    same(good, expected[0])
    assert core.status().totals.outcomes == {"fault": 1, "done": 2}
    empty(core)


def test_an_answer_whose_kv_cannot_be_kept_has_been_given(tiny, expected, monkeypatch):
    core, config = make_core(tiny, slots=2), tiny[0].config
    client, _ = ask(core, QUESTIONS[0].job(config))
    while not len(core.decoder):
        core.step()
    with monkeypatch.context() as patch:
        patch.setattr(core.prefixes, "keep", lambda *_: fail(MemoryError()))
        finish(core)
    same(client, expected[0])
    again, _ = ask(core, QUESTIONS[0].job(config))
    finish(core)
    same(again, expected[0])
    assert core.status().totals.outcomes == {"done": 2}
    empty(core)


def test_a_fault_of_one_answers_text_fails_it_alone(tiny, expected, monkeypatch):
    from avg_mlx.serving.engine.row import Row

    core, config, take = make_core(tiny, slots=2), tiny[0].config, Row.take
    bad, ticket = ask(core, QUESTIONS[0].job(config))
    good, _ = ask(core, QUESTIONS[2].job(config))
    monkeypatch.setattr(
        Row, "take", lambda row, token: fail(ValueError("no text")) if row.work is ticket else take(row, token)
    )
    finish(core)
    assert bad.last.kind == "fault"
    same(good, expected[2])
    empty(core)


def test_a_fault_that_is_nobodys_fails_all_and_the_next_is_served(engine, expected, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(type(engine._core), "_drop_cancelled", lambda self: fail(RuntimeError("unforeseen")))
        client, _ = submit(engine, QUESTIONS[0])
        until(lambda: client.ended)
        assert client.last.kind == "fault"
    again, _ = submit(engine, QUESTIONS[0])
    until(lambda: again.ended)
    same(again, expected[0])


def test_nobody_waits_for_a_thread_that_died(engine, monkeypatch):
    class Unforeseen(BaseException):
        pass

    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    monkeypatch.setattr(BatchGenerator, "next", lambda self: fail(Unforeseen()))
    client, _ = submit(engine, QUESTIONS[2])
    until(lambda: client.ended and not engine.snapshot().alive)
    assert isinstance(client.last, Failed)
    with pytest.raises(Stopping):
        submit(engine, QUESTIONS[2])


def test_events_are_of_the_engines_thread(engine):
    threads = set()
    done = threading.Event()

    def deliver(event):
        threads.add(threading.current_thread().name)
        if isinstance(event, Done):
            done.set()

    engine.submit(QUESTIONS[2].job(engine.config), deliver)
    assert done.wait(120)
    assert threads == {"engine"}


def test_an_image_of_many_crops_keeps_nobody_waiting_for_more_than_one_step(tiny, passes):
    """Between two tokens of a running answer there is one pass of the tower, or one stretch of a prompt."""
    core, config = make_core(tiny, slots=2, prefill_step_size=16), tiny[0].config
    running, _ = ask(core, QUESTIONS[2].job(config, max_tokens=200))
    while not len(core.decoder):
        core.step()
    new, _ = ask(core, Question("Which?", (WIDE, SQUARE), (16, 16)).job(config, max_tokens=2))
    tokens = []
    while not new.ended and not running.ended:
        seen, text = len(passes), sum(isinstance(event, Piece) for event in running.events)
        core.step()
        assert len(passes) - seen <= 1
        tokens.append(sum(isinstance(event, Piece) for event in running.events) - text)
    assert new.ended
    assert len(tokens) >= 2 + new.answer.counters.prefilled // 16  # two images, and a step for each stretch
    assert sum(tokens) >= len(tokens) - 3  # a token each, but for those that are no character yet
