"""What need not be computed twice: an image's features, and the KV of the positions that two prompts begin with."""

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
    """As many images together as have CROPS_PER_PASS crops, at least one."""
    batch: list[Crops] = []
    for crops in images:
        if batch and sum(map(len, batch)) + len(crops) > CROPS_PER_PASS:
            yield batch
            batch = []
        batch.append(crops)
    if batch:
        yield batch


def _checksum(features: mx.array) -> Checksum:
    """What an array is known again by; arrays can be changed in place by whoever was given them."""
    return features.shape, features.dtype, cast(int, features.view(mx.uint32).sum().item())


@dataclass(frozen=True)
class _Entry:
    features: mx.array
    checksum: Checksum


class VisionCache:
    """A model's image features, within `limit` bytes; the least recently used give way.

    They are found by a hash of the crops: exactly what the vision tower sees, and so the outcome of every setting that
    goes before it. A cache belongs to one model, whose vision tower and projector must stay as they are.
    """

    def __init__(self, model: Model, limit: int = VISION_CACHE_BYTES):
        self.model, self.limit = model, limit
        self.hits = self.misses = 0
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(entry.features.nbytes for entry in self._entries.values())

    def __contains__(self, crops: Crops) -> bool:
        return crops.digest in self._entries

    def features(self, images: Sequence[Crops]) -> list[mx.array]:
        """Features of each image, (crops, patches, D); what is not held is computed, each image once."""
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
        self._entries.clear()

    def _find(self, digest: str) -> mx.array | None:
        """The features, unless they are not held or no longer what they were."""
        entry = self._entries.pop(digest, None)
        if entry is None or _checksum(entry.features) != entry.checksum:
            return None
        self._entries[digest] = entry  # as the last used
        return entry.features

    def _keep(self, digest: str, features: mx.array) -> None:
        features = mx.contiguous(features)  # not a part of a batch, all of which it would hold
        if features.nbytes > self.limit:
            return
        self._entries[digest] = _Entry(features, _checksum(features))
        while self.nbytes > self.limit:
            self._entries.popitem(last=False)


@dataclass
class Loan:
    """A prompt's KV while it is prefilled and answered."""

    layers: list[Any]  # mlx-lm's caches
    keys: list[Key]  # of the prompt's positions; the answer's tokens are to be added as they come
    reused: int  # leading positions that need not be prefilled


class PrefixCache:
    """The KV of the last prompt and its answer, of which the next prompt reuses the positions that both begin with."""

    def __init__(self) -> None:
        self._layers: list[Any] = []
        self._keys: list[Key] = []

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(layer.nbytes for layer in self._layers)

    @contextmanager
    def lend(self, keys: list[Key], fresh: list[Any]) -> Iterator[Loan]:
        """KV for a prompt of these keys, in `fresh` layers where nothing can be reused. Afterwards it is kept.

        Not so when an error or Ctrl-C ends the answer, which may leave a layer half-written: then nothing is held.
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

        pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self._keys, keys, strict=False))
        reused = min(sum(1 for _ in pairs), len(keys) - 1)  # the last position's logits are wanted
        if not reused or not can_trim_prompt_cache(self._layers):
            return None
        trim_prompt_cache(self._layers, len(self._keys) - reused)
        return Loan(self._layers, keys, reused)

    def _keep(self, loan: Loan) -> None:
        """Keep as much as is known of a loan: decoding may be a token ahead of those that came."""
        from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

        held = min(loan.layers[0].offset, len(loan.keys))
        if can_trim_prompt_cache(loan.layers):
            trim_prompt_cache(loan.layers, loan.layers[0].offset - held)
            self._layers, self._keys = loan.layers, loan.keys[:held]
