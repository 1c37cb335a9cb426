"""`avg-mlx feedback`: the language model's loss for every sample and granularity."""

import argparse
from pathlib import Path

from . import Parser, number, run


def main(arguments: list[str] | None = None, prog: str = "avg-mlx feedback") -> int:
    return run(build_parser(prog), feedback, arguments)


def build_parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog, description="Measure how well each granularity does on each sample; goes on where it was."
    )
    add = parser.add_argument
    add("--model", required=True, help="converted folder or Hub repository")
    add("--adapter-path", type=Path, help="adapters of train instruct")
    add("--data", required=True, type=Path, help="JSON list or JSON Lines in LLaVA's format (docs/training.md)")
    add("--image-folder", type=Path, help="where image names lead from (default: the data's folder)")
    add("--output", required=True, type=Path, help="JSON Lines file to write")
    add("--max-seq-length", type=number(int, 1), help="skip samples that take more positions (the model's context)")
    return parser


def feedback(args: argparse.Namespace) -> None:
    """Collect with a progress bar, then print how often each granularity wins."""
    import mlx.core as mx

    from ..training.feedback import summarize
    from ..training.stages import make_feedback
    from .progress import Bar

    first = mx.distributed.init().rank() == 0
    with Bar("Feedback", "sample", hidden=not first) as bar:
        rows = make_feedback(
            args.model, args.data, args.output, args.image_folder, args.adapter_path, args.max_seq_length, bar.show
        )
    if first:
        print(summarize(rows))
