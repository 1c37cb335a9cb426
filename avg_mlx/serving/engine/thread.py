"""The thread that owns MLX and the model."""

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx

from ...config import Config
from ...errors import InputError, origin
from ...inputs.tokenizer import Tokenizer
from ...model.avg_llava import Model
from ..jobs import Deliver, EngineOptions, Full, Job, Status, Stopping
from .core import Core
from .work import Work

log = logging.getLogger(__name__)

LONGEST_STEP = 60.0  # seconds for which `stop` waits beyond the grace: a step cannot be cut short
LOADING = 2.0  # seconds that a model which still loads is waited for; it has nothing to finish
MOST_PATIENCE = 60  # seconds, of retry_after


class Engine:
    """Answers jobs together, in a thread of its own; all methods may be called from any other."""

    config: Config  # of the model, once it is loaded

    def __init__(self, load: Callable[[], tuple[Model, Tokenizer]], options: EngineOptions | None = None):
        self._load, self._options = load, options or EngineOptions()
        self._options.check()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._condition = threading.Condition()
        self._ready = threading.Event()
        self._failed: BaseException | None = None  # what loading raised
        self._core: Core | None = None
        self._status: Status | None = None
        self._refused = 0
        self._ends_at = math.inf  # when requests are cut off, on the clock of `monotonic`; finite once it stops
        self._step_began = math.inf  # on the same clock; infinite while it waits for work

    def start(self) -> None:
        """Load the model in the engine's thread and return when it serves; raises what loading raises."""
        if mx.distributed.init().size() > 1:
            raise InputError("a server answers from one process; start it without mlx.launch")
        self._thread.start()
        self._ready.wait()
        if self._failed is not None:
            raise self._failed

    def submit(self, job: Job, deliver: Deliver) -> Work:
        """Queue a job. Raises InputError for one that cannot be used, Full or Stopping.

        deliver is called in the engine's thread, and must return at once.
        """
        core = self._started()
        job.check(self.config)
        work = Work(job, deliver, self._wake)
        with self._condition:
            if self._stopping or not self._thread.is_alive():
                raise Stopping("the server is stopping; ask again later")
            if not core.queue.offer(work):
                self._refused += 1
                patience = max(1, min(MOST_PATIENCE, math.ceil(core.pace)))
                raise Full(f"{core.queue.limit} requests wait already; ask again in {patience} s", patience)
            self._condition.notify()
        return work

    def stop(self, grace_seconds: float) -> None:
        """Take no more requests, fail those that wait, finish what runs within the grace, and return when all ended.

        A second call can shorten the grace.
        """
        with self._condition:
            self._ends_at = min(self._ends_at, time.monotonic() + grace_seconds)
            self._condition.notify()
        if self._thread.ident is not None:
            self._thread.join(grace_seconds + LONGEST_STEP if self._ready.is_set() else LOADING)

    def snapshot(self) -> Status:
        """What the engine is doing."""
        core, status = self._started(), self._status
        assert status is not None
        totals = replace(status.totals, outcomes={**status.totals.outcomes, "full": self._refused})
        return replace(
            status,
            alive=self._thread.is_alive(),
            stopping=self._stopping,
            standing=max(0.0, time.monotonic() - self._step_began),
            waiting=len(core.queue),
            totals=totals,
        )

    @property
    def _stopping(self) -> bool:
        return math.isfinite(self._ends_at)

    def _started(self) -> Core:
        if self._core is None:
            raise RuntimeError("the engine was not started")
        return self._core

    def _wake(self) -> None:
        with self._condition:
            self._condition.notify()

    def _run(self) -> None:
        """Load the model, then work until the engine stops."""
        try:
            model, tokenizer = self._load()
            core = Core(model, tokenizer, self._options)
            self.config, self._core, self._status = model.config, core, core.status()
            self._ready.set()
            self._serve(core)
        except BaseException as error:
            if self._ready.is_set():
                raise
            self._failed = error
        finally:
            mx.clear_streams()  # this thread's; MLX aborts a process that ends after a thread which left some
            self._ready.set()

    def _serve(self, core: Core) -> None:
        """Work until the engine stops. Whatever happens, nobody waits for an answer in vain."""
        try:
            while self._has_work(core):
                self._work(core)
        finally:
            with self._condition:  # so that nothing is submitted any more
                self._ends_at = min(self._ends_at, time.monotonic())
            core.fail_all(Stopping("the server has stopped; ask again later"))
            core.close()
            self._status, self._step_began = core.status(), math.inf

    def _has_work(self, core: Core) -> bool:
        """Wait until there is something to do; False when all is done and the engine stops."""
        with self._condition:
            while not core.busy and not self._stopping:
                self._step_began = math.inf
                self._condition.wait()
            return core.busy and time.monotonic() < self._ends_at

    def _work(self, core: Core) -> None:
        """Do one step. A fault that the step itself could not assign to a request fails them all, and no more."""
        self._step_began = time.monotonic()
        try:
            if self._stopping:
                core.fail_waiting(Stopping("the server is stopping; ask again later"))
            core.step()
        except Exception as error:
            log.error("the engine failed and begins anew: %s", origin(error))
            core.fail_all(error)
        self._status = core.status()
