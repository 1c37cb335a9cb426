"""A converted model folder: found, and loaded strictly."""

import contextlib
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..config import Config
from ..errors import AvgMlxError, InputError
from ..files import read_json
from ..model.avg_llava import Model
from ..model.inventory import shapes_of
from .adapters import load_adapters
from .sharding import shard
from .shards import SafetensorsShards, Shape, load_arrays, open_shards


def load(
    path_or_repo: str | Path,
    *,
    revision: str | None = None,
    adapter_path: str | Path | None = None,
    lazy: bool = False,
    group: mx.distributed.Group | None = None,
):
    """Load a converted model from a folder or the Hugging Face Hub.

    adapter_path: a folder that training wrote, put on top. lazy: leave weights on disk until they are used. group:
    processes that share the language model; each reads its part. Returns (Model, mlx-lm's TokenizerWrapper). Raises
    InputError if the folder is not a converted AVG-LLaVA model, AvgMlxError if the Hub cannot be reached.
    """
    folder = find_folder(path_or_repo, revision)
    keys = read_json(folder / "config.json")
    model, tokenizer = load_model(folder, keys, lazy or group is not None), load_tokenizer(folder, keys)
    if adapter_path is not None:
        load_adapters(model, adapter_path)
    if group is not None:
        shard(model, group)
    if not lazy:
        mx.eval(model.parameters())
    return model, tokenizer


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
    config = Config.from_dict(keys)
    try:
        model = Model(config)
        if keys.get("quantization"):
            _quantize_layers(model, keys["quantization"], set(names))
    except Exception as error:  # MLX and mlx-lm judge the rest of the keys, each in its way
        raise InputError(f"config.json describes no model ({type(error).__name__}: {error}); get it again") from error
    return model


def _quantize_layers(model: Model, quantization: Mapping[str, Any], names: set[str]) -> None:
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
    llm = model.language_model.model
    if isinstance(llm.embed_tokens, nn.QuantizedEmbedding):
        llm.embed_tokens = TypedEmbedding(llm.embed_tokens, llm.norm)


class TypedEmbedding(nn.QuantizedEmbedding):
    """MLX's, unloaded, but in the dtype of the model around it: 4- and 8-bit floats come as bfloat16 in any."""

    def __init__(self, embedding: nn.QuantizedEmbedding, norm: nn.Module):
        super().__init__(embedding.num_embeddings, embedding.dims, embedding.group_size, embedding.bits, embedding.mode)
        self.dtype = lambda: norm.weight.dtype  # a function, so that the norm is no part of this module

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x).astype(self.dtype())


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
            if not (folder / "tokenizer.json").is_file():
                raise InputError("there is no tokenizer.json")
            tokenizer = load(folder, eos_token_ids=keys.get("eos_token_id"))
            if not tokenizer.has_chat_template:
                raise InputError("there is no chat template")
            return tokenizer
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
