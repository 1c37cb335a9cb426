"""What fine-tuning leaves behind: a folder with the trained tensors and how they are put into a model."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from ..errors import InputError
from ..files import read_json, write_json
from ..model.avg_llava import Model
from ..model.inventory import fingerprint, tensors_of
from ..model.router import Router

WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"
FINE_TUNE_TYPES = ("lora", "dora", "full")


@dataclass(frozen=True)
class AdapterConfig:
    """How a model was changed before its tensors were trained; the first three are mlx-lm's keys."""

    fine_tune_type: str = "lora"
    num_layers: int = -1  # of the language model, from the last; -1: all; 0: none, the router alone was trained
    lora_parameters: Mapping[str, Any] | None = None  # rank, scale, dropout
    base_model: str = ""  # fingerprint

    @property
    def has_lora(self) -> bool:
        return self.fine_tune_type in ("lora", "dora") and self.num_layers != 0


def trained_tensors(model: Model) -> dict[str, mx.array]:
    """{name: array} of what is being trained."""
    return cast(dict[str, mx.array], tree_flatten(model.trainable_parameters(), destination={}))


def add_lora(model: Model, config: AdapterConfig) -> None:
    """Put LoRA or DoRA layers into the language model, as mlx-lm does."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    layers = config.num_layers if config.num_layers > 0 else len(model.language_model.layers)
    use_dora = config.fine_tune_type == "dora"
    linear_to_lora_layers(model.language_model, layers, dict(config.lora_parameters or {}), use_dora=use_dora)


def add_router(model: Model) -> None:
    """Give a model an untrained router, instead of its own if it has one."""
    model.config = replace(model.config, has_router=True)
    model.router = Router(model.config)


def save_adapters(folder: Path, config: AdapterConfig, tensors: Mapping[str, mx.array]) -> None:
    """Write both files, each at once or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".partial-{WEIGHTS}"
    mx.save_safetensors(str(partial), dict(tensors), metadata={"format": "mlx"})
    write_json(folder / f".partial-{CONFIG}", asdict(config))
    partial.replace(folder / WEIGHTS)
    (folder / f".partial-{CONFIG}").replace(folder / CONFIG)


def load_adapters(model: Model, folder: str | Path) -> AdapterConfig:
    """Put a folder's adapters into `model`; InputError if they are damaged or another model's."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise InputError(f"no adapter folder {folder}; give the folder that training wrote")
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder} lacks {CONFIG} or {WEIGHTS}; give the folder that training wrote")
    keys = read_json(folder / CONFIG)
    try:
        config = AdapterConfig(**{name: keys[name] for name in AdapterConfig.__dataclass_fields__})
        tensors = cast(dict[str, mx.array], mx.load(str(folder / WEIGHTS)))
    except (KeyError, RuntimeError) as error:
        raise InputError(f"{folder} does not hold adapters that avg-mlx wrote ({error})") from error
    if config.fine_tune_type not in FINE_TUNE_TYPES:
        raise InputError(f"{folder / CONFIG}: fine_tune_type is {config.fine_tune_type!r}, not {FINE_TUNE_TYPES}")
    if config.base_model != fingerprint(model):
        raise InputError(f"{folder} was trained on another model; give --model as in training")
    has_router = any(name.startswith("router.") for name in tensors)
    model.freeze()
    if config.has_lora:
        try:
            add_lora(model, config)
        except Exception as error:  # mlx-lm judges the keys in its way
            raise InputError(f"{folder / CONFIG} describes no adapters ({error}); train them again") from error
    if has_router:
        add_router(model)  # a new one: the model's own may be quantized
    missing = trained_tensors(model).keys() - tensors.keys()  # of what was added here
    if missing:
        raise InputError(f"{folder} lacks tensors of its adapters: {', '.join(sorted(missing))}; train them again")
    known = tensors_of(model)
    strange = [n for n, a in tensors.items() if n not in known or known[n].shape != a.shape]
    if strange:
        raise InputError(f"{folder} holds tensors that do not fit the model: {', '.join(sorted(strange))}")
    model.load_weights(list(tensors.items()), strict=False)
    if has_router:
        model.router.set_dtype(model.image_newline.dtype)  # it is trained in float32
    model.eval()
    return config
