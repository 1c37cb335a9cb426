"""A checkpoint's tensors in another type or quantization, each made just before it is written."""

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn

from ..errors import InputError
from ..model.inventory import tensors_of
from .checkpoint import build_model
from .quantization import Dtype, Quantization, dequantize
from .source import Source


class Recasting:
    """A checkpoint on its way to another type or quantization, described by two unloaded models.

    `stored` is like the files, `target` is like the result, and `keys` is the result's config. No weights are read
    before `tensors` yields them. Raises InputError if the stored tensors do not fit the config, if a checkpoint that is
    quantized already is to be quantized, or if one that is not is to be dequantized.
    """

    def __init__(self, source: Source, dtype: Dtype | None, dequantized: bool, quantization: Quantization | None):
        self.source = source
        self.stored, self.target = (build_model(source.keys, source.names) for _ in range(2))
        source.check(self.stored)
        dtype = dtype or source.dtype
        self.dtype: mx.Dtype = getattr(mx, dtype)
        self.keys = source.keys | {"torch_dtype": dtype}
        if dequantized:
            if "quantization" not in self.keys:
                raise InputError(f"{source.folder} is not quantized; give a quantized converted folder to dequantize")
            self.keys = dequantize(self.target, self.keys)
        self.target.set_dtype(self.dtype)  # now, since 4- and 8-bit floats are dequantized to bfloat16
        if quantization:
            if "quantization" in self.keys:
                raise InputError(f"{source.folder} is quantized already; convert the original, or dequantize it first")
            self.keys = quantization.apply(self.target, self.keys)

    def tensors(self) -> Iterator[tuple[str, mx.array]]:
        """Yield the target's tensors by name, in the target's order, a module at a time."""
        stored, target = dict(self.stored.named_modules()), dict(self.target.named_modules())
        for path in dict.fromkeys(name.rpartition(".")[0] for name in tensors_of(self.target)):
            arrays = self._recast(path, stored[path], target[path])
            yield from ((_join(path, name), array) for name, array in arrays.items())

    def _recast(self, path: str, was: nn.Module, module: nn.Module) -> dict[str, mx.array]:
        """Read the arrays of a stored module, and turn them into those of the target's module."""
        own = [name for name, value in was.items() if isinstance(value, mx.array) and not name.startswith("_")]
        arrays = {name: self.source.read(_join(path, name)) for name in own}
        arrays = {n: a.astype(self.dtype) if mx.issubdtype(a.dtype, mx.floating) else a for n, a in arrays.items()}
        if hasattr(was, "scales") and not hasattr(module, "scales"):
            scales, biases = arrays.pop("scales"), arrays.pop("biases", None)
            arrays["weight"] = mx.dequantize(
                arrays["weight"], scales, biases, was.group_size, was.bits, was.mode, dtype=self.dtype
            )
        if hasattr(module, "scales") and not hasattr(was, "scales"):
            packed = mx.quantize(arrays["weight"], module.group_size, module.bits, module.mode)
            arrays |= zip(("weight", "scales", "biases"), packed, strict=False)  # some modes have no biases
        return arrays


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
