"""KV of prompts and answers that others may begin with."""

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import LRUPromptCache

from ...inference.caches import Key

MOST_PROMPTS = 64  # mlx-lm looks through all of them that begin alike


class Prefixes:
    """mlx-lm's prompt cache, in at most `limit` bytes. Its keys are contents: two images are never mixed up."""

    def __init__(self, limit: int):
        self._cache: Any = LRUPromptCache(MOST_PROMPTS, limit)  # annotated for ids alone, it takes any keys

    @property
    def nbytes(self) -> int:
        """Bytes held by KV."""
        return self._cache.nbytes

    def find(self, keys: list[Key]) -> tuple[list[Any] | None, int]:
        """Copy the KV of the longest beginning of `keys` that is held, if any; returns it and its positions."""
        layers, rest = self._cache.fetch_nearest_cache("", keys)
        return layers, len(keys) - len(rest)

    def keep(self, keys: list[Key], layers: list[Any]) -> None:
        """Keep the KV of positions with these keys, for as long as it is not the least recently kept."""
        mx.eval([layer.state for layer in layers])  # so that nothing else stays alive for it
        self._cache.insert_cache("", keys, layers)

    def clear(self) -> None:
        """Drop everything."""
        self._cache.trim_to(n_sequences=0)
