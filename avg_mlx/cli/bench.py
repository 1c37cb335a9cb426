"""`avg-mlx bench`: where an answer's time and memory go at each granularity."""

import argparse
import json
import re
from pathlib import Path

from ..errors import InputError
from ..weights.quantization import AFFINE_BITS, DTYPES, Quantization
from .parser import Parser, number, run, text

PRESETS = ("tiny", "300m", "1b", "7b")


def main(arguments: list[str] | None = None, prog: str = "avg-mlx bench") -> int:
    """Run the command and return its exit status."""
    return run(build_parser(prog), bench, arguments)


def build_parser(prog: str) -> Parser:
    """The command's options."""
    parser = Parser(prog=prog, description="Measure and count what an answer takes at each granularity.")
    count = number(int, 1, 2**31 - 1)
    add = parser.add_argument
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="converted folder or Hub repository")
    model.add_argument("--random-weights", choices=PRESETS, help="random weights in shapes of the released family")
    add("--dtype", choices=DTYPES, help="type of random weights (default: float16)")
    add("-q", "--quantize", action="store_true", help="quantize the language model of random weights")
    add("--q-bits", type=int, choices=AFFINE_BITS, help="bits per weight with -q (default: 4)")
    image = parser.add_mutually_exclusive_group()
    image.add_argument("--image", help="path or http(s) URL")
    image.add_argument(
        "--image-size", type=size, default=(800, 600), metavar="WxH", help="draw an image (default: 800x600)"
    )
    question = parser.add_mutually_exclusive_group()
    question.add_argument("--prompt", "-p", type=text, help="the question")
    question.add_argument("--text-tokens", type=count, metavar="N", help="make a prompt of N text tokens (default: 60)")
    add("--granularities", type=int, nargs="+", metavar="G", help="visual tokens per crop (default: all of the model)")
    add("--repeats", type=count, default=3, metavar="N", help="measured rounds (default: %(default)s)")
    add("--warmup", type=number(int, 0), default=1, metavar="N", help="rounds before them (default: %(default)s)")
    add("--decode-tokens", type=count, default=32, metavar="N", help="after the first token (default: %(default)s)")
    add("--json", action="store_true", help="print one JSON object instead of Markdown")
    add("--output", type=Path, help="folder for bench.md, bench.json and (with matplotlib) bench.png")
    return parser


def size(given: str) -> tuple[int, int]:
    """An argparse type: (width, height)."""
    match = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", given)
    if not match:
        raise argparse.ArgumentTypeError(f"{given} is not an image size; expected WIDTHxHEIGHT, such as 800x600")
    return int(match[1]), int(match[2])


def bench(args: argparse.Namespace) -> None:
    """Measure with a progress bar; print the report, and write it if that is wanted."""
    if args.model and (args.dtype or args.quantize):
        raise InputError("--dtype and -q are for random weights; a model folder is measured as it is")
    if args.q_bits and not args.quantize:
        raise InputError("--q-bits says how to quantize; add -q to quantize")
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)  # a path that cannot be used is refused before measuring
    from ..bench.measure import Options, describe, measure, prompt_of, synthetic_image
    from ..bench.presets import random_model, word_tokenizer
    from ..bench.report import make_report, markdown, plot
    from ..files import write_json, write_text
    from ..weights.checkpoint import load
    from .progress import Bar

    if args.model:
        model, tokenizer = load(args.model)
    else:
        quantization = Quantization(bits=args.q_bits) if args.quantize else None
        model = random_model(args.random_weights, args.dtype or "float16", quantization)
        tokenizer = word_tokenizer(model.config.vocab_size)
    width, height = args.image_size
    options = Options(
        prompt=args.prompt or prompt_of(tokenizer, args.text_tokens),
        image=args.image or synthetic_image(width, height),
        granularities=tuple(args.granularities or model.config.granularities),
        repeats=args.repeats,
        warmup=args.warmup,
        decode_tokens=args.decode_tokens,
    )
    with Bar("Bench", "answer") as bar:
        rows = measure(model, tokenizer, options, bar.show)
    about = {
        "model": args.model or f"{args.random_weights}, random weights",
        "image": args.image or f"a made-up image of {width}×{height}",
        **describe(model, tokenizer, options),
    }
    report = make_report(about, rows)
    print(json.dumps(report, ensure_ascii=False) if args.json else markdown(report))
    if args.output:
        write_text(args.output / "bench.md", markdown(report) + "\n")
        write_json(args.output / "bench.json", report)
        plot(report, args.output / "bench.png")
