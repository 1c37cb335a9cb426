"""What the KV of an answer takes, and how many answers fit into memory."""

import os
from dataclasses import dataclass

import mlx.core as mx
from mlx.utils import tree_reduce

from ...model.avg_llava import Model
from .admission import KV_STEP


@dataclass(frozen=True)
class Sizing:
    """A model's needs and a machine's memory, all in bytes."""

    per_position: int  # of KV
    context_length: int  # positions
    weights: int
    memory: int  # that the device is meant to use, or the machine has

    @classmethod
    def of(cls, model: Model) -> "Sizing":
        """Size a model on this machine. Nothing is computed."""
        from mlx_lm.models.cache import make_prompt_cache

        layers = make_prompt_cache(model.language_model)
        model.hidden(mx.zeros((1, 1, model.config.hidden_size), model.dtype), layers)  # allocates KV_STEP positions
        weights = tree_reduce(lambda total, array: total + array.nbytes, model.parameters(), 0)
        per_position = sum(layer.nbytes for layer in layers) // KV_STEP
        return cls(per_position, model.config.context_length, weights, _memory())

    @property
    def room(self) -> int:
        """What the weights leave."""
        return max(0, self.memory - self.weights)

    @property
    def kv_limit(self) -> int:
        """KV of running answers: half of the room, for a batch is copied when an answer joins, or one full context."""
        return max(self.room // 2, self.kv_bytes(1))

    @property
    def cache_limit(self) -> int:
        """Each of the two caches: an eighth of the room, and no more than two gigabytes."""
        return min(self.room // 8, 2 << 30)

    def kv_bytes(self, slots: int, positions: int | None = None) -> int:
        """What answers take that run together and grow to so many positions, or to the whole context."""
        return slots * (KV_STEP + (positions or self.context_length)) * self.per_position

    def slots(self, kv_limit: int, positions: int | None = None) -> int:
        """How many such answers fit into a limit."""
        return kv_limit // self.kv_bytes(1, positions)


def _memory() -> int:
    info = mx.device_info()
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(info.get("max_recommended_working_set_size") or info.get("total_memory") or physical)
