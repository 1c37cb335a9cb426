"""A SentencePiece `tokenizer.model` becomes a Hugging Face `tokenizer.json`.

The reference tokenizes with SentencePiece itself. Ready-made converters rank merges by piece number, but Llama's
whitespace pieces have low numbers and the lowest score of all, so runs of spaces come out wrong. Here merges are
ranked by score, as SentencePiece ranks them.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, shown
from ..files import MAX_TOKENIZER, read_file, read_json
from ..inputs.prompt import CHAT_TEMPLATE
from .writing import Content

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPACE = "▁"


def tokenizer_files(folder: Path) -> dict[str, Content]:
    """Return the tokenizer.json and the tokenizer_config.json, with a chat template, for a PyTorch checkpoint.

    A tokenizer.model wins over a tokenizer.json, since the reference reads it. Raises InputError if the folder has
    neither, or if its files are damaged.
    """
    settings = tokenizer_settings(folder)
    with damaged_tokenizer(folder):
        return _tokenizer_files(folder, settings)


@contextmanager
def damaged_tokenizer(folder: Path) -> Iterator[None]:
    """Turn what an unexpected value in a tokenizer's files raises into an InputError."""
    try:
        yield
    except InputError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, StopIteration) as error:
        raise InputError(
            f"the tokenizer of {folder} is damaged ({type(error).__name__}: {error}); download its files again"
        ) from error


def tokenizer_settings(folder: Path) -> dict[str, Any]:
    """Return a folder's tokenizer_config.json, which may be missing. InputError if transformers could not use it."""
    file = folder / "tokenizer_config.json"
    settings = read_json(file) if file.exists() else {}
    longest = settings.get("model_max_length")
    if longest is not None and (type(longest) not in (int, float) or not 0 < longest < math.inf):
        raise InputError(
            f"{file} is damaged: model_max_length is {shown(longest)}, expected a number above 0; download it again"
        )
    return settings


def _tokenizer_files(folder: Path, settings: dict[str, Any]) -> dict[str, Content]:
    tokenizer: Content = folder / "tokenizer.json"
    chat_template = CHAT_TEMPLATE  # the authors' code has it built in
    if (folder / "tokenizer.model").is_file():
        tokenizer = build_tokenizer(folder / "tokenizer.model", settings).to_str(pretty=True)
    elif (folder / "tokenizer.json").is_file():
        chat_template = settings.get("chat_template", CHAT_TEMPLATE)
    else:
        raise InputError(f"{folder} has no tokenizer; expected tokenizer.model or tokenizer.json")
    ours = {
        **special_tokens(settings),
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "chat_template": chat_template,
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": {**settings, **ours}}


def build_tokenizer(model_file: Path, settings: dict[str, Any]) -> "Tokenizer":
    """Return a tokenizer that agrees with SentencePiece on every text.

    `settings` is the checkpoint's `tokenizer_config.json`, of which `legacy` (a space is put before every stretch of
    text, not only before the first), `add_bos_token` and `added_tokens_decoder` matter. Raises InputError if the file
    is not a byte-fallback BPE model.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    pieces = _read_pieces(model_file)
    vocabulary = {piece.piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            _merges({p.piece: p.score for p in pieces}, vocabulary),
            unk_token=next(p.piece for p in pieces if p.type == p.UNKNOWN),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if settings.get("legacy", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    leading_space = decoders.Strip(content=" ", left=1)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), leading_space]
    tokenizer.decoder = decoders.Sequence(steps)
    special = [p.piece for p in pieces if p.type in (p.UNKNOWN, p.CONTROL)]
    tokenizer.add_special_tokens([AddedToken(s, normalized=False) for s in special])
    for _, token in sorted(settings.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
        added = AddedToken(token["content"], normalized=False, special=token.get("special", True))
        tokenizer.add_tokens([added])
    if settings.get("add_bos_token", True):
        bos = token_text(settings.get("bos_token", "<s>"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
        )
    return tokenizer


def special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts of those special tokens that a tokenizer_config.json names."""
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    return {name: token_text(settings[name]) for name in names if settings.get(name)}


def token_text(token: str | dict[str, str]) -> str:
    """Return a special token's text, which tokenizer configs write bare or as an object with its content."""
    return token["content"] if isinstance(token, dict) else token


def _read_pieces(model_file: Path) -> list[Any]:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at import
    try:
        proto.ParseFromString(read_file(model_file, "download it again", MAX_TOKENIZER))
    except DecodeError as error:
        raise InputError(f"{model_file} is not a SentencePiece model ({error}); download it again") from error
    spec = proto.trainer_spec
    if spec.model_type != spec.BPE or not spec.byte_fallback or proto.normalizer_spec.name != "identity":
        raise InputError(
            f"{model_file} is not a byte-fallback BPE model without normalization, as Llama's is; "
            "put a tokenizer.json in its place, which is then used unchanged"
        )
    return list(proto.pieces)


def _merges(scores: dict[str, float], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Return every way to join two pieces into another: best-scored results first, then by the parts' numbers."""
    ranked = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = vocabulary.get(piece[:cut]), vocabulary.get(piece[cut:])
            if left is not None and right is not None:
                ranked.append((-score, vocabulary[piece], left, right, (piece[:cut], piece[cut:])))
    return [pair for *_, pair in sorted(ranked)]
