"""`avg-mlx demo`: the model that comes with the package looks at one picture, as closely as each question needs."""

import argparse
import shlex

from ..weights.demo import DEMO, demo_model
from .parser import Parser, run

QUESTIONS = ("What shape is this?", "What is written?", "What is in this image?")


def main(arguments: list[str] | None = None, prog: str = "avg-mlx demo") -> int:
    return run(build_parser(prog), demo, arguments)


def build_parser(prog: str) -> Parser:
    parser = Parser(prog=prog, description="Ask the small model that comes with the package about a picture.")
    help = "another picture: it knows shapes, colours and short texts (default: the package's)"
    parser.add_argument("--image", default=demo_model() / "sign.png", help=help)
    return parser


def demo(args: argparse.Namespace) -> None:
    """Give each question to `avg-mlx generate`, and show the command."""
    from . import generate

    for question in QUESTIONS:
        options = ["--model", DEMO, "--image", str(args.image), "--prompt", question]
        print("$", shlex.join(["avg-mlx", "generate", *options]))
        generate.generate(generate.build_parser("avg-mlx generate").parse_args(options))
        print(flush=True)
