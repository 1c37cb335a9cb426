"""A progress bar on stderr, where that is a terminal."""

import sys
from typing import Any

from tqdm import tqdm


class Bar:
    """Shows (done, total) of anything; steps of training also with their losses."""

    def __init__(self, title: str, unit: str = "B", hidden: bool = False):
        scale = unit == "B"
        disable = hidden or None  # None: where stderr is not a terminal
        self._bar = tqdm(desc=title, unit=unit, unit_scale=scale, file=sys.stderr, leave=False, disable=disable)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._bar.write(text, file=sys.stderr)

    def step(self, record: dict[str, Any], steps: int) -> None:
        """Show a training step's record."""
        self._bar.set_postfix(
            loss=f"{record['loss']:.4f}", samples_per_second=f"{record['samples_per_second']:.2f}", refresh=False
        )
        self.show(record["step"], steps)
