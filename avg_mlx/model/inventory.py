"""What a model holds: its tensors, their shapes and sizes, and a fingerprint to tell models apart."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from .avg_llava import Model


def tensors_of(model: nn.Module) -> dict[str, mx.array]:
    """{name: array} of a model's parameters."""
    return cast(dict[str, mx.array], tree_flatten(model.parameters(), destination={}))


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """{name: shape} of a model's parameters."""
    return {name: array.shape for name, array in tensors_of(model).items()}


def fingerprint(model: Model, router: bool = False) -> str:
    """A hash that tells models apart: a few numbers of each tensor, the `router`'s too where it matters."""
    digest = hashlib.sha256()
    for name, array in sorted(tensors_of(model).items()):
        if router or not name.startswith("router."):
            few = array.reshape(-1)[:64]
            few = few.astype(mx.float32) if mx.issubdtype(few.dtype, mx.floating) else few
            digest.update(f"{name} {array.shape} {array.dtype}".encode() + np.array(few).tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Part:
    """A part of a written model: what it weighs."""

    name: str
    parameters: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.parameters


def parts_of(target: Model) -> list[Part]:
    """The language model, vision tower, projector, newline token and router, as they will be written."""
    parameters: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for name, array in tensors_of(Model(target.config)).items():
        parameters[name.partition(".")[0]] += array.size
    for name, array in tensors_of(target).items():
        sizes[name.partition(".")[0]] += array.nbytes
    return [Part(name, parameters[name], sizes[name]) for name in sorted(sizes, key=sizes.__getitem__, reverse=True)]
