"""The engine's work, a step at a time: what a thread repeats while there is any."""

import logging
import time
from collections.abc import Generator

import mlx.core as mx

from ...errors import InputError, origin
from ...inference.caches import VisionCache
from ...inputs.tokenizer import Tokenizer
from ...model.avg_llava import Model
from ..jobs import EngineOptions, Status
from .admission import Admission
from .decoder import Decoder
from .prefixes import Prefixes
from .preparation import Preparation
from .queue import Queue
from .row import Row
from .sizing import Sizing
from .tally import Tally
from .work import Work

log = logging.getLogger(__name__)

DONE = object()


class Core:
    """Requests in the order they came: one is prepared at a time, and the answers of those before it are decoded.

    Other threads may touch `queue` alone.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, options: EngineOptions):
        sizing = Sizing.of(model)
        kv_bytes = sizing.kv_limit if options.kv_bytes is None else options.kv_bytes
        prefix_bytes = sizing.cache_limit if options.prefix_bytes is None else options.prefix_bytes
        vision_bytes = sizing.cache_limit if options.vision_bytes is None else options.vision_bytes
        self.options, self.kv_limit = options, kv_bytes
        self.queue, self.tally = Queue(options.queue), Tally()
        self.vision, self.prefixes = VisionCache(model, vision_bytes), Prefixes(prefix_bytes)
        self.admission = Admission(options.slots, kv_bytes // sizing.per_position)
        self.decoder = Decoder(model, tokenizer, options.slots)
        self._preparation = Preparation(
            model,
            tokenizer,
            self.vision,
            self.prefixes,
            self.admission,
            self.decoder,
            self.tally,
            options.prefill_step_size,
            self._load_cost,
        )
        self.pace = 0.0  # seconds from one answer's end to the next one's while all slots are taken, of late
        self._preparing: tuple[Work, Generator[None]] | None = None
        if self.admission.longest < 1:
            raise InputError(f"kv_bytes is {kv_bytes:,}; this model takes {sizing.kv_bytes(1):,} for one full context")

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(len(self.queue) or self._preparing or len(self.decoder))

    def step(self) -> None:
        """Do one step of preparing a request, and decode one token of every answer."""
        self._drop_cancelled()
        self._prepare()
        self._decode()

    def fail_waiting(self, error: Exception) -> None:
        """Fail the requests in the queue, and none that comes meanwhile."""
        for _ in range(len(self.queue)):
            if work := self.queue.take():
                self._end(work, error)

    def fail_all(self, error: Exception) -> None:
        """Fail every request, and keep nothing for others."""
        self.fail_waiting(error)
        if self._preparing:
            self._end(self._stop_preparing(), error)
        self._fail_answers(error)
        self._forget()

    def close(self) -> None:
        """Let go of what mlx-lm holds while it decodes."""
        self.decoder.close()

    def status(self) -> Status:
        """What there is to do and what is held; the thread that works says the rest."""
        return Status(
            alive=True,
            stopping=False,
            standing=0.0,
            waiting=len(self.queue),
            preparing=int(self._preparing is not None),
            decoding=len(self.decoder),
            slots=self.options.slots,
            kv_bytes=self.decoder.nbytes,
            kv_limit=self.kv_limit,
            prefix_bytes=self.prefixes.nbytes,
            vision_bytes=self.vision.nbytes,
            totals=self.tally.totals(),
        )

    def _load_cost(self) -> float:
        """What is added to the token cost while more requests wait than there are slots."""
        return self.options.token_cost_under_load if len(self.queue) > self.options.slots else 0.0

    def _drop_cancelled(self) -> None:
        """Free the places of requests that were given up."""
        for work in self.queue.take_cancelled():
            self._end(work)
        if self._preparing and self._preparing[0].cancelled:
            self._end(self._stop_preparing())
        for row in self.decoder.rows:
            if row.work.cancelled:
                self.decoder.remove(row)
                self._count(row)
                self._end(row.work)

    def _prepare(self) -> None:
        """Look at one image, or prefill one stretch of a prompt; where the prompt ends, its answer joins the others."""
        if self._preparing is None:
            if (work := self.queue.take()) is None:
                return
            self._preparing = work, self._preparation.steps(work)
        try:
            if next(self._preparing[1], DONE) is DONE:
                self._preparing = None
        except InputError as error:
            self._end(self._stop_preparing(), error)
        except Exception as error:
            self._fault(error)
            self._end(self._stop_preparing(), error)

    def _stop_preparing(self) -> Work:
        assert self._preparing is not None
        (work, steps), self._preparing = self._preparing, None
        steps.close()
        return work

    def _decode(self) -> None:
        """Decode one token of every answer, and keep the KV of those that have ended."""
        if not len(self.decoder):
            return
        begun = time.perf_counter()
        try:
            for row, keys, layers in self.decoder.step():
                self._finish(row)
                if row.error is None:
                    self.prefixes.keep(keys, layers)
        except Exception as error:  # it was in the midst of all answers' KV
            self._fault(error)
            self._fail_answers(error)
        self.tally.seconds.generation += time.perf_counter() - begun

    def _finish(self, row: Row) -> None:
        """Free the place of an answer that has ended."""
        self._count(row)
        if row.error:
            self._fault(row.error)
            self._end(row.work, row.error)
            return
        self.admission.release(row.work)
        self.tally.outcomes["done"] += 1
        seconds = sum(vars(row.layout.seconds).values()) / self.options.slots
        self.pace = 0.8 * self.pace + 0.2 * seconds if self.pace else seconds

    def _count(self, row: Row) -> None:
        self.tally.counts.update(reused_positions=row.reused, generated_tokens=len(row.tokens))

    def _fail_answers(self, error: Exception) -> None:
        for row in self.decoder.rows:
            self._count(row)
            self._end(row.work, error)
        self.decoder.reset()

    def _end(self, work: Work, error: Exception | None = None) -> None:
        """Free the place of a request that gets no answer, and say why, unless it was given up."""
        self.admission.release(work)
        if error is None or work.cancelled:
            self.tally.outcomes["cancelled"] += 1
            return
        self.tally.outcomes[work.fail(error)] += 1

    def _fault(self, error: Exception) -> None:
        """Log a fault of ours, and drop what is kept for other requests, since it may be what failed."""
        log.error("the engine failed: %s", origin(error))
        self._forget()

    def _forget(self) -> None:
        self.prefixes.clear()
        self.vision.clear()
        mx.clear_cache()
