"""The samples of each step: shuffled, of similar lengths, and the same again after a restart."""

import functools
import math
from collections.abc import Sequence

import numpy as np

WINDOW = 32  # batches within which samples are sorted by length


class Plan:
    """The samples of every step, which depend on nothing but the arguments.

    lengths: one for each sample; batch_size: samples of a step, over all processes and accumulated.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        self.lengths = np.array(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_epoch = math.ceil(len(lengths) / batch_size)
        self._epoch = functools.lru_cache(maxsize=1)(self._make_epoch)

    def batch(self, step: int) -> list[int]:
        """The numbers of a step's samples; steps are counted from 0 over all epochs."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[index].tolist()

    def _make_epoch(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.lengths))
        window = WINDOW * self.batch_size
        batches = []
        for start in range(0, len(order), window):
            part = order[start : start + window]
            part = part[np.argsort(self.lengths[part], kind="stable")]
            batches += [part[i : i + self.batch_size] for i in range(0, len(part), self.batch_size)]
        return [batches[i] for i in rng.permutation(len(batches))]


def split(samples: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Divide the numbers of samples: (to learn, to validate on). At least one validates unless `fraction` is 0."""
    order = np.random.default_rng(seed).permutation(samples)
    held_out = min(max(1, round(samples * fraction)), samples - 1) if fraction else 0
    return sorted(order[held_out:].tolist()), sorted(order[:held_out].tolist())
