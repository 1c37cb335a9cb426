"""AdamW and its learning rate: warm-up, then a cosine or a constant."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.optimizers as optim

from .options import Optimization


@dataclass(frozen=True, kw_only=True)
class LoopSettings(Optimization):
    """How to optimize, and for how many steps."""

    steps: int
    vision_learning_rate: float | None = None


def make_optimizer(settings: LoopSettings) -> optim.Optimizer:
    """Make AdamW as PyTorch has it, with warm-up. The vision tower may have a learning rate of its own."""

    def adamw(peak: float) -> optim.Optimizer:
        return optim.AdamW(make_schedule(settings, peak), weight_decay=settings.weight_decay, bias_correction=True)

    if settings.vision_learning_rate is None:
        return adamw(settings.learning_rate)
    optimizers = [adamw(settings.vision_learning_rate), adamw(settings.learning_rate)]
    return optim.MultiOptimizer(optimizers, [lambda name, _: name.startswith("vision_tower.")])


def make_schedule(settings: LoopSettings, peak: float) -> Callable[[mx.array], mx.array]:
    """Make a learning rate that rises linearly over the warm-up, then falls as a cosine to zero or stays."""
    warmup = math.ceil(settings.warmup * settings.steps)
    if settings.lr_schedule == "constant":
        after = optim.linear_schedule(peak, peak, 1)
    else:
        after = optim.cosine_decay(peak, max(settings.steps - warmup, 1))
    if warmup == 0:
        return after
    rising = optim.linear_schedule(0.0, peak, warmup)
    return optim.join_schedules([lambda step: rising(step + 1), after], [warmup])
