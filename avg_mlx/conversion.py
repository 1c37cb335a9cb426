"""A checkpoint → a converted folder, one tensor at a time."""

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .checkpoint import SHARD_BYTES, Progress, build_model, tensors_of, write_shards
from .config import VisionConfig
from .errors import AvgMlxError, InputError
from .files import write_json
from .model import Model
from .model_card import model_card
from .quantization import Quantization
from .source import Source, open_source
from .tokenizer import write_tokenizer

DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Part:
    """A part of a written model: what it weighs."""

    name: str
    parameters: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.parameters


def convert(
    hf_path: str | Path,
    mlx_path: str | Path = "mlx_model",
    *,
    revision: str | None = None,
    quantization: Quantization | None = None,
    dequantize: bool = False,
    dtype: str | None = None,
    progress: Progress = lambda done, total: None,
    shard_bytes: int = SHARD_BYTES,
) -> list[Part]:
    """Write a checkpoint folder or Hub repository as a converted model to `mlx_path`, which must not exist yet.

    hf_path: a checkpoint in the authors' PyTorch layout, or a converted one to requantize, dequantize or recast.
    dtype: of all that is not quantized; by default the checkpoint's own. `mlx_path` appears only when it is
    complete. Returns the model's parts. Raises InputError or AvgMlxError, and then leaves nothing behind.
    """
    destination = Path(mlx_path).expanduser()
    _refuse_existing(destination)
    _refuse_contradictions(quantization, dequantize, dtype)
    source = open_source(hf_path, revision)
    stored, target = (build_model(source.keys, source.names) for _ in range(2))
    source.check(stored)

    dtype = dtype or _dtype_of(source)
    target.set_dtype(getattr(mx, dtype))
    keys = {**source.keys, "torch_dtype": dtype}
    if dequantize:
        keys = _dequantize(target, keys)
    if quantization:
        if "quantization" in keys:
            raise InputError(f"{source.folder} is quantized already; convert the original, or dequantize it (-d) first")
        keys = quantization.apply(target, keys)

    parts = _parts(target)
    total = sum(part.bytes for part in parts)
    with _appearing(destination, total) as folder:
        write_shards(folder, _stream(source, stored, target, getattr(mx, dtype)), total, progress, shard_bytes)
        write_tokenizer(source.folder, folder)
        write_json(folder / "preprocessor_config.json", _preprocessor_config(target.config.vision))
        if (source.folder / "generation_config.json").is_file():
            shutil.copyfile(source.folder / "generation_config.json", folder / "generation_config.json")
        (folder / "README.md").write_text(model_card(str(hf_path), keys), encoding="utf-8")
        write_json(folder / "config.json", dict(sorted(keys.items())))
    return parts


def upload(folder: str | Path, repo: str) -> str:
    """Upload a converted folder to a Hub repository, made if need be; returns its address."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder)
    except Exception as error:  # of the Hub client, the network or the account
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AvgMlxError(f"cannot upload to {repo} ({reason}); {folder} is complete, try again later") from error
    return str(address)


def _refuse_existing(destination: Path) -> None:
    if destination.exists() or destination.is_symlink():
        raise InputError(f"{destination} exists already; choose another --mlx-path, or remove it yourself")


def _refuse_contradictions(quantization: Quantization | None, dequantize: bool, dtype: str | None) -> None:
    if quantization and dequantize:
        raise InputError("quantizing and dequantizing exclude each other; ask for one")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; choose from {', '.join(DTYPES)}")


def _dtype_of(source: Source) -> str:
    declared = source.keys.get("torch_dtype")
    return declared if declared in DTYPES else str(source.read("image_newline").dtype).rpartition(".")[2]


def _dequantize(model: Model, keys: dict[str, Any]) -> dict[str, Any]:
    from mlx_lm.utils import dequantize_model

    if "quantization" not in keys:
        raise InputError("there is nothing to dequantize; give a quantized converted folder")
    dequantize_model(model)
    return {key: value for key, value in keys.items() if key not in ("quantization", "quantization_config")}


def _stream(source: Source, stored: Model, target: Model, dtype: mx.Dtype) -> Iterator[tuple[str, mx.array]]:
    """The target's tensors, each made from the stored ones when its turn comes."""
    stored_modules = dict(stored.named_modules())
    for path, module in target.named_modules():
        was = stored_modules[path]
        arrays = {name: source.read(_join(path, name)) for name in _own_arrays(was)}
        arrays = {n: a.astype(dtype) if mx.issubdtype(a.dtype, mx.floating) else a for n, a in arrays.items()}
        if hasattr(was, "scales") and not hasattr(module, "scales"):
            arrays["weight"] = mx.dequantize(
                arrays["weight"], arrays.pop("scales"), arrays.pop("biases", None), was.group_size, was.bits, was.mode
            )
        if hasattr(module, "scales") and not hasattr(was, "scales"):
            packed = mx.quantize(arrays["weight"], module.group_size, module.bits, module.mode)
            arrays |= zip(("weight", "scales", "biases"), packed, strict=False)  # some modes have no biases
        yield from ((_join(path, name), array) for name, array in arrays.items())


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _own_arrays(module: nn.Module) -> list[str]:
    return [name for name, value in module.items() if isinstance(value, mx.array) and not name.startswith("_")]


def _parts(target: Model) -> list[Part]:
    """The language model, vision tower, projector, newline token and router, as they will be written."""
    parameters: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for name, array in tensors_of(Model(target.config)).items():
        parameters[name.partition(".")[0]] += array.size
    for name, array in tensors_of(target).items():
        sizes[name.partition(".")[0]] += array.nbytes
    return [Part(name, parameters[name], sizes[name]) for name in sorted(sizes, key=sizes.__getitem__, reverse=True)]


@contextmanager
def _appearing(destination: Path, size: int) -> Iterator[Path]:
    """A hidden folder that becomes `destination` when all went well, and otherwise goes away."""
    folder = destination.with_name(f".{destination.name}.{os.getpid()}.partial")
    try:
        folder.mkdir(parents=True)
        free = shutil.disk_usage(folder).free
        if free < size:
            raise AvgMlxError(
                f"{destination} needs {size / 1e9:.2f} GB but its disk has {free / 1e9:.2f} GB free; make room"
            )
        yield folder
        _refuse_existing(destination)
        folder.rename(destination)
    except OSError as error:
        raise AvgMlxError(f"cannot write {destination} ({error.strerror or error}); nothing was left there") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _preprocessor_config(vision: VisionConfig) -> dict[str, Any]:
    """For other tools; this package reads the same values from config.json."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": vision.image_size},
        "do_center_crop": True,
        "crop_size": {"height": vision.image_size, "width": vision.image_size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
    }
