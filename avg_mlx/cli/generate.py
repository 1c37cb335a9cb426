"""`avg-mlx generate`: an image and a question → a streamed answer; a file of them → a file of answers."""

import argparse
import io
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from .answering import (
    add_decoding_options,
    add_looking_options,
    add_model_options,
    decoding_of,
    model_name,
    open_model,
    read_inputs,
)
from .parser import Parser, number, run, text

if TYPE_CHECKING:
    import mlx.core as mx

    from ..inference.answer import Answer
    from ..inference.view import View


def main(arguments: list[str] | None = None, prog: str = "generate.py") -> int:
    """Run the verb and return its exit status."""
    return run(build_parser(prog), generate, arguments)


def build_parser(prog: str) -> Parser:
    """The options of the verb."""
    parser = Parser(prog=prog, description="Ask AVG-LLaVA about an image; it decides how closely to look.")
    add = parser.add_argument
    add_model_options(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", "-p", type=text, help="the question; <image> marks a place; - reads standard input")
    what.add_argument("--batch", type=Path, metavar="FILE", help="a file of questions, or - (docs/chat.md)")
    add("--image", nargs="+", action="extend", default=[], help="path, http(s) URL, data URI, or - for standard input")
    add_looking_options(parser)
    add("--json", action="store_true", help="print one JSON object instead of the streamed text")
    add("--quiet", action="store_true", help="print no summary on standard error")
    add("--output", type=Path, metavar="FILE", help="with --batch: the answers, JSON Lines that resume; - prints them")
    add("--batch-size", type=number(int, 1), default=8, metavar="N", help="questions answered together (default: 8)")
    add("--strict-paths", action="store_true", help="with --batch: no image from outside of the file's folder")
    add_decoding_options(parser)
    return parser


def generate(args: argparse.Namespace) -> None:
    """Give one answer, or those of a whole file."""
    if args.batch is not None:
        from .batch import answer_many

        answer_many(args)
        return
    if args.output is not None:
        raise InputError("--output is for the answers of --batch; send one answer to a file with >")
    if args.strict_paths:
        raise InputError("--strict-paths is for the images that the lines of --batch name; leave it out")
    answer_one(args)


def answer_one(args: argparse.Namespace) -> None:
    """Load the model, stream the answer to standard output, and summarize on standard error."""
    from ..inference.answer import report
    from ..inference.generation import stream_generate
    from ..weights.sharding import Agreed

    group = _join_group(args)
    prompt, images = read_inputs(args)
    start, name = time.perf_counter(), model_name(args)
    model, tokenizer = open_model(args, name, group)
    load_seconds = time.perf_counter() - start
    decoding = decoding_of(args, tokenizer)
    decoding["sampler"] = Agreed(decoding["sampler"], group)
    segments = stream_generate(
        model,
        tokenizer,
        prompt,
        images,
        granularity=args.granularity,
        max_visual_tokens=args.max_visual_tokens,
        token_cost=args.token_cost,
        system_prompt=args.system_prompt,
        max_pixels=args.max_pixels,
        **decoding,
    )
    for segment in segments:
        if not args.json:
            print(segment.text, end="", flush=True)
    answer = segment.answer
    assert answer is not None
    print(json.dumps(report(answer, name, args.revision, load_seconds), ensure_ascii=False) if args.json else "")
    if not args.quiet:
        sys.stdout.flush()
        print(summary(answer), file=sys.stderr)


def _join_group(args: argparse.Namespace) -> "mx.distributed.Group":
    """Join the processes that mlx.launch started. The first one prints; the others print nothing but errors."""
    import mlx.core as mx

    group = mx.distributed.init()
    if group.size() > 1 and "-" in (args.prompt, *args.image):
        raise InputError("mlx.launch does not say where standard input ends; give the text or a path instead of -")
    if group.rank() > 0:
        args.quiet = True
        sys.stdout = io.StringIO()
    return group


def summary(answer: "Answer") -> str:
    """Describe how closely each image was looked at, then add mlx-lm's closing lines and the time to first token."""
    t = answer.timings
    return "\n".join(
        [
            "=" * 10,
            *(_describe(view) for view in answer.views),
            f"Prompt: {answer.prompt_tokens} tokens, {t.prompt_tokens_per_second:.3f} tokens-per-sec",
            f"Generation: {len(answer.token_ids)} tokens, {t.generation_tokens_per_second:.3f} tokens-per-sec",
            f"Peak memory: {answer.peak_memory_gb:.3f} GB",
            f"Time to first token: {t.time_to_first_token:.3f} s = preprocess {t.preprocess:.3f} "
            f"+ vision {t.vision:.3f} + router {t.router:.3f} + prefill {t.prefill:.3f}",
        ]
    )


def _describe(view: "View") -> str:
    rows, columns = view.crop_grid
    lines = [f"Image: {view.crops} crops (the whole and {rows}×{columns})" if rows else "Image: 1 crop (the whole)"]
    lines.append(f"Granularity: {view.granularity}, {view.reason}{_odds(view)}")
    lines.append(f"Visual tokens: {view.visual_tokens} of {view.visual_tokens_finest} ({view.saved:.1%} saved)")
    return "\n".join(lines)


def _odds(view: "View") -> str:
    if view.routing is None:
        return ""
    pairs = zip(view.routing.granularities, view.routing.probabilities, strict=True)
    return f" ({', '.join(f'{g}: {probability:.1%}' for g, probability in pairs)})"
