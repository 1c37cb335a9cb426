"""What is kept so that it is not computed twice: image features, and the KV of a beginning that two prompts share."""

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import numpy as np

from ..inputs.image import Crops
from ..model.avg_llava import Model

VISION_CACHE_BYTES = 1 << 30
CROPS_PER_PASS = 16  # bounds the vision tower's activations

Checksum = tuple[tuple[int, ...], mx.Dtype, int]
Key = int | tuple[str, int]  # of a position: a text token's id, or an image's digest and granularity


def encode_images(model: Model, images: Sequence[Crops]) -> list[mx.array]:
    """Features of each image, (crops, patches, D), the crops of several images in one batch."""
    features: list[mx.array] = []
    for batch in _batches(images):
        pixels = mx.array(np.concatenate([crops.pixels for crops in batch]))
        ends = list(itertools.accumulate(map(len, batch)))
        features += mx.split(model.projector(model.vision_tower(pixels)), ends[:-1])
        mx.eval(features)
    return features


def _batches(images: Sequence[Crops]) -> Iterator[list[Crops]]:
    """Group images so that each group has at most CROPS_PER_PASS crops, or is a single image."""
    batch: list[Crops] = []
    for crops in images:
        if batch and sum(map(len, batch)) + len(crops) > CROPS_PER_PASS:
            yield batch
            batch = []
        batch.append(crops)
    if batch:
        yield batch


def _checksum(features: mx.array) -> Checksum:
    """A checksum that detects in-place edits, which whoever was given an array can make."""
    return features.shape, features.dtype, cast(int, features.view(mx.uint32).sum().item())


@dataclass(frozen=True)
class _Entry:
    features: mx.array
    checksum: Checksum


class VisionCache:
    """A model's image features in at most `limit` bytes; the least recently used are dropped first.

    The key is a hash of the crops. They are exactly what the vision tower sees, so every setting that matters has
    already acted on them. A cache belongs to one model, whose vision tower and projector must not change.
    """

    def __init__(self, model: Model, limit: int = VISION_CACHE_BYTES):
        self.model, self.limit = model, limit
        self.hits = self.misses = 0
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes held by features."""
        return sum(entry.features.nbytes for entry in self._entries.values())

    def __contains__(self, crops: Crops) -> bool:
        return crops.digest in self._entries

    def features(self, images: Sequence[Crops]) -> list[mx.array]:
        """Return each image's features, (crops, patches, D). Those that are not held are computed, each image once."""
        distinct = {crops.digest: crops for crops in images}
        held = {digest: features for digest in distinct if (features := self._find(digest)) is not None}
        missing = [crops for digest, crops in distinct.items() if digest not in held]
        for crops, features in zip(missing, encode_images(self.model, missing), strict=True):
            held[crops.digest] = features
            self._keep(crops.digest, features)
        self.misses += len(missing)
        self.hits += len(images) - len(missing)
        return [held[crops.digest] for crops in images]

    def clear(self) -> None:
        """Drop all features."""
        self._entries.clear()

    def _find(self, digest: str) -> mx.array | None:
        """Return an image's features, or None if they are not held or were changed in place."""
        entry = self._entries.pop(digest, None)
        if entry is None or _checksum(entry.features) != entry.checksum:
            return None
        self._entries[digest] = entry  # now the most recently used
        return entry.features

    def _keep(self, digest: str, features: mx.array) -> None:
        features = mx.contiguous(features)  # a view would keep its whole batch alive
        if features.nbytes > self.limit:
            return
        self._entries[digest] = _Entry(features, _checksum(features))
        while self.nbytes > self.limit:
            self._entries.popitem(last=False)


@dataclass
class Loan:
    """A prompt's KV while it is prefilled and answered."""

    layers: list[Any]  # mlx-lm's caches
    keys: list[Key]  # one for each prompt position; the borrower appends the answer's tokens as they come
    reused: int  # leading positions that need no prefill


class PrefixCache:
    """The KV of the last prompt and its answer; the next prompt reuses the positions that both begin with."""

    def __init__(self) -> None:
        self._layers: list[Any] = []
        self._keys: list[Key] = []

    @property
    def nbytes(self) -> int:
        """Bytes held by KV."""
        return sum(layer.nbytes for layer in self._layers)

    @contextmanager
    def lend(self, keys: list[Key], fresh: list[Any]) -> Iterator[Loan]:
        """Lend KV for a prompt with these keys, in `fresh` layers if nothing can be reused, and keep it afterwards.

        If an error or Ctrl-C ends the answer, a layer may be half-written, so nothing is kept.
        """
        loan = self._reuse(keys) or Loan(fresh, keys, 0)
        self._layers, self._keys = [], []
        try:
            yield loan
        except GeneratorExit:  # abandoned between two tokens, where all layers are whole
            self._keep(loan)
            raise
        self._keep(loan)

    def _reuse(self, keys: list[Key]) -> Loan | None:
        from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache
        from mlx_lm.utils import common_prefix_len

        reused = min(common_prefix_len(self._keys, keys), len(keys) - 1)  # the last position's logits are needed
        if not reused or not can_trim_prompt_cache(self._layers):
            return None
        trim_prompt_cache(self._layers, len(self._keys) - reused)
        return Loan(self._layers, keys, reused)

    def _keep(self, loan: Loan) -> None:
        """Keep the positions whose keys are known; decoding may be a token ahead of them."""
        from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

        held = min(loan.layers[0].offset, len(loan.keys))
        if can_trim_prompt_cache(loan.layers):
            trim_prompt_cache(loan.layers, loan.layers[0].offset - held)
            self._layers, self._keys = loan.layers, loan.keys[:held]
