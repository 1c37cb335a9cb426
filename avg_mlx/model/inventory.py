"""What a model holds: its tensors, their shapes and sizes, and a fingerprint that tells models apart."""

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
    """Return {name: array} of a model's parameters."""
    return cast(dict[str, mx.array], tree_flatten(model.parameters(), destination={}))


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of a model's parameters."""
    return {name: array.shape for name, array in tensors_of(model).items()}


def sizes_of(model: nn.Module) -> dict[str, int]:
    """Return {name: bytes} of a model's parameters."""
    return {name: array.nbytes for name, array in tensors_of(model).items()}


def dtype_name(dtype: mx.Dtype) -> str:
    """Return a type's name, as in float16, without MLX's in front."""
    return str(dtype).rpartition(".")[2]


def fingerprint(model: Model, router: bool = False) -> str:
    """Return a hash of a few numbers of every tensor, the router's included only if `router`."""
    digest = hashlib.sha256()
    for name, array in sorted(tensors_of(model).items()):
        if router or not name.startswith("router."):
            few = array.reshape(-1)[:64]
            few = few.astype(mx.float32) if mx.issubdtype(few.dtype, mx.floating) else few
            digest.update(f"{name} {array.shape} {array.dtype}".encode() + np.array(few).tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Part:
    """A part of a model, and what it takes on disk."""

    name: str
    parameters: int  # of the unquantized part
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk for each parameter, a quantized layer's scales and biases included."""
        return 8 * self.bytes / self.parameters


def parts_of(model: Model) -> list[Part]:
    """Return the language model, vision tower, projector, newline token and router, the largest first."""
    parameters: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for name, array in tensors_of(Model(model.config)).items():
        parameters[name.partition(".")[0]] += array.size
    for name, size in sizes_of(model).items():
        sizes[name.partition(".")[0]] += size
    return [Part(name, parameters[name], sizes[name]) for name in sorted(sizes, key=sizes.__getitem__, reverse=True)]
