"""The demo model before training: its sizes, its tokenizer, and random weights.

    python examples/demo/start.py model build/demo/start

Between its books it gets one more way to divide pictures, and tokens for more words, and after them a router:

    python examples/demo/start.py wider build/demo/longer build/demo/wider
    python examples/demo/start.py worded build/demo/freed build/demo/worded
    python examples/demo/start.py chatty build/demo/broadened build/demo/chatty
    python examples/demo/start.py router build/demo/finished build/demo/with_router
"""

import json
import math
import re
import sys
import zlib
from pathlib import Path

import beginning
import mlx.core as mx
from mlx.utils import tree_map_with_path
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from wordings import ANSWER_WORDS, pattern_words, question_words

from avg_mlx import load
from avg_mlx.config import Config
from avg_mlx.model.avg_llava import Model
from avg_mlx.model.inventory import tensors_of
from avg_mlx.training.rglf import initialize
from avg_mlx.weights.adapters import add_router
from avg_mlx.weights.writing import write_folder

SEED = 0
CROP = 120  # pixels
CONFIG = {
    "model_type": "llava_llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "image_aspect_ratio": "anyres",
    # A square picture is one crop beside the whole, others are two, so that their letters are no smaller.
    "image_grid_pinpoints": [[CROP, CROP], [2 * CROP, CROP], [CROP, 2 * CROP]],
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -1,
    "mm_vision_select_feature": "patch",
    "vis_token_granularity": [1, 4, 25, 50, 100],
    "filtered_text_num": 32,
    "router_select": False,
    "torch_dtype": "float32",
    "vision_config": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": CROP,
        "patch_size": 12,
        "hidden_act": "quick_gelu",
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.3, 0.3, 0.3],
    },
}

# As vicuna_v1, without its system sentence, which a small model has no use for. Questions are folded to lower case, and
# their words begin with "_": a word of a question is one token, while a text that is read, and may be that very word,
# is spelled.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }} "
    "{% elif message['role'] == 'user' %}"
    "USER:_{{ message['content'] | trim | lower | replace('\\n', '_') | replace(' ', '_') }} "
    "{% else %}ASSISTANT: {{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def vocabulary() -> list[str]:
    """Words that are one token each; all else is spelled."""
    return ["USER", "ASSISTANT", *(f"_{word}" for word in question_words()), *(f"Ġ{word}" for word in ANSWER_WORDS)]


def write_tokenizer(folder: Path, words: list[str]) -> int:
    """A tokenizer of `words`, and of bytes for all else; returns its size."""
    specials = ["<pad>", "<s>", "</s>"]
    pieces = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += sorted(set(words) - set(pieces))
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[ _]?\p{L}+| ?[^\s\p{L}]|\s"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return len(pieces)


def write_model(folder: Path) -> None:
    """A folder as `convert` makes them, with random weights and no router yet; it appears when it is complete."""
    partial = folder.with_name(f"{folder.name}.partial")
    config = {**CONFIG, "vocab_size": write_tokenizer(partial, vocabulary())}
    model = Model(Config.from_dict(config))
    model.update(tree_map_with_path(initial, model.parameters()))
    mx.save_safetensors(str(partial / "model.safetensors"), tensors_of(model), metadata={"format": "mlx"})
    (partial / "config.json").write_text(json.dumps(config, indent=2))
    partial.rename(folder)


def write_wider(folder: Path, wider: Path) -> None:
    """The same model, which divides pictures three times as wide as they are high into three crops."""
    pinpoints = [*CONFIG["image_grid_pinpoints"], [3 * CROP, CROP]]
    write_changed(folder, wider, load(folder)[0], {"image_grid_pinpoints": pinpoints})


def write_worded(folder: Path, worded: Path) -> None:
    """The same model with a token for each word of the patterns, most of which it had to spell."""
    write_more_words(folder, worded, ("patterns.yaml", "more_patterns.yaml", "many_patterns.yaml"))


def write_chatty(folder: Path, chatty: Path) -> None:
    """The same model with a token for each word of the last patterns."""
    write_more_words(folder, chatty, ("chat_patterns.yaml",))


def write_more_words(folder: Path, other: Path, files: tuple[str, ...]) -> None:
    """The same model with a token for each word that files of patterns say.

    A new word begins near the average of those known: it says that something is asked, and little more.
    """
    model, _ = load(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    pieces = tokenizer["model"]["vocab"]
    embedding = model.language_model.model.embed_tokens
    known = embedding.weight[mx.array([number for piece, number in pieces.items() if re.fullmatch("_[a-z]+", piece)])]
    new = [f"_{word}" for word in pattern_words(files) if f"_{word}" not in pieces]
    pieces |= {piece: len(pieces) + n for n, piece in enumerate(new)}
    noise = mx.random.normal((len(new), known.shape[1]), key=mx.random.key(SEED)) * mx.std(known, axis=0) / 2
    embedding.weight = mx.concatenate([embedding.weight, mx.mean(known, axis=0) + noise])
    write_changed(folder, other, model, {"vocab_size": len(pieces)}, tokenizer)
    print(f"{len(new)} more words are tokens")


def write_router(folder: Path, routed: Path) -> None:
    """The same model with an untrained router. Its weights are drawn as the authors do, but for the voter's of words.

    These begin alike: a word may stand at any place of the filter, and would count for or against by chance.
    """
    model, _ = load(folder)
    mx.random.seed(SEED)
    add_router(model)
    initialize(model.router)
    model.router.voter[model.config.voter_size - model.config.filtered_text_num :] = 1
    write_changed(folder, routed, model, {"router_select": True})


def write_changed(folder: Path, other: Path, model: Model, changes: dict, tokenizer: dict | None = None) -> None:
    """Another folder for a model that was loaded from `folder` and changed, and its config and tokenizer with it."""
    config = json.loads((folder / "config.json").read_text()) | changes
    files = {"config.json": config, **{name: folder / name for name in ("tokenizer.json", "tokenizer_config.json")}}
    if tokenizer:
        files["tokenizer.json"] = tokenizer
    tensors = tensors_of(model)
    write_folder(other, files, tensors.items(), {name: array.nbytes for name, array in tensors.items()})


def initial(name: str, array: mx.array) -> mx.array:
    """Normal weights of variance 1 / inputs, less where they feed a residual stream; norms of one, biases of zero.

    A tensor's weights depend on its name and shape alone. beginning.py says how the tower begins.
    """
    key = mx.random.key(SEED + zlib.crc32(name.encode()))
    if name == "vision_tower.position_embedding":
        return beginning.places(array)
    if name.endswith(("embedding", "embed_tokens.weight", "image_newline")):
        return mx.random.normal(array.shape, key=key) * array.shape[-1] ** -0.5
    if array.ndim < 2:
        return mx.zeros_like(array) if name.endswith("bias") else array
    layers = (CONFIG["vision_config"] if name.startswith("vision_tower") else CONFIG)["num_hidden_layers"]
    feeds = name.endswith(("out_proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight"))
    weights = mx.random.normal(array.shape, key=key) / math.sqrt(array[0].size * (2 * layers if feeds else 1))
    return beginning.adapted(name, weights)


if __name__ == "__main__":
    write = {
        "model": write_model,
        "wider": write_wider,
        "worded": write_worded,
        "chatty": write_chatty,
        "router": write_router,
    }[sys.argv[1]]
    write(*map(Path, sys.argv[2:]))
