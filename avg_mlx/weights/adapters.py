"""Adapters: a folder that fine-tuning wrote, with the trained tensors and how they are put into a model."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import mlx.core as mx
from mlx.utils import tree_flatten

from ..errors import InputError, listing, printable, shown
from ..files import read_json, replacing, write_json
from ..model.avg_llava import Model
from ..model.inventory import dtype_name, fingerprint, tensors_of
from ..model.router import Router
from .shards import SafetensorsShards, load_arrays

WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"
MAX_RANK = 1 << 16
MAX_SCALE = 1_000_000

# What mlx-lm asks of its lora_parameters, but would find out about in its own way, or when the adapters are used.
LORA_PARAMETERS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "rank": (f"a whole number from 1 to {MAX_RANK}", lambda n: type(n) is int and 1 <= n <= MAX_RANK),
    "scale": (f"a number within {MAX_SCALE:,}", lambda n: type(n) in (int, float) and abs(n) <= MAX_SCALE),
    "dropout": ("a number from 0 to below 1", lambda n: type(n) in (int, float) and 0 <= n < 1),
    "keys": ("a list of names", lambda names: names is None or (type(names) is list and {*map(type, names)} <= {str})),
}
FineTuneType = Literal["lora", "dora", "full"]


@dataclass(frozen=True)
class AdapterConfig:
    """How a model was changed before its tensors were trained. The first three are mlx-lm's keys."""

    fine_tune_type: FineTuneType = "lora"
    num_layers: int = -1  # of the language model, counted from its end; -1: all; 0: the router alone was trained
    lora_parameters: Mapping[str, Any] | None = None  # rank, scale, dropout
    base_model: str = ""  # the model's fingerprint

    def check(self) -> None:
        """Raise InputError for values that no adapters have."""
        if self.fine_tune_type not in get_args(FineTuneType):
            raise InputError(f"fine_tune_type is {shown(self.fine_tune_type)}, expected lora, dora or full")
        if type(self.num_layers) is not int or self.num_layers < -1:
            raise InputError(f"num_layers is {shown(self.num_layers)}, expected a whole number from -1")
        given = self.lora_parameters if isinstance(self.lora_parameters, Mapping) else {}
        for name, (expected, fits) in LORA_PARAMETERS.items() if self.has_lora else ():
            if not fits(given.get(name)):
                raise InputError(f"{name} is {shown(given.get(name))} in lora_parameters, expected {expected}")

    @property
    def has_lora(self) -> bool:
        """Whether there are LoRA or DoRA layers."""
        return self.fine_tune_type in ("lora", "dora") and self.num_layers != 0


def trained_tensors(model: Model) -> dict[str, mx.array]:
    """Return {name: array} of what is being trained."""
    return cast(dict[str, mx.array], tree_flatten(model.trainable_parameters(), destination={}))


def add_lora(model: Model, config: AdapterConfig) -> None:
    """Put mlx-lm's LoRA or DoRA layers into the language model."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    layers = config.num_layers if config.num_layers > 0 else len(model.language_model.layers)
    use_dora = config.fine_tune_type == "dora"
    linear_to_lora_layers(model.language_model, layers, dict(config.lora_parameters or {}), use_dora=use_dora)


def add_router(model: Model) -> None:
    """Give a model an untrained router, which takes the place of any that it has."""
    model.config = replace(model.config, has_router=True)
    model.router = Router(model.config)


def save_adapters(folder: Path, config: AdapterConfig, tensors: Mapping[str, mx.array]) -> None:
    """Write both files, or leave those that were there."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / CONFIG) as config_file, replacing(folder / WEIGHTS) as weights:
        mx.save_safetensors(str(weights), dict(tensors), metadata={"format": "mlx"})
        write_json(config_file, asdict(config))


def load_adapters(model: Model, folder: str | Path) -> AdapterConfig:
    """Put a folder's adapters into `model`. Raises InputError if they are damaged, or were trained on another model."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise InputError(f"there is no adapter folder {folder}; give the folder that training wrote")
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder} lacks {CONFIG} or {WEIGHTS}; give the folder that training wrote")
    keys = read_json(folder / CONFIG, "train them again")
    try:
        config = AdapterConfig(**{name: keys[name] for name in AdapterConfig.__dataclass_fields__})
        config.check()
    except KeyError as error:
        raise InputError(f"{folder} does not hold adapters that avg-mlx wrote ({error}); train them again") from None
    except InputError as error:
        raise InputError(f"{folder / CONFIG} describes no adapters ({error}); train them again") from None
    try:
        SafetensorsShards([folder / WEIGHTS])  # checks the header, which MLX takes as it stands
        tensors = load_arrays(folder / WEIGHTS)
    except InputError as error:
        raise InputError(f"{folder} does not hold adapters that avg-mlx wrote ({error}); train them again") from None
    if config.base_model != fingerprint(model):
        raise InputError(f"{folder} was trained on another model; give --model as in training")
    has_router = any(name.startswith("router.") for name in tensors)
    model.freeze()
    if config.has_lora:
        try:
            add_lora(model, config)
        except Exception as error:  # mlx-lm judges the keys in its own way
            raise InputError(
                f"{folder / CONFIG} describes no adapters ({printable(error)}); train them again"
            ) from error
    if has_router:
        add_router(model)  # a new one, since the model's own may be quantized
    missing = trained_tensors(model).keys() - tensors.keys()  # what was added above has to be there
    if missing:
        raise InputError(f"{folder} lacks tensors of its adapters: {listing(sorted(missing))}; train them again")
    known = tensors_of(model)
    strange = [name for name, array in tensors.items() if name not in known or known[name].shape != array.shape]
    if strange:
        raise InputError(f"{folder} holds tensors that do not fit the model: {listing(sorted(strange))}")
    wrong = [n for n, a in tensors.items() if not mx.issubdtype(a.dtype, mx.floating)]
    if wrong:
        found, expected = (dtype_name(arrays[wrong[0]].dtype) for arrays in (tensors, known))
        raise InputError(
            f"{len(wrong)} of the tensors of {folder} cannot be computed with "
            f"(the first: {wrong[0]} is {found}, expected {expected}); train them again"
        )
    model.load_weights(list(tensors.items()), strict=False)
    if has_router:
        model.router.set_dtype(model.dtype)  # it is trained in float32
    model.eval()
    return config
