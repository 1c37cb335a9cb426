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


class WideAdamW(optim.AdamW):
    """AdamW in float32, whatever the weights have; of 16-bit weights its state keeps float32 copies.

    In 16 bits a small step would be rounded away, and the square of a small gradient would be zero.
    """

    def init_single(self, parameter: mx.array, state: dict[str, mx.array]) -> None:
        """Begin with moments of zero, and with a copy of a 16-bit weight."""
        whole = parameter.astype(mx.float32)
        super().init_single(whole, state)
        if parameter.dtype != mx.float32:
            state["weight"] = whole

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]) -> mx.array:
        """Take a step; return the weight in its own type."""
        whole = state.get("weight", parameter).astype(mx.float32)
        whole = super().apply_single(gradient.astype(mx.float32), whole, state)
        if parameter.dtype != mx.float32:
            state["weight"] = whole
        return whole.astype(parameter.dtype)


def make_optimizer(settings: LoopSettings) -> optim.Optimizer:
    """Make AdamW as PyTorch has it, with warm-up. The vision tower may have a learning rate of its own."""

    def adamw(peak: float) -> optim.Optimizer:
        return WideAdamW(make_schedule(settings, peak), weight_decay=settings.weight_decay, bias_correction=True)

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
