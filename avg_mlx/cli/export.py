"""`avg-mlx export` writes a converted folder in the layout for PyTorch that it came from."""

import argparse

from .parser import Parser, run


def main(arguments: list[str] | None = None, prog: str = "avg-mlx export") -> int:
    return run(build_parser(prog), export, arguments)


def build_parser(prog: str) -> Parser:
    parser = Parser(prog=prog, description="Write a converted folder in the layout for PyTorch that it came from.")
    add = parser.add_argument
    add("--model", default="mlx_model", help="converted folder or Hub repository (default: %(default)s)")
    add("--save-path", default="exported_model", help="folder to write, which must not exist (default: %(default)s)")
    return parser


def export(args: argparse.Namespace) -> None:
    """Export with a progress bar."""
    from ..weights.exporting import export
    from .progress import Bar

    with Bar("Exporting") as bar:
        export(args.model, args.save_path, progress=bar.show)
    print(f"Wrote {args.save_path}")
