"""How far work has come, on stderr: a bar where that is a terminal, and lines of training elsewhere."""

import sys
from typing import Any

from tqdm import tqdm


class Bar:
    """Shows (done, total) of anything; steps of training also with their losses.

    every: where stderr is not a terminal, each of that many training steps is a line; 0 prints none.
    """

    def __init__(self, title: str, unit: str = "B", hidden: bool = False, every: int = 0):
        scale = unit == "B"
        disable = hidden or None  # None: where stderr is not a terminal
        self._bar = tqdm(desc=title, unit=unit, unit_scale=scale, file=sys.stderr, leave=False, disable=disable)
        self._title, self._every = title, every if self._bar.disable and not hidden else 0

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, done: int, total: int) -> None:
        """Move the bar."""
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.write(text, file=sys.stderr)

    def step(self, record: dict[str, Any], steps: int) -> None:
        """Show a training step's record."""
        loss, speed, step = f"{record['loss']:.4f}", f"{record['samples_per_second']:.2f}", record["step"]
        self._bar.set_postfix(loss=loss, samples_per_second=speed, refresh=False)
        self.show(step, steps)
        validation = f", validation loss {record['validation_loss']:.4f}" if "validation_loss" in record else ""
        if self._every and (step % self._every == 0 or step == steps or validation):
            self.say(
                f"{self._title}: step {step} of {steps}, loss {loss}{validation}, learning rate "
                f"{record['learning_rate']:.3g}, {speed} samples/s, peak memory {record['peak_memory_gb']:.2f} GB"
            )
