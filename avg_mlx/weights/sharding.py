"""The language model, split over a group of processes. Each has the whole vision tower and router."""

import math
from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..errors import InputError
from ..model.avg_llava import Model


def shard(model: Model, group: mx.distributed.Group) -> None:
    """Leave this process its share of every layer of the language model, by mlx-lm's tensor parallelism.

    Raises InputError if equal shares cannot be made, or if there are adapters.
    """
    if group.size() == 1:
        return
    layers = model.language_model.layers
    projections = [module for layer in layers for name, module in layer.named_modules() if name.endswith("_proj")]
    if not all(isinstance(module, nn.Linear | nn.QuantizedLinear) for module in projections):
        raise InputError("adapters cannot be split over processes; fuse them into the model first: avg-mlx fuse")
    args = model.language_model.args
    parts = {
        "attention heads": args.num_attention_heads,
        "key-value heads": args.num_key_value_heads,
        "feed-forward units": args.intermediate_size,
    }
    inputs_split = [module for layer in layers for module in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    if groups := [module.scales.shape[-1] for module in inputs_split if isinstance(module, nn.QuantizedLinear)]:
        parts["quantization groups"] = math.gcd(*groups)
    shares = math.gcd(*parts.values())
    if shares % group.size():
        found = ", ".join(f"{count} {what}" for what, count in parts.items())
        fitting = " or ".join(str(n) for n in range(1, shares + 1) if shares % n == 0)
        raise InputError(
            f"{group.size()} processes cannot share this language model equally ({found}); start {fitting}"
        )
    model.language_model.shard(group)
    if model.config.has_router:
        model.router = Agreed(model.router, group)  # type: ignore[assignment]


class Agreed(nn.Module):
    """A router or a sampler that returns the first process's result in every process.

    The processes' sums may round differently, and even the shapes of what is computed next depend on the result.
    """

    def __init__(self, function: Callable[..., mx.array], group: mx.distributed.Group):
        super().__init__()
        self.function = function
        self.group = group

    def __call__(self, *inputs: Any) -> mx.array:
        from mlx_lm.generate import generation_stream

        result = self.function(*inputs)
        mine = result if self.group.rank() == 0 else mx.zeros_like(result)
        # On this stream the sum comes after the last answer's steps, for which nobody waits.
        with mx.stream(cast(mx.Stream, generation_stream)):
            return mx.distributed.all_sum(mine, group=self.group)
