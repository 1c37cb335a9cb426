"""A checkpoint → a converted folder, one tensor at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..config import VisionConfig
from ..errors import AvgMlxError, InputError
from ..files import write_json
from ..model.avg_llava import Model
from ..model.inventory import Part, parts_of
from .checkpoint import build_model
from .model_card import model_card
from .quantization import Quantization
from .source import Source, open_source
from .sentencepiece import write_tokenizer
from .writing import SHARD_BYTES, Progress, appearing, copy_side_files, refuse_existing, write_shards

DTYPES = ("float16", "bfloat16", "float32")


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
    refuse_existing(destination)
    _refuse_contradictions(quantization, dequantize, dtype)
    source = open_source(hf_path, revision)
    stored, target = (build_model(source.keys, source.names) for _ in range(2))
    source.check(stored)

    dtype = dtype or _dtype_of(source)
    keys = {**source.keys, "torch_dtype": dtype}
    if dequantize:
        keys = dequantized(target, keys)
    target.set_dtype(getattr(mx, dtype))  # now, since 4- and 8-bit floats are dequantized to bfloat16
    if quantization:
        if "quantization" in keys:
            raise InputError(f"{source.folder} is quantized already; convert the original, or dequantize it (-d) first")
        keys = quantization.apply(target, keys)

    parts = parts_of(target)
    total = sum(part.bytes for part in parts)
    with appearing(destination, total) as folder:
        copy_side_files(source.folder, folder)
        if not source.converted:
            write_tokenizer(source.folder, folder)
            write_json(folder / "preprocessor_config.json", preprocessor_config(target.config.vision))
        tensors = converted_tensors(source, stored, target, getattr(mx, dtype))
        write_shards(folder, tensors, total, progress, shard_bytes)
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


def _refuse_contradictions(quantization: Quantization | None, dequantize: bool, dtype: str | None) -> None:
    if quantization and dequantize:
        raise InputError("quantizing and dequantizing exclude each other; ask for one")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; choose from {', '.join(DTYPES)}")


def _dtype_of(source: Source) -> str:
    declared = source.keys.get("torch_dtype")
    return declared if declared in DTYPES else str(source.read("image_newline").dtype).rpartition(".")[2]


def dequantized(model: Model, keys: dict[str, Any]) -> dict[str, Any]:
    from mlx_lm.utils import dequantize_model

    if "quantization" not in keys:
        raise InputError("there is nothing to dequantize; give a quantized converted folder")
    dequantize_model(model)
    return {key: value for key, value in keys.items() if key not in ("quantization", "quantization_config")}


def converted_tensors(source: Source, stored: Model, target: Model, dtype: mx.Dtype) -> Iterator[tuple[str, mx.array]]:
    """The target's tensors, each made from the stored ones when its turn comes."""
    stored_modules = dict(stored.named_modules())
    for path, module in target.named_modules():
        was = stored_modules[path]
        arrays = {name: source.read(_join(path, name)) for name in _own_arrays(was)}
        arrays = {n: a.astype(dtype) if mx.issubdtype(a.dtype, mx.floating) else a for n, a in arrays.items()}
        if hasattr(was, "scales") and not hasattr(module, "scales"):
            scales, biases = arrays.pop("scales"), arrays.pop("biases", None)
            arrays["weight"] = mx.dequantize(
                arrays["weight"], scales, biases, was.group_size, was.bits, was.mode, dtype=dtype
            )
        if hasattr(module, "scales") and not hasattr(was, "scales"):
            packed = mx.quantize(arrays["weight"], module.group_size, module.bits, module.mode)
            arrays |= zip(("weight", "scales", "biases"), packed, strict=False)  # some modes have no biases
        yield from ((_join(path, name), array) for name, array in arrays.items())


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _own_arrays(module: nn.Module) -> list[str]:
    return [name for name, value in module.items() if isinstance(value, mx.array) and not name.startswith("_")]


def preprocessor_config(vision: VisionConfig) -> dict[str, Any]:
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
