"""`avg-mlx fuse` puts adapters and a trained router into a converted model."""

import argparse

from .parser import Parser, run


def main(arguments: list[str] | None = None, prog: str = "avg-mlx fuse") -> int:
    return run(build_parser(prog), fuse, arguments)


def build_parser(prog: str) -> Parser:
    parser = Parser(prog=prog, description="Fuse adapters and a trained router into a converted model.")
    add = parser.add_argument
    add("--model", default="mlx_model", help="converted folder or Hub repository (default: %(default)s)")
    add("--adapter-path", default="adapters", help="folder that training wrote (default: %(default)s)")
    add("--save-path", default="fused_model", help="folder to write, which must not exist yet (default: %(default)s)")
    add("--dequantize", action="store_true", help="dequantize the model, so that all that was learned is kept")
    return parser


def fuse(args: argparse.Namespace) -> None:
    """Fuse with a progress bar, and print a table."""
    from ..weights.fusing import fuse
    from .parts import parts_table
    from .progress import Bar

    with Bar("Fusing") as bar:
        parts = fuse(args.model, args.adapter_path, args.save_path, dequantize=args.dequantize, progress=bar.show)
    print(parts_table(parts))
    print(f"Wrote {args.save_path}")
