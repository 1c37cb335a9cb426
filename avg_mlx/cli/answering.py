"""What generate, chat and explain share: their options, and how inputs are read and a model is opened with them."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..blas import BLAS, HINT, MISSING
from ..errors import InputError
from .parser import Parser, number, text

if TYPE_CHECKING:
    import mlx.core as mx

    from ..inference.sampling import Sampling
    from ..inputs.image_io import ImageSource
    from ..inputs.tokenizer import Tokenizer
    from ..model.avg_llava import Model

CONVERTED = Path("mlx_model")
LARGE = 100_000_000  # parameters of a model whose products take long
RELEASED = "zhibinlan/AVG-LLaVA"


def add_model_options(parser: Parser) -> None:
    """Options that say which model answers."""
    add = parser.add_argument
    add("--model", help="converted folder, Hub repository, or demo (default: mlx_model if it exists, or else demo)")
    add("--revision", help="branch, tag or commit of the Hub repository")
    add("--adapter-path", help="adapters to load on top: a folder that training wrote")


def add_looking_options(parser: Parser) -> None:
    """Options that say how closely images are looked at."""
    count = number(int, 1, 2**31 - 1)
    add = parser.add_argument
    add("--system-prompt", type=text, help="replaces the system prompt that the model was trained with")
    auto = "visual tokens per crop (default: auto, the router's choice, or the finest without one)"
    add("--granularity", type=granularity, default="auto", help=auto)
    add("--max-visual-tokens", type=count, metavar="N", help="choose within N visual tokens an image")
    price = "price of the finest visual tokens in log-probability: the router looks less closely (default: 0)"
    add("--token-cost", type=number(float, 0), default=0.0, metavar="COST", help=price)
    add("--max-pixels", type=count, default=64_000_000, metavar="N", help="refuse larger images (default: %(default)s)")


def add_decoding_options(parser: Parser) -> None:
    """Options of the language model, named as in mlx-lm."""
    group = add_sampling_options(parser)
    add = group.add_argument
    add(
        "--xtc-probability",
        type=number(float, 0, 1),
        default=0.0,
        metavar="P",
        help="how often XTC acts (default: never)",
    )
    add("--xtc-threshold", type=number(float, 0, 0.5), default=0.1, metavar="P", help="XTC's threshold (default: 0.1)")
    add("--max-kv-size", type=number(int, 5), metavar="N", help="rotate the KV cache: keep the first 4 and last N - 4")
    add("--kv-bits", type=int, choices=(2, 3, 4, 5, 6, 8), help="quantize the KV cache")
    add("--kv-group-size", type=int, choices=(32, 64, 128), help="default: the largest of 64 and 32 that fits")
    add("--quantized-kv-start", type=number(int, 0), default=5000, metavar="N", help="first position (default: 5000)")
    prefill = "prompt positions at a time (default: 2048)"
    add("--prefill-step-size", type=number(int, 1, 2**31 - 1), default=2048, metavar="N", help=prefill)


def add_sampling_options(parser: Parser) -> "argparse._ArgumentGroup":
    """Those of them that answers have which run in a batch of others."""
    count, fraction = number(int, 1, 2**31 - 1), number(float, 0, 1)
    group = parser.add_argument_group("decoding", "These options are named as in mlx-lm.")
    add = group.add_argument
    add(
        "--max-tokens",
        "-m",
        type=token_limit,
        default=256,
        metavar="N",
        help="new tokens at most; -1: as many as the context has room for (default: %(default)s)",
    )
    add("--temp", "--temperature", type=number(float, 0), default=0.0, help="0 is greedy (default: %(default)s)")
    add("--top-p", type=number(float, 0, 1, exclusive=True), default=1.0, help="nucleus sampling (default: off)")
    add("--top-k", type=number(int, 0), default=0, help="sample from the K likeliest tokens (default: all)")
    add("--min-p", type=fraction, default=0.0, help="drop tokens below this share of the likeliest (default: off)")
    add("--min-tokens-to-keep", type=count, default=1, metavar="N", help="--min-p keeps at least N (default: 1)")
    add("--repetition-penalty", type=number(float, 0, exclusive=True), help="above 1 discourages repetition")
    add("--repetition-context-size", type=count, default=20, metavar="N", help="tokens it looks back (default: 20)")
    add("--seed", type=number(int, 0, 2**64 - 1), help="seed of the sampling")
    add("--extra-eos-token", type=text, nargs="+", default=[], help="further tokens that end the answer")
    return group


def granularity(text: str) -> int | str:
    """An argparse type: auto, or a number of visual tokens per crop."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is neither auto nor a number of visual tokens per crop") from None


def token_limit(text: str) -> float:
    """An argparse type: a number of tokens, or -1."""
    return -1 if text == "-1" else number(int, 1, 2**31 - 1)(text)


def model_name(args: argparse.Namespace) -> str:
    """The folder or repository that answers. It is named on standard error unless the user named it."""
    from ..weights.demo import DEMO

    if args.model is not None:
        return str(args.model)
    if CONVERTED.exists():
        print(f"No --model given: the model in {CONVERTED} answers.", file=sys.stderr)
        return str(CONVERTED)
    print(
        "No --model given: the small demo model answers; it knows shapes, colours and short texts. "
        f"For the 7B: avg-mlx convert --hf-path {RELEASED} -q",
        file=sys.stderr,
    )
    return DEMO


def open_model(
    args: argparse.Namespace, name: str, group: "mx.distributed.Group | None" = None
) -> "tuple[Model, Tokenizer]":
    """Load the model, and check the options that depend on it; a group of processes shares the language model."""
    import mlx.core as mx

    from ..model.inventory import parts_of
    from ..weights.checkpoint import load

    model, tokenizer = load(name, revision=args.revision, adapter_path=args.adapter_path, group=group)
    vocab_size = model.config.vocab_size
    if args.top_k >= vocab_size:
        raise InputError(f"top_k is {args.top_k}, but this model has {vocab_size} tokens; give less, or 0 for all")
    if args.min_tokens_to_keep > vocab_size:
        raise InputError(f"min_tokens_to_keep is {args.min_tokens_to_keep}, but this model has {vocab_size} tokens")
    for token in args.extra_eos_token:
        if token not in tokenizer.get_vocab() and not (token.isdecimal() and int(token) < vocab_size):
            raise InputError(f"{token!r} is not a token of this model; extra_eos_token takes tokens or their numbers")
        tokenizer.add_eos_token(token)
    if BLAS == MISSING and mx.default_device() == mx.cpu and sum(part.parameters for part in parts_of(model)) > LARGE:
        print(HINT, file=sys.stderr)
    return model, tokenizer


def read_inputs(args: argparse.Namespace) -> "tuple[str, list[ImageSource]]":
    """Read the prompt and the images, so that what is wrong with them is said before the model is loaded."""
    from ..inputs.image_io import read_image
    from ..inputs.prompt import build_messages

    prompt, images = _read_stdin(args.prompt, args.image)
    build_messages(prompt, len(images), args.system_prompt)
    return prompt, [read_image(image, args.max_pixels) for image in images]


def _read_stdin(prompt: str, images: list[str]) -> tuple[str, list[str | bytes]]:
    from ..inputs.fetching import MAX_BYTES

    if [prompt, *images].count("-") > 1:
        raise InputError("standard input can be read once; give - for the prompt or for one image")
    if prompt == "-":
        try:
            prompt = sys.stdin.buffer.read().decode().removesuffix("\n")  # which echo adds
        except UnicodeDecodeError:
            raise InputError("the prompt on standard input is not UTF-8 text; save it as UTF-8") from None
    return prompt, [sys.stdin.buffer.read(MAX_BYTES + 1) if image == "-" else image for image in images]


def sampling_of(args: argparse.Namespace) -> "Sampling":
    """The sampling options."""
    from ..inference.options import pick
    from ..inference.sampling import Sampling

    return pick(Sampling, vars(args))


def decoding_of(args: argparse.Namespace, tokenizer: "Tokenizer") -> Any:
    """What `stream_generate` takes of the decoding options."""
    sampling = sampling_of(args)
    names = ("max_tokens", "max_kv_size", "kv_bits", "kv_group_size", "quantized_kv_start", "prefill_step_size")
    return {
        "sampler": sampling.sampler(tokenizer),
        "logits_processors": sampling.logits_processors(),
        **{name: getattr(args, name) for name in names},
    }
