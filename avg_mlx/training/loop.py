"""The training loop: gradients summed over micro-batches and processes, clipped, applied, logged, saved."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from ..errors import AvgMlxError
from ..model.avg_llava import Model
from .plan import Plan
from .run import Run

MicroLoss = Callable[[], mx.array]


class Task(Protocol):
    """What is learned."""

    def micro_losses(self, samples: Sequence[int], batch: Sequence[int], step: int) -> Iterable[MicroLoss]:
        """Functions whose values sum to what `samples`, this process's of the step's `batch`, add to its loss."""

    def validate(self) -> float | None:
        """The mean loss on samples that are held out; None if there are none."""


@dataclass(frozen=True)
class LoopSettings:
    """How to optimize; counts are optimizer steps."""

    steps: int
    learning_rate: float
    warmup: float = 0.03  # fraction of the steps
    schedule: str = "cosine"  # or "constant"
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    vision_learning_rate: float | None = None
    steps_per_eval: int = 200
    save_every: int = 100
    seed: int = 0


def make_optimizer(settings: LoopSettings) -> optim.Optimizer:
    """PyTorch's AdamW with warm-up; the vision tower may have a learning rate of its own."""

    def adamw(peak: float) -> optim.Optimizer:
        return optim.AdamW(_schedule(settings, peak), weight_decay=settings.weight_decay, bias_correction=True)

    if settings.vision_learning_rate is None:
        return adamw(settings.learning_rate)
    optimizers = [adamw(settings.vision_learning_rate), adamw(settings.learning_rate)]
    return optim.MultiOptimizer(optimizers, [lambda name, _: name.startswith("vision_tower.")])


def _schedule(settings: LoopSettings, peak: float) -> Callable[[mx.array], mx.array]:
    """Linear warm-up from one share of the peak, then a cosine to zero or a constant."""
    warmup = math.ceil(settings.warmup * settings.steps)

    def rate(step: mx.array) -> mx.array:
        rising = (step + 1) / max(warmup, 1)
        if settings.schedule == "constant":
            return peak * mx.minimum(rising, 1.0)
        falling = 0.5 * (1 + mx.cos(math.pi * (step - warmup) / max(settings.steps - warmup, 1)))
        return peak * mx.where(step < warmup, rising, falling)

    return rate


def step_gradients(model: Model, micro_losses: Iterable[MicroLoss], group: mx.distributed.Group):
    """(loss, gradients) of a whole step: its micro-batches' and all processes' shares, summed."""
    loss, gradients = mx.array(0.0), tree_map(mx.zeros_like, model.trainable_parameters())
    for micro_loss in micro_losses:
        value, gradient = nn.value_and_grad(model, micro_loss)()
        loss, gradients = loss + value, tree_map(mx.add, gradients, gradient)
        mx.eval(loss, gradients)
    if group.size() > 1:
        loss, gradients = tree_map(mx.distributed.all_sum, (loss, gradients))
    return loss, gradients


def train(
    model: Model,
    task: Task,
    plan: Plan,
    settings: LoopSettings,
    run: Run,
    report: Callable[[dict], None] = lambda record: None,
) -> None:
    """Train what is not frozen in `model`, going on from the run's last checkpoint.

    In a group of processes (mlx.launch) each takes its share of every step, and the first one writes. `report` gets
    what is logged. Raises AvgMlxError when the loss is no longer finite; the last checkpoint is kept.
    """
    from mlx_lm.utils import maybe_set_recommended_wired_limit

    maybe_set_recommended_wired_limit()  # on a Mac: keep weights from being paged out
    group = mx.distributed.init()
    optimizer = make_optimizer(settings)
    optimizer.init(model.trainable_parameters())
    done = run.restore(model, optimizer)
    if group.rank() == 0:
        run.cut_log(done)
    for step in range(done + 1, settings.steps + 1):
        start = time.perf_counter()
        batch = plan.batch(step - 1)
        _seed(settings.seed, step, group.rank())
        micro_losses = task.micro_losses(batch[group.rank() :: group.size()], batch, step)
        loss, gradients = step_gradients(model, micro_losses, group)
        gradients, norm = optim.clip_grad_norm(gradients, settings.grad_clip)
        if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
            raise AvgMlxError(
                f"loss {loss.item()} and gradient {norm.item()} are not finite at step {step}; the last checkpoint "
                f"is kept in {run.folder}. Lower --learning-rate and train into another folder"
            )
        rate = _schedule(settings, settings.learning_rate)(mx.array(step - 1)).item()
        optimizer.update(model, gradients)
        mx.eval(model.trainable_parameters(), optimizer.state)
        del gradients
        mx.clear_cache()  # inputs of many lengths would each leave their buffers behind
        record = {
            "step": step,
            "loss": loss.item(),
            "learning_rate": rate,
            "samples_per_second": len(batch) / (time.perf_counter() - start),
            "peak_memory_gb": mx.get_peak_memory() / 1e9,
        }
        last = step == settings.steps
        if (step % settings.steps_per_eval == 0 or last) and (validation := _validate(model, task)) is not None:
            record["validation_loss"] = validation
        if group.rank() == 0:
            run.log(record)
            if step % settings.save_every == 0 or last:
                run.save(step, model, optimizer)
        report(record)
    mx.eval(mx.distributed.all_sum(mx.array(0), group=group))  # nobody goes on before all is saved


def _validate(model: Model, task: Task) -> float | None:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        return task.validate()
    finally:
        for module in training:
            module.train()


def _seed(*numbers: int) -> None:
    """Random state is a function of seed, step and process, so that it need not be saved to resume."""
    mx.random.seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))
