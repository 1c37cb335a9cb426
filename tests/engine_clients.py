"""Clients of the serving engine: they keep what they are told, and the engine is stepped by hand."""

import time
from dataclasses import dataclass, field

from PIL import Image

from avg_mlx import generate
from avg_mlx.inference.options import Looking
from avg_mlx.inputs.image import make_crops
from avg_mlx.serving.engine.core import Core
from avg_mlx.serving.engine.work import Work
from avg_mlx.serving.jobs import Done, EngineOptions, Failed, Job, Piece, Routed

WIDE, TALL, SQUARE = (
    Image.effect_mandelbrot(size, (-2, -1, 1, 1), 50).convert("RGB") for size in ((160, 40), (40, 90), (100, 100))
)


@dataclass(frozen=True)
class Question:
    """What is asked of the engine, and of `generate` to compare."""

    text: str
    images: tuple = ()
    granularities: tuple = ()  # one for each image; "auto" where there are none
    options: dict = field(default_factory=dict)  # fields of a job

    def job(self, config, **options) -> Job:
        ways = self.granularities or ("auto",) * len(self.images)
        return Job(
            ({"role": "user", "content": self.text},),
            tuple(make_crops(image, config) for image in self.images),
            tuple(Looking(granularity=g) for g in ways),
            **{"max_tokens": 12} | self.options | options,
        )

    def alone(self, loaded, **options):
        """The answer of `generate`; for questions whose images are looked at in one way."""
        [granularity] = set(self.granularities) or {"auto"}
        options = {"max_tokens": self.options.get("max_tokens", 12)} | options
        return generate(*loaded, self.text, list(self.images) or None, granularity=granularity, **options)


class Client:
    """Someone who asked, and what they were told."""

    def __init__(self):
        self.events = []

    def __call__(self, event) -> None:
        self.events.append(event)

    @property
    def last(self):
        return self.events[-1] if self.events else None

    @property
    def answer(self):
        assert isinstance(self.last, Done), self.last
        return self.last.answer

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Piece))

    @property
    def tokens(self) -> list:
        return [token for event in self.events if isinstance(event, Piece) for token in event.tokens]

    @property
    def ended(self) -> bool:
        return isinstance(self.last, Done | Failed)


def make_core(loaded, **options) -> Core:
    return Core(*loaded, EngineOptions(**{"slots": 4, "prefill_step_size": 16, "kv_bytes": 1 << 24} | options))


def ask(core, job: Job) -> tuple[Client, Work]:
    """Put a job into the queue, as the thread does."""
    client = Client()
    work = Work(job, client, lambda: None)
    assert core.queue.offer(work)
    return client, work


def finish(core, steps: int = 10_000) -> int:
    """Step until nothing is left to do; returns how many steps that took."""
    for n in range(steps):
        if not core.busy:
            return n
        core.step()
    raise AssertionError(f"still busy after {steps} steps: {core.status()}")


def answer_all(core, jobs) -> list[Client]:
    clients = [ask(core, job)[0] for job in jobs]
    finish(core)
    return clients


def same(client: Client, expected) -> None:
    """A client was told the answer that `generate` gives: routing first, pieces that make up the text, the end."""
    answer = client.answer
    assert isinstance(client.events[0], Routed)
    assert all(isinstance(event, Piece) for event in client.events[1:-1])
    assert (answer.token_ids, answer.text, answer.finish_reason) == (
        expected.token_ids,
        expected.text,
        expected.finish_reason,
    )
    assert client.text == expected.text
    assert (answer.prompt_token_ids, answer.prompt_tokens) == (expected.prompt_token_ids, expected.prompt_tokens)
    assert [view.granularity for view in answer.views] == [view.granularity for view in expected.views]
    assert client.events[0].positions == expected.prompt_tokens


def empty(core) -> None:
    """Nothing runs or waits, and no memory is held but the caches'."""
    status = core.status()
    assert (status.waiting, status.preparing, status.decoding, status.kv_bytes) == (0, 0, 0, 0)
    assert (len(core.admission), core.admission.positions) == (0, 0)


def until(condition, seconds: float = 120) -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)
