"""What to quantize and how; the quantizing itself is mlx-lm's."""

import contextlib
import io
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from ..errors import InputError
from ..model.avg_llava import Model

RECIPES = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")  # mlx-lm's, of mixed bits
AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)
FIXED_MODES = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}  # mode: (bits, group size)
MODES = ("affine", *FIXED_MODES)


@dataclass(frozen=True)
class Quantization:
    """The language model's quantization, and on request the vision tower's (with the projector) and the router's.

    Raises InputError when made of values that MLX does not support.
    """

    bits: int | None = None  # None: 4, or what the mode fixes
    group_size: int | None = None  # None: 64, or what the mode fixes
    mode: str = "affine"
    recipe: str | None = None
    vision_bits: int | None = None  # None: not quantized
    router_bits: int | None = None

    def __post_init__(self) -> None:
        _supported("quantization mode", self.mode, MODES)
        bits, group_size = FIXED_MODES.get(self.mode, (None, None))
        _supported(f"bit width of mode {self.mode}", self.bits, (bits,) if bits else AFFINE_BITS)
        _supported(f"group size of mode {self.mode}", self.group_size, (group_size,) if group_size else AFFINE_GROUPS)
        _supported("bit width of the vision tower", self.vision_bits, AFFINE_BITS)
        _supported("bit width of the router", self.router_bits, AFFINE_BITS)
        _supported("recipe", self.recipe, RECIPES)
        if self.recipe is not None and (self.mode != "affine" or self.bits is not None):
            raise InputError(f"recipe {self.recipe} sets its own bits, in affine mode; leave bits and mode out")

    def apply(self, model: Model, keys: dict[str, Any]) -> dict[str, Any]:
        """Quantize `model` in place; returns the config `keys` with mlx-lm's `quantization` added."""
        from mlx_lm.convert import mixed_quant_predicate_builder
        from mlx_lm.utils import quantize_model

        affine_group = self.group_size if self.mode == "affine" and self.group_size else 64
        recipe: Any = self.recipe and mixed_quant_predicate_builder(self.recipe, model.language_model, affine_group)
        bits_of = {"vision_tower": self.vision_bits, "projector": self.vision_bits, "router": self.router_bits}

        def layer_quantization(path: str, module: nn.Module) -> bool | dict:
            part, _, rest = path.partition(".")
            if part == "language_model":
                return recipe(rest, module) if recipe else True
            if not bits_of[part] or module.weight.shape[-1] % affine_group:
                return False
            return {"group_size": affine_group, "bits": bits_of[part], "mode": "affine"}

        with contextlib.redirect_stdout(io.StringIO()):  # quantize_model prints
            _, keys = quantize_model(
                model, keys, self.group_size, self.bits, self.mode, quant_predicate=layer_quantization
            )
        if not any(hasattr(module, "scales") for module in model.modules()):
            raise InputError(
                f"no layer's width is a multiple of the group size {keys['quantization']['group_size']}, so nothing "
                "would be quantized; choose a smaller group size"
            )
        return keys


def _supported(what: str, value: object, allowed: tuple) -> None:
    if value is not None and value not in allowed:
        raise InputError(f"{what} is {value}, which MLX does not support; choose from {', '.join(map(str, allowed))}")
