"""`avg-mlx convert`: a PyTorch AVG-LLaVA checkpoint → an MLX folder."""

import argparse
from typing import TYPE_CHECKING

from ..errors import InputError
from . import Parser, run

if TYPE_CHECKING:
    from ..weights.conversion import Part

RECIPES = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")


def main(arguments: list[str] | None = None, prog: str = "convert.py") -> int:
    return run(build_parser(prog), convert, arguments)


def build_parser(prog: str) -> Parser:
    parser = Parser(prog=prog, description="Convert a PyTorch AVG-LLaVA checkpoint to an MLX folder.")
    add = parser.add_argument
    add("--hf-path", "--model", required=True, help="checkpoint folder or Hub repository; also a converted folder")
    add("--revision", help="branch, tag or commit of the Hub repository")
    add("--mlx-path", default="mlx_model", help="folder to write; it must not exist (default: %(default)s)")
    add("--dtype", choices=("float16", "bfloat16", "float32"), help="of what is not quantized (default: as stored)")
    add("-d", "--dequantize", action="store_true", help="undo the quantization of a converted folder")
    add("--upload-repo", metavar="OWNER/NAME", help="also upload the folder to the Hugging Face Hub")
    group = parser.add_argument_group("quantization", "of the language model, unless asked for elsewhere")
    add = group.add_argument
    add("-q", "--quantize", action="store_true", help="quantize the language model")
    add("--q-bits", type=int, metavar="BITS", help="bits per weight (default: 4)")
    add("--q-group-size", type=int, metavar="SIZE", help="weights that share a scale (default: 64)")
    add("--q-mode", choices=("affine", "mxfp4", "nvfp4", "mxfp8"), help="default: affine")
    add("--quant-predicate", choices=RECIPES, help="mlx-lm's recipes of mixed bits")
    add("--q-vision", type=int, metavar="BITS", help="quantize the vision tower and the projector too")
    add("--q-router", type=int, metavar="BITS", help="quantize the router too")
    return parser


def convert(args: argparse.Namespace) -> None:
    """Check the options, convert with a progress bar, print a table."""
    details = ("q_bits", "q_group_size", "q_mode", "quant_predicate", "q_vision", "q_router")
    given = [f"--{name.replace('_', '-')}" for name in details if getattr(args, name) is not None]
    if given and not args.quantize:
        raise InputError(f"{given[0]} says how to quantize; add -q to quantize")
    from ..weights import conversion
    from ..weights.quantization import Quantization
    from .progress import Bar

    quantization = None
    if args.quantize:
        quantization = Quantization(
            args.q_bits, args.q_group_size, args.q_mode or "affine", args.quant_predicate, args.q_vision, args.q_router
        )
    with Bar("Converting") as bar:
        parts = conversion.convert(
            args.hf_path,
            args.mlx_path,
            revision=args.revision,
            quantization=quantization,
            dequantize=args.dequantize,
            dtype=args.dtype,
            progress=bar.show,
        )
    print(table(parts))
    print(f"Wrote {args.mlx_path}")
    if args.upload_repo:
        print(f"Uploaded to {conversion.upload(args.mlx_path, args.upload_repo)}")


def table(parts: "list[Part]") -> str:
    """Part, parameters, bits per weight, bytes: a row each, and the whole."""
    from ..weights.conversion import Part

    rows = [*parts, Part("total", sum(p.parameters for p in parts), sum(p.bytes for p in parts))]
    lines = [f"{'part':14} {'parameters':>14} {'bits/weight':>11} {'bytes':>14}"]
    lines += [f"{p.name:14} {p.parameters:14,} {p.bits_per_weight:11.2f} {p.bytes:14,}" for p in rows]
    return "\n".join(lines)
