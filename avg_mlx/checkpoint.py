"""A converted model folder: find it, load it strictly, write it in a stream."""

import contextlib
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .config import Config
from .errors import AvgMlxError, InputError
from .files import read_json, write_json
from .model import Model
from .pytorch import SafetensorsShards, Shape, load_arrays, open_shards

SHARD_BYTES = 1 << 30  # one shard is held in memory while a checkpoint is written

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


def load(path_or_repo: str | Path, revision: str | None = None, lazy: bool = False):
    """Load a converted model from a folder or the Hugging Face Hub.

    lazy: leave weights on disk until they are used. Returns (Model, mlx-lm's TokenizerWrapper). Raises InputError
    if the folder is not a converted AVG-LLaVA model, AvgMlxError if the Hub cannot be reached.
    """
    folder = find_folder(path_or_repo, revision)
    keys = read_json(folder / "config.json")
    return load_model(folder, keys, lazy), load_tokenizer(folder, keys)


def find_folder(path_or_repo: str | Path, revision: str | None = None, patterns: list[str] | None = None) -> Path:
    """A local folder, or the Hub repository of that name, downloaded."""
    if Path(path_or_repo).expanduser().exists():
        folder = Path(path_or_repo).expanduser()
        if not folder.is_dir():
            raise InputError(f"{folder} is a file; give the model's folder")
        return folder
    repo = str(path_or_repo)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo) or repo.startswith("."):
        raise InputError(f"no folder {repo}; give a model's folder or a Hub repository such as owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except Exception as error:  # of the Hub client, the network or the disk
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AvgMlxError(f"no folder {repo}, and the Hub did not give a repository of that name ({reason})") from error


def build_model(keys: Mapping[str, Any], names: Iterable[str]) -> Model:
    """An unloaded model of a config; layers with scales among the tensor `names` are quantized ones."""
    model = Model(Config.from_dict(keys))
    quantization = keys.get("quantization")
    if quantization:
        names = set(names)

        def layer_quantization(path: str, module: nn.Module) -> bool | dict:
            quantized = hasattr(module, "to_quantized") and f"{path}.scales" in names
            return quantized and quantization.get(path, True)

        nn.quantize(
            model,
            quantization["group_size"],
            quantization["bits"],
            mode=quantization.get("mode", "affine"),
            class_predicate=layer_quantization,
        )
    return model


def tensors_of(model: nn.Module) -> dict[str, mx.array]:
    """{name: array} of a model's parameters."""
    return cast(dict[str, mx.array], tree_flatten(model.parameters(), destination={}))


def shapes_of(model: nn.Module) -> dict[str, Shape]:
    """{name: shape} of a model's parameters."""
    return {name: array.shape for name, array in tensors_of(model).items()}


def check_shapes(where: Path, expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    """Raise InputError that lists all missing, unexpected and misshapen tensors."""
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    misshapen = [
        f"{name} is {found[name]}, expected {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if tuple(expected[name]) != tuple(found[name])
    ]
    findings = (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
    problems = [f"{len(names)} {kind} ({', '.join(names)})" for kind, names in findings if names]
    if problems:
        raise InputError(f"the tensors of {where} do not fit its config: {'; '.join(problems)}; download it again")


def load_model(folder: Path, keys: Mapping[str, Any], lazy: bool = False) -> Model:
    """The model of a converted folder, in evaluation mode."""
    Config.from_dict(keys)  # so that another type of model is said to be one before its weights are looked at
    shards = open_shards(folder)
    if not isinstance(shards, SafetensorsShards):
        raise InputError(f"{folder} holds pickled weights; convert it first: avg-mlx convert --hf-path {folder}")
    model = build_model(keys, shards.shapes)
    check_shapes(folder, shapes_of(model), shards.shapes)
    model.load_weights([item for file in shards.files for item in load_arrays(file).items()])
    model.eval()
    if not lazy:
        mx.eval(model.parameters())
    return model


def load_tokenizer(folder: Path, keys: Mapping[str, Any]):
    """mlx-lm's tokenizer wrapper, which stops at the config's end-of-sequence tokens and streams text."""
    with _quiet_transformers():
        from mlx_lm.tokenizer_utils import load

        try:
            return load(folder, eos_token_ids=keys.get("eos_token_id"))
        except Exception as error:
            raise InputError(f"{folder} has no usable tokenizer ({error}); convert the checkpoint again") from error


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """transformers warns that it has no PyTorch and does not know the model; only its tokenizers are used here."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def write_shards(
    folder: Path, tensors: Iterable[tuple[str, mx.array]], total: int, progress: Progress, shard_bytes: int
) -> None:
    """Evaluate and write tensors one after another, in shards with an index; memory holds one shard.

    total: bytes that are to come, for `progress`. Raises AvgMlxError when the disk refuses.
    """
    weight_map: dict[str, int] = {}
    shard: dict[str, mx.array] = {}
    shards = done = size = 0

    def flush() -> None:
        nonlocal shards, size
        shards += 1
        file = folder / f"{shards}.safetensors"
        try:
            mx.save_safetensors(str(file), shard, metadata={"format": "mlx"})
        except RuntimeError as error:
            raise AvgMlxError(f"cannot write into {folder.parent} ({error}); is the disk full?") from error
        weight_map.update(dict.fromkeys(shard, shards))
        shard.clear()
        size = 0

    for name, array in tensors:
        if shard and size + array.nbytes > shard_bytes:
            flush()
        mx.eval(array)
        shard[name] = array
        size += array.nbytes
        done += array.nbytes
        progress(done, total)
    flush()

    def file_name(i: int) -> str:
        return "model.safetensors" if shards == 1 else f"model-{i:05d}-of-{shards:05d}.safetensors"

    for i in range(1, shards + 1):
        (folder / f"{i}.safetensors").rename(folder / file_name(i))
    write_json(
        folder / "model.safetensors.index.json",
        {
            "metadata": {"total_size": done},
            "weight_map": {name: file_name(i) for name, i in sorted(weight_map.items())},
        },
    )
