"""A converted model folder is loaded strictly: every tensor of its config, in its shape, and no other."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..config import Config
from ..errors import InputError, printable
from ..files import MAX_TOKENIZER, check_file, read_json
from ..inputs.prompt import probe
from ..inputs.tokenizer import Tokenizer, tokenizer_errors
from ..model.avg_llava import Model
from .adapters import load_adapters
from .hub import quiet_transformers
from .sentencepiece import tokenizer_settings
from .sharding import shard
from .shards import SafetensorsShards, load_arrays, open_shards
from .source import Source, find_folder
from .tokenizer_bounds import check_tokenizer, parts_of

TOKENIZER_SUFFIXES = (".json", ".jinja", ".model", ".txt")  # of the files that transformers looks for


def load(
    path_or_repo: str | Path,
    *,
    revision: str | None = None,
    adapter_path: str | Path | None = None,
    lazy: bool = False,
    group: mx.distributed.Group | None = None,
) -> tuple[Model, Tokenizer]:
    """Load a converted model and its tokenizer from a folder or the Hugging Face Hub.

    revision: the Hub repository's branch, tag or commit. adapter_path: a folder that training wrote, which is put on
    top. lazy: leave weights on disk until they are used. group: the processes that share the language model, each of
    which reads its part only. Raises InputError if the folder is not a converted AVG-LLaVA model, AvgMlxError if the
    Hub cannot be reached.
    """
    folder = find_folder(path_or_repo, revision)
    keys = read_json(folder / "config.json")
    model, tokenizer = load_model(folder, keys, lazy or group is not None), load_tokenizer(folder, keys)
    largest, size = max(tokenizer.get_vocab().values()), model.config.vocab_size
    if largest >= size:
        raise InputError(f"the tokenizer of {folder} has id {largest}, but the model has {size} tokens; convert again")
    if adapter_path is not None:
        load_adapters(model, adapter_path)
    if group is not None:
        shard(model, group)
    if not lazy:
        mx.eval(model.parameters())
    return model, tokenizer


def load_model(folder: Path, keys: Mapping[str, Any], lazy: bool = False) -> Model:
    """Load the model of a converted folder with config `keys`, in evaluation mode."""
    Config.from_dict(keys)  # so that another type of model is reported as one before its weights are looked at
    shards = open_shards(folder)
    if not isinstance(shards, SafetensorsShards):
        raise InputError(f"{folder} holds pickled weights; convert it first: avg-mlx convert --hf-path {folder}")
    model = build_model(keys, shards.shapes)
    Source(folder, dict(keys), [shards]).check(model)
    model.load_weights([item for file in shards.files for item in load_arrays(file).items()])
    model.eval()
    if not lazy:
        mx.eval(model.parameters())
    return model


def build_model(keys: Mapping[str, Any], names: Iterable[str]) -> Model:
    """Build the unloaded model of a config. Layers whose scales are among the tensor `names` are quantized ones.

    Raises InputError for a config that no model can be built of, or whose model could not run.
    """
    config = Config.from_dict(keys)
    try:
        model = Model(config)
        if keys.get("quantization"):
            _quantize_layers(model, keys["quantization"], set(names))
        model.eval()
        _dry_run(model)
    except InputError:
        raise
    except Exception as error:  # MLX and mlx-lm judge the other keys, each in its way
        reason = f"{type(error).__name__}: {printable(error)}"
        raise InputError(f"config.json describes no model ({reason}); download it again") from error
    return model


def _dry_run(model: Model) -> None:
    """Pass an image and two calls' tokens through an unloaded model. MLX infers the shapes, and computes nothing.

    Keys that do not fit together are found here, and not when the first question is asked.
    """
    from mlx_lm.models.cache import make_prompt_cache

    side = model.config.vision.image_size
    features = model.projector(model.vision_tower(mx.zeros((1, side, side, 3))))
    text = model.embed_text([0, 0])
    if model.config.has_router:
        model.route(features, text)
    cache = make_prompt_cache(model.language_model)
    for tokens in (text[None], text[None, :1]):
        model(tokens, cache)


def _quantize_layers(model: Model, how: Mapping[str, Any], names: set[str]) -> None:
    def layer(path: str, module: nn.Module) -> bool | dict[str, Any]:
        quantized = hasattr(module, "to_quantized") and f"{path}.scales" in names
        return quantized and how.get(path, True)

    nn.quantize(model, how["group_size"], how["bits"], mode=how.get("mode", "affine"), class_predicate=layer)
    llm = model.language_model.model
    if isinstance(llm.embed_tokens, nn.QuantizedEmbedding):
        llm.embed_tokens = TypedEmbedding(llm.embed_tokens, llm.norm)


class TypedEmbedding(nn.QuantizedEmbedding):
    """An unloaded quantized embedding whose output has the type of the model around it.

    MLX's own gives bfloat16 for 4- and 8-bit floats, whatever the model's type.
    """

    def __init__(self, embedding: nn.QuantizedEmbedding, norm: nn.Module):
        super().__init__(embedding.num_embeddings, embedding.dims, embedding.group_size, embedding.bits, embedding.mode)
        self.dtype = lambda: norm.weight.dtype  # a function, so that the norm does not become part of this module

    def __call__(self, x: mx.array) -> mx.array:
        embedded: mx.array = super().__call__(x)
        return embedded.astype(self.dtype())


def load_tokenizer(
    folder: Path, keys: Mapping[str, Any], *, name: Path | None = None, remedy: str = "convert the checkpoint again"
) -> Tokenizer:
    """Load mlx-lm's tokenizer wrapper, which stops at the end-of-sequence tokens of config `keys`.

    Raises InputError if the tokenizer is damaged or has no bound, or if its chat template loses what is said. It ends
    with the `remedy`, and calls the folder `name`.
    """
    tokenizer_settings(folder)
    for file in folder.iterdir():
        if file.suffix in TOKENIZER_SUFFIXES:
            check_file(file, remedy, MAX_TOKENIZER)
    with tokenizer_errors(f"{name or folder} has no usable tokenizer", remedy), quiet_transformers():
        from mlx_lm.tokenizer_utils import load
        from transformers import PretrainedConfig

        if not (folder / "tokenizer.json").is_file():
            raise InputError("there is no tokenizer.json")
        check_tokenizer(read_json(folder / "tokenizer.json", limit=MAX_TOKENIZER))
        # Otherwise transformers asks on standard input whether to run the folder's code, and mlx-lm runs its own.
        never = {"trust_remote_code": False, "chat_template_type": None, "tool_parser_type": None}
        # transformers would read config.json and look for what it knows there, and warn of long texts, which we bound.
        own = {"config": PretrainedConfig(), "model_max_length": None}
        tokenizer: Any = load(folder, never | own, eos_token_ids=keys.get("eos_token_id"))
        if not tokenizer.has_chat_template:
            raise InputError("there is no chat template")
        check_tokenizer(parts_of(tokenizer.backend_tokenizer))  # transformers may have built others
        probe(tokenizer)
        return cast(Tokenizer, tokenizer)
