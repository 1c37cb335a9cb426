"""What verbs that answer questions share: their options, and what becomes of them."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..weights.demo import demo_model
from . import Parser, number, text

if TYPE_CHECKING:
    import mlx.core as mx

CONVERTED = Path("mlx_model")
RELEASED = "zhibinlan/AVG-LLaVA"


def add_model_options(parser: Parser) -> None:
    add = parser.add_argument
    add("--model", help="converted folder or Hub repository (default: mlx_model, or else the demo model)")
    add("--revision", help="branch, tag or commit of the Hub repository")
    add("--adapter-path", help="adapters to put on top: a folder that training wrote")


def add_looking_options(parser: Parser) -> None:
    count = number(int, 1, 2**31 - 1)
    add = parser.add_argument
    add("--system-prompt", type=text, help="instead of the one the model was trained with")
    add("--granularity", type=granularity, default="auto", help="visual tokens per crop, or auto: the router picks")
    add("--max-visual-tokens", type=count, metavar="N", help="let the router pick within N visual tokens an image")
    add("--max-pixels", type=count, default=64_000_000, metavar="N", help="refuse larger images (default: 64 million)")


def add_decoding_options(parser: Parser) -> None:
    count, fraction = number(int, 1, 2**31 - 1), number(float, 0, 1)
    group = parser.add_argument_group("decoding", "as in mlx-lm")
    add = group.add_argument
    add("--max-tokens", "-m", type=count, default=256, metavar="N", help="new tokens at most (default: %(default)s)")
    add("--temp", "--temperature", type=number(float, 0), default=0.0, help="0 is greedy (default: %(default)s)")
    add("--top-p", type=number(float, 0, 1, exclusive=True), default=1.0)
    add("--top-k", type=number(int, 0), default=0)
    add("--min-p", type=fraction, default=0.0)
    add("--repetition-penalty", type=number(float, 0, exclusive=True), help="above 1 discourages repetition")
    add("--repetition-context-size", type=count, default=20, metavar="N", help="tokens it looks back (default: 20)")
    add("--seed", type=number(int, 0, 2**64 - 1), help="of the sampling")
    add("--extra-eos-token", type=text, nargs="+", default=[], help="more tokens that end the answer")
    add("--max-kv-size", type=number(int, 5), metavar="N", help="keep only the prompt's first and the last positions")
    add("--kv-bits", type=int, choices=(2, 3, 4, 5, 6, 8), help="quantize the KV cache")
    add("--kv-group-size", type=int, choices=(32, 64, 128), default=64)
    add("--quantized-kv-start", type=number(int, 0), default=5000, metavar="N", help="position it begins at")
    add("--prefill-step-size", type=count, default=2048, metavar="N", help="prompt positions processed at a time")


def granularity(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is neither auto nor a number of visual tokens per crop") from None


def open_model(args: argparse.Namespace, group: "mx.distributed.Group | None" = None):
    """(model, tokenizer), once the options are known to fit them; a group shares the language model."""
    import mlx.core as mx

    from .. import load

    model, tokenizer = load(
        args.model or _default_model(args.quiet), revision=args.revision, adapter_path=args.adapter_path, group=group
    )
    vocab_size = model.config.vocab_size
    if args.top_k >= vocab_size:
        raise InputError(f"--top-k is {args.top_k}, but this model has {vocab_size} tokens; give less, or 0 for all")
    for token in args.extra_eos_token:
        _add_eos_token(tokenizer, vocab_size, token)
    if args.seed is not None:
        mx.random.seed(args.seed)
    return model, tokenizer


def _default_model(quiet: bool) -> Path:
    """What `convert` writes by default, or the demo model, which is told."""
    if CONVERTED.exists():
        return CONVERTED
    if not quiet:
        print(
            "No --model given: the small demo model answers; it knows shapes, colours and short texts. "
            f"For the 7B: avg-mlx convert --hf-path {RELEASED} -q",
            file=sys.stderr,
        )
    return demo_model()


def _add_eos_token(tokenizer, vocab_size: int, token: str) -> None:
    if token not in tokenizer.get_vocab() and not (token.isdecimal() and int(token) < vocab_size):
        raise InputError(f"{token!r} is not a token of this model; --extra-eos-token takes tokens or their numbers")
    tokenizer.add_eos_token(token)


def decoding_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `stream_generate` takes of the decoding options."""
    from mlx_lm.sample_utils import make_logits_processors, make_sampler

    return {
        "max_tokens": args.max_tokens,
        "max_kv_size": args.max_kv_size,
        "sampler": make_sampler(args.temp, args.top_p, args.min_p, top_k=args.top_k),
        "logits_processors": make_logits_processors(
            repetition_penalty=args.repetition_penalty, repetition_context_size=args.repetition_context_size
        ),
        "kv_bits": args.kv_bits,
        "kv_group_size": args.kv_group_size,
        "quantized_kv_start": args.quantized_kv_start,
        "prefill_step_size": args.prefill_step_size,
    }
