"""`avg-mlx evaluate`: accuracy, visual tokens and time of each way to choose a granularity."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from .parser import Parser, number, run


def main(arguments: list[str] | None = None, prog: str = "avg-mlx evaluate") -> int:
    """Run the command and return its exit status."""
    return run(build_parser(prog), evaluate, arguments)


def build_parser(prog: str) -> Parser:
    """The command's options."""
    parser = Parser(
        prog=prog,
        description="Ask questions with known answers at every granularity, and compare the ways to choose one. "
        "The same command resumes what was interrupted.",
    )
    add = parser.add_argument
    add("--model", required=True, help="converted folder or Hub repository")
    add("--adapter-path", type=Path, help="a folder of adapters that training wrote")
    add("--data", required=True, type=Path, help="JSON list or JSON Lines of questions (docs/evaluation.md)")
    add("--image-folder", type=Path, help="folder that image names are relative to (default: the data's)")
    add("--strict-paths", action="store_true", help="refuse images outside of that folder")
    add("--output", required=True, type=Path, help="folder for answers, table, summary and pictures")
    add("--modes", nargs="+", metavar="MODE", help="adaptive, random, oracle, or a granularity (default: all)")
    price, costs = (
        number(float, 0),
        "show what the router's choice is worth at these token costs, from the same answers",
    )
    add("--token-costs", type=price, nargs="+", default=[], metavar="COST", help=costs)
    add("--target-accuracy", type=number(float, 0, 1), metavar="SHARE", help="name the token cost that keeps it")
    add("--target-tokens", type=price, metavar="N", help="name the token cost that takes N visual tokens on average")
    add("--limit", type=number(int, 1), metavar="N", help="ask only the first N questions")
    add("--skip-bad", action="store_true", help="list and leave out questions that cannot be used")
    add("--seed", type=number(int, 0), default=0, help="seed of the random mode (default: %(default)s)")
    add(
        "--max-tokens",
        "-m",
        type=number(int, 1),
        default=32,
        metavar="N",
        help="new tokens of an answer at most (default: %(default)s)",
    )
    return parser


def evaluate(args: argparse.Namespace) -> None:
    """Read the questions, load the model, ask with a progress bar, and print the table."""
    import mlx.core as mx

    from ..evaluation.questions import read_questions
    from ..evaluation.run import evaluate
    from ..weights.checkpoint import load
    from .progress import Bar

    first = mx.distributed.init().rank() == 0
    questions, bad = read_questions(
        args.data, args.image_folder, skip_bad=args.skip_bad, limit=args.limit, strict_paths=args.strict_paths
    )
    if first:
        list_problems(bad)
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
            token_costs=args.token_costs,
            target_accuracy=args.target_accuracy,
            target_tokens=args.target_tokens,
            report=bar.show,
        )
    if first:
        list_problems(evaluation.skipped[len(bad) :])
        print(evaluation.table, end="")


def list_problems(problems: Iterable[str]) -> None:
    """Print what is wrong with the questions that are left out."""
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
