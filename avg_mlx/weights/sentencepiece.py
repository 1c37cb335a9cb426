"""A SentencePiece `tokenizer.model` as a Hugging Face `tokenizer.json`.

The reference tokenizes with SentencePiece itself. Ready-made converters rank merges by piece number, but
Llama's whitespace pieces have low numbers and the lowest score of all, so runs of spaces come out wrong.
Here merges are ranked by score, as SentencePiece ranks them.
"""

import shutil
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import read_json, write_json
from ..inputs.prompt import CHAT_TEMPLATE

SPACE = "▁"


def write_tokenizer(source: Path, destination: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, chat template included, for a PyTorch checkpoint.

    A tokenizer.model wins over a tokenizer.json, since the reference reads it.
    """
    try:
        _write_tokenizer(source, destination)
    except (AttributeError, KeyError, TypeError, ValueError, StopIteration) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"the tokenizer of {source} is damaged ({type(error).__name__}: {error}); get its files again"
        ) from error


def _write_tokenizer(source: Path, destination: Path) -> None:
    settings_file = source / "tokenizer_config.json"
    settings = read_json(settings_file) if settings_file.is_file() else {}
    chat_template = CHAT_TEMPLATE  # the authors' code has it in it
    if (source / "tokenizer.model").is_file():
        build_tokenizer(source / "tokenizer.model", settings).save(str(destination / "tokenizer.json"))
    elif (source / "tokenizer.json").is_file():
        shutil.copyfile(source / "tokenizer.json", destination / "tokenizer.json")
        chat_template = settings.get("chat_template", CHAT_TEMPLATE)
    else:
        raise InputError(f"{source} has no tokenizer; expected tokenizer.model or tokenizer.json")
    special = ("bos_token", "eos_token", "unk_token", "pad_token")
    ours = {
        **{name: token_text(settings[name]) for name in special if settings.get(name)},
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "chat_template": chat_template,
    }
    write_json(destination / "tokenizer_config.json", {**settings, **ours})


def build_tokenizer(model_file: Path, settings: dict[str, Any]):
    """The `tokenizers.Tokenizer` that agrees with SentencePiece on every text.

    `settings` is the checkpoint's `tokenizer_config.json`: `legacy` (a space is put before every stretch of
    text, not only before the first), `add_bos_token` and `added_tokens_decoder` are heeded. Raises InputError
    for a file that is not a byte-fallback BPE model.
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
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
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


def token_text(token: str | dict) -> str:
    """A special token's text; tokenizer configs write it bare or as an object with its content."""
    return token["content"] if isinstance(token, dict) else token


def _read_pieces(model_file: Path):
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made when imported
    try:
        proto.ParseFromString(model_file.read_bytes())
    except DecodeError as error:
        raise InputError(f"{model_file} is not a SentencePiece model ({error}); copy it again") from error
    spec = proto.trainer_spec
    if spec.model_type != spec.BPE or not spec.byte_fallback or proto.normalizer_spec.name != "identity":
        raise InputError(
            f"{model_file} is not a byte-fallback BPE model without normalization, as Llama's is; "
            "put a tokenizer.json beside it, which is then used as it stands"
        )
    return proto.pieces


def _merges(scores: dict[str, float], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others: best-scored result first, then by the parts' numbers."""
    ranked = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = vocabulary.get(piece[:cut]), vocabulary.get(piece[cut:])
            if left is not None and right is not None:
                ranked.append((-score, vocabulary[piece], left, right, (piece[:cut], piece[cut:])))
    return [pair for *_, pair in sorted(ranked)]
