"""A prompt's way into a KV cache, in steps between which other work can be done."""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from ..errors import InputError
from ..inputs.prompt import PLACEHOLDER_ID
from ..model.avg_llava import Model
from .steps import Layout


def check_joinable(layout: Layout) -> None:
    """Raise InputError for a prompt whose answer cannot be decoded beside others: mlx-lm decodes from a token."""
    if layout.ids[-1] == PLACEHOLDER_ID:
        raise InputError("this chat template ends with the image, which a batch cannot do; ask one by one")


def prefill(model: Model, embeddings: mx.array, layers: list[Any], step_size: int) -> Iterator[None]:
    """Append embeddings, (positions, D), to the KV in mlx-lm's `layers`; yields after each `step_size` positions."""
    for start in range(0, len(embeddings), step_size):
        model.hidden(embeddings[None, start : start + step_size], layers)
        mx.eval([layer.state for layer in layers])
        mx.clear_cache()
        yield
