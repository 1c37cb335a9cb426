"""How weights are stored: in which type, and what is quantized how. The quantizing itself is mlx-lm's.

Nothing here loads MLX before something is quantized, so that the command line can list the choices.
"""

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..errors import InputError

if TYPE_CHECKING:
    import mlx.nn as nn

    from ..model.avg_llava import Model

Dtype = Literal["float16", "bfloat16", "float32"]
Mode = Literal["affine", "mxfp4", "nvfp4", "mxfp8"]
Recipe = Literal["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"]  # mlx-lm's mixtures of bits

DTYPES: tuple[Dtype, ...] = get_args(Dtype)
MODES: tuple[Mode, ...] = get_args(Mode)
RECIPES: tuple[Recipe, ...] = get_args(Recipe)
AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)
FIXED_MODES = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}  # mode: (bits, group size)


@dataclass(frozen=True)
class Quantization:
    """How to quantize the language model and, on request, the vision tower with the projector, and the router.

    Raises InputError when it is made of values that MLX does not support.
    """

    bits: int | None = None  # None: 4, or what the mode fixes
    group_size: int | None = None  # None: 64, or what the mode fixes
    mode: Mode = "affine"
    recipe: Recipe | None = None
    vision_bits: int | None = None  # None: not quantized
    router_bits: int | None = None

    def __post_init__(self) -> None:
        _check("mode", self.mode, MODES)
        bits, group_size = FIXED_MODES.get(self.mode, (None, None))
        _check("bits", self.bits, (bits,) if bits else AFFINE_BITS, f" in mode {self.mode}")
        _check("group_size", self.group_size, (group_size,) if group_size else AFFINE_GROUPS, f" in mode {self.mode}")
        _check("vision_bits", self.vision_bits, AFFINE_BITS)
        _check("router_bits", self.router_bits, AFFINE_BITS)
        _check("recipe", self.recipe, RECIPES)
        if self.recipe is not None and (self.mode != "affine" or self.bits is not None):
            given = f"mode={self.mode}" if self.mode != "affine" else f"bits={self.bits}"
            raise InputError(f"recipe={self.recipe} sets its own bits in affine mode; leave out {given}")

    def apply(self, model: "Model", keys: dict[str, Any]) -> dict[str, Any]:
        """Quantize `model` in place, and return the config `keys` with mlx-lm's `quantization` added.

        Raises InputError if no layer's width is a multiple of the group size.
        """
        from mlx_lm.convert import mixed_quant_predicate_builder
        from mlx_lm.utils import quantize_model

        affine_group = self.group_size if self.mode == "affine" and self.group_size else 64
        recipe: Any = self.recipe and mixed_quant_predicate_builder(self.recipe, model.language_model, affine_group)
        bits_of = {"vision_tower": self.vision_bits, "projector": self.vision_bits, "router": self.router_bits}

        def predicate(path: str, module: "nn.Module") -> bool | dict[str, Any]:
            part, _, rest = path.partition(".")
            if part == "language_model":
                return recipe(rest, module) if recipe else True
            if not bits_of[part] or module.weight.shape[-1] % affine_group:
                return False
            return {"group_size": affine_group, "bits": bits_of[part], "mode": "affine"}

        with contextlib.redirect_stdout(io.StringIO()):  # quantize_model prints
            _, keys = quantize_model(model, keys, self.group_size, self.bits, self.mode, quant_predicate=predicate)
        if not any(hasattr(module, "scales") for module in model.modules()):
            size = keys["quantization"]["group_size"]
            reason = f"no layer's width is a multiple of group_size={size}"
            raise InputError(f"nothing can be quantized, since {reason}; choose a smaller one")
        return keys


def widths(quantization: Mapping[str, Any]) -> list[int]:
    """The bits that a config's `quantization` gives to layers of the language model, the fewest first."""
    layers = [about for name, about in quantization.items() if name.startswith("language_model.")]
    told = [about for about in layers if isinstance(about, Mapping) and "bits" in about] or [quantization]
    return sorted({about["bits"] for about in told if "bits" in about})


def dequantize(model: "Model", keys: dict[str, Any]) -> dict[str, Any]:
    """Dequantize whatever is quantized in `model`, in place, and return the config `keys` without quantization."""
    from mlx_lm.utils import dequantize_model

    dequantize_model(model)
    return {key: value for key, value in keys.items() if key not in ("quantization", "quantization_config")}


def _check(name: str, value: object, allowed: Sequence[object], where: str = "") -> None:
    if value is not None and value not in allowed:
        raise InputError(f"{name}={value} is not supported{where}; choose from {', '.join(map(str, allowed))}")
