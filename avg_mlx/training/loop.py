"""The training loop: gradients summed over micro-batches and processes, clipped, applied, logged, saved."""

import contextlib
import logging
import math
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from ..errors import AvgMlxError, InputError, Interrupted
from ..journal import Row
from ..model.avg_llava import Model
from ..weights.adapters import trained_tensors
from .interrupts import deferred_interrupts
from .optimizer import LoopSettings, make_optimizer, make_schedule
from .plan import Plan
from .run import Run

logger = logging.getLogger(__name__)

MicroLoss = Callable[[], mx.array]
Gradients = Any  # a tree of arrays, as MLX has it


class Task(Protocol):
    """What is learned."""

    def micro_losses(self, samples: Sequence[int], batch: Sequence[int], step: int) -> Iterable[MicroLoss]:
        """Functions whose values sum to what `samples`, this process's of the step's `batch`, add to its loss."""

    def validate(self) -> float | None:
        """The mean loss on samples that are held out; None if there are none."""


def step_gradients(
    model: Model, micro_losses: Iterable[MicroLoss], group: mx.distributed.Group
) -> tuple[mx.array, Gradients]:
    """Sum the shares of all micro-batches and processes into a whole step's (loss, gradients), in float32."""
    loss, gradients = mx.array(0.0), tree_map(lambda x: mx.zeros(x.shape), model.trainable_parameters())
    for micro_loss in micro_losses:
        value, gradient = nn.value_and_grad(model, micro_loss)()
        loss, gradients = loss + value, tree_map(mx.add, gradients, gradient)
        mx.eval(loss, gradients)
    if group.size() > 1:  # shares are summed, not averaged; with 2ⁿ processes this is exact
        loss = mx.distributed.all_sum(loss, group=group)
        gradients = tree_map(lambda mean: mean * group.size(), nn.average_gradients(gradients, group))
    return loss, gradients


def train(
    model: Model,
    task: Task,
    plan: Plan,
    settings: LoopSettings,
    run: Run,
    report: Callable[[Row], None] = lambda record: None,
) -> None:
    """Train what is not frozen in `model`, from the last checkpoint of `run`, which is open.

    In a group of processes (mlx.launch) each takes its share of every step, and the first one writes. `report` gets
    what is logged. Raises AvgMlxError when the loss is no longer finite; the last checkpoint is kept. Ctrl-C and
    SIGTERM save the last complete step, and Interrupted is raised.
    """
    from mlx_lm.utils import maybe_set_recommended_wired_limit

    maybe_set_recommended_wired_limit()  # on a Mac: keep weights from being paged out
    loop = _Loop(model, task, plan, settings, run)
    loop.restore()
    try:
        while loop.step < settings.steps or loop.record is not None:
            if loop.record is None:
                loop.take_step()
            report(loop.finish_step())
    except KeyboardInterrupt as stop:
        raise loop.interrupted() from stop
    mx.eval(mx.distributed.all_sum(mx.array(0), group=loop.group))  # nobody goes on before all is saved


class _Loop:
    """A run on its way, which can be saved between any two of its methods."""

    def __init__(self, model: Model, task: Task, plan: Plan, settings: LoopSettings, run: Run):
        self.model, self.task, self.plan, self.settings, self.run = model, task, plan, settings, run
        self.group = mx.distributed.init()
        self.optimizer = make_optimizer(settings)
        self.optimizer.init(model.trainable_parameters())
        self.rate = make_schedule(settings, settings.learning_rate)
        self.step = 0  # how many steps the weights have made
        self.record: Row | None = None  # of the last one, until it is logged

    def restore(self) -> None:
        """Begin where the run was left."""
        if self.group.rank() == 0 and not self.run.writes:
            raise AvgMlxError("the run is not open; train inside of `with run.open(resume):`")
        logged = len(self.run.log)
        self.step, self.record = self.run.restore(self.model, self.optimizer)
        self._check_alike()
        lost = logged - len(self.run.log)
        if self.run.writes and (self.step or lost):
            again = f"; {lost} later ones were logged but not saved, and are taken again" if lost else ""
            logger.info("resumed at step %d of %d%s", self.step, self.settings.steps, again)

    def _check_alike(self) -> None:
        """Raise InputError unless all processes of the group were restored from the same checkpoint."""
        known = trained_tensors(self.model) if self.step else {}  # new weights may be rounded otherwise elsewhere
        digest = zlib.crc32(b"".join(np.array(x.reshape(-1)[:64].astype(mx.float32)).tobytes() for x in known.values()))
        mine = mx.array([[self.step, digest >> 16, digest & 0xFFFF]])
        everyones = np.array(mx.distributed.all_gather(mine, group=self.group))
        if (everyones != everyones[0]).any():
            raise InputError(f"the processes do not resume at the same step; all must see {self.run.folder}")

    def take_step(self) -> None:
        """Take one step. If it is interrupted before the weights change, they stay as they were."""
        start, step, batch = time.perf_counter(), self.step + 1, self.plan.batch(self.step)
        loss, gradients = self._gradients(step, batch)
        with deferred_interrupts():
            self.optimizer.update(self.model, gradients)
            mx.eval(self.model.trainable_parameters(), self.optimizer.state)
            del gradients
            mx.clear_cache()  # inputs of many lengths would each leave their buffers behind
            self.record = {
                "step": step,
                "loss": loss,
                "learning_rate": self.rate(mx.array(self.step)).item(),
                "samples_per_second": len(batch) / (time.perf_counter() - start),
                "peak_memory_gb": mx.get_peak_memory() / 1e9,
            }
            self.step = step

    def finish_step(self) -> Row:
        """Validate where that is due, log the step, and save where that is due."""
        assert self.record is not None
        record, last = self.record, self.step == self.settings.steps
        if self.step % self.settings.steps_per_eval == 0 or last:
            self._seed()  # as in a run that is resumed here
            if (validation := _validate(self.model, self.task)) is not None:
                record["validation_loss"] = validation
        with deferred_interrupts():
            self.run.add(record)
            self.record = None
            if self.step % self.settings.save_every == 0 or last:
                self.run.save(self.step, self.model, self.optimizer)
        return record

    def interrupted(self) -> Interrupted:
        """Save, and tell how to resume."""
        with contextlib.suppress(KeyboardInterrupt), deferred_interrupts():  # Ctrl-C pressed again must not tear it
            self.run.save(self.step, self.model, self.optimizer, interrupted=True, pending=self.record)
        steps = self.settings.steps
        if self.step == 0:
            return Interrupted(f"interrupted before step 1 of {steps} was complete; --resume begins there")
        return Interrupted(f"interrupted at step {self.step} of {steps}; --resume goes on from there")

    def _gradients(self, step: int, batch: Sequence[int]) -> tuple[float, Gradients]:
        """Compute a step's (loss, clipped gradients). The model stays as it was, even if this is interrupted."""
        before = self.model.trainable_parameters()
        self._seed()
        rank, processes = self.group.rank(), self.group.size()
        try:
            micro_losses = self.task.micro_losses(batch[rank::processes], batch, step)
            loss, gradients = step_gradients(self.model, micro_losses, self.group)
            gradients, norm = optim.clip_grad_norm(gradients, self.settings.grad_clip)
            total, size = cast(float, loss.item()), cast(float, norm.item())
        except BaseException:
            with deferred_interrupts():
                self.model.update(before)  # MLX puts tracers into the model while it differentiates
            raise
        if not math.isfinite(total) or not math.isfinite(size):
            raise AvgMlxError(
                f"loss {total} and gradient {size} are not finite at step {step}; the last checkpoint is kept "
                f"in {self.run.folder}. Lower learning_rate, and train into another folder"
            )
        return total, gradients

    def _seed(self) -> None:
        """Make random state a function of seed, step and process, so that it need not be saved to resume."""
        numbers = self.settings.seed, self.step + 1, self.group.rank()
        mx.random.seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def _validate(model: Model, task: Task) -> float | None:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        return task.validate()
    finally:
        for module in training:
            module.train()
