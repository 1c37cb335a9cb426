"""How many answers may run together: as many as there are slots, and as the memory for KV has room for."""

from collections.abc import Hashable

KV_STEP = 256  # positions by which mlx-lm's caches grow


class Admission:
    """The answers that run, each with the positions that it may grow to.

    A running batch pads every answer's KV to the longest one's, so that it takes as many positions as answers times the
    longest. An answer keeps its room until it ends. `limit` is in positions.
    """

    def __init__(self, slots: int, limit: int):
        self.slots, self.limit = slots, limit
        self._rows: dict[Hashable, int] = {}

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def positions(self) -> int:
        """The most positions that the answers take together."""
        return len(self._rows) * max(self._rows.values(), default=0)

    @property
    def longest(self) -> int:
        """The most positions that an answer can grow to, if it runs alone."""
        return self.limit - KV_STEP

    def admit(self, row: Hashable, positions: int) -> bool:
        """Give an answer room for so many positions, if there is."""
        padded = positions + KV_STEP
        if len(self) == self.slots or (len(self) + 1) * max(padded, *self._rows.values(), 0) > self.limit:
            return False
        self._rows[row] = padded
        return True

    def release(self, row: Hashable) -> None:
        """Give an answer's room to others, if it has any."""
        self._rows.pop(row, None)
