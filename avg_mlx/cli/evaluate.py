"""`avg-mlx evaluate`: accuracy, visual tokens and time of each way to choose a granularity."""

import argparse
import sys
from pathlib import Path

from . import Parser, number, run


def main(arguments: list[str] | None = None, prog: str = "avg-mlx evaluate") -> int:
    return run(build_parser(prog), evaluate, arguments)


def build_parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        description="Ask questions with known answers at every granularity, and compare; goes on where it was.",
    )
    add = parser.add_argument
    add("--model", required=True, help="converted folder or Hub repository")
    add("--adapter-path", type=Path, help="adapters to put on top: a folder that training wrote")
    add("--data", required=True, type=Path, help="JSON list or JSON Lines of questions (docs/evaluation.md)")
    add("--image-folder", type=Path, help="where image names lead from (default: the data's folder)")
    add("--output", required=True, type=Path, help="folder to write answers, table, summary and picture to")
    add("--modes", nargs="+", metavar="MODE", help="adaptive, random, oracle, or a granularity (default: all)")
    add("--limit", type=number(int, 1), metavar="N", help="only the first N questions")
    add("--skip-bad", action="store_true", help="count, list and leave out questions that cannot be used")
    add("--seed", type=number(int, 0), default=0, help="of the random mode (default: %(default)s)")
    add("--max-tokens", "-m", type=number(int, 1), default=32, metavar="N", help="of an answer (default: %(default)s)")
    return parser


def evaluate(args: argparse.Namespace) -> None:
    """Read the questions, load, ask with a progress bar, then print the table."""
    import mlx.core as mx

    from .. import load
    from ..evaluation.questions import read_questions
    from ..evaluation.run import evaluate
    from .progress import Bar

    first = mx.distributed.init().rank() == 0

    def tell(problems: list[str]) -> None:
        for problem in problems if first else []:
            print(f"left out: {problem}", file=sys.stderr)

    questions, bad = read_questions(args.data, args.image_folder, skip_bad=args.skip_bad, limit=args.limit)
    tell(bad)
    model, tokenizer = load(args.model, adapter_path=args.adapter_path)
    with Bar("Evaluate", "question", hidden=not first) as bar:
        evaluation = evaluate(
            model,
            tokenizer,
            questions,
            args.output,
            modes=args.modes,
            seed=args.seed,
            max_tokens=args.max_tokens,
            skip_bad=args.skip_bad,
            skipped=bad,
            report=bar.show,
        )
    tell(evaluation.skipped[len(bad) :])
    if first:
        print(evaluation.table, end="")
