"""`avg-mlx convert` turns a LLaVA or AVG-LLaVA checkpoint for PyTorch into an MLX folder."""

import argparse
import re
from typing import Any

from ..errors import InputError
from ..weights.quantization import DTYPES, MODES, RECIPES, Quantization
from .parser import Parser, run

FLAGS = {
    "bits": "--q-bits",
    "group_size": "--q-group-size",
    "mode": "--q-mode",
    "recipe": "--quant-predicate",
    "vision_bits": "--q-vision",
    "router_bits": "--q-router",
}


def main(arguments: list[str] | None = None, prog: str = "convert.py") -> int:
    return run(build_parser(prog), convert, arguments)


def build_parser(prog: str) -> Parser:
    parser = Parser(prog=prog, description="Convert a LLaVA or AVG-LLaVA checkpoint for PyTorch to an MLX folder.")
    add = parser.add_argument
    add("--hf-path", "--model", required=True, help="checkpoint folder or Hub repository, or a converted folder")
    add("--revision", help="branch, tag or commit of the Hub repository")
    add("--mlx-path", default="mlx_model", help="folder to write, which must not exist yet (default: %(default)s)")
    add("--dtype", choices=DTYPES, help="type of all that is not quantized (default: the checkpoint's)")
    add("-d", "--dequantize", action="store_true", help="dequantize a converted folder")
    prepare = "let a plain model become adaptive: visual tokens per crop (without G: a sixteenth up to all patches)"
    add("--granularities", type=int, nargs="*", metavar="G", help=prepare)
    add("--upload-repo", metavar="OWNER/NAME", help="upload the folder to this repository on the Hugging Face Hub too")
    group = parser.add_argument_group("quantization")
    group.add_argument("-q", "--quantize", action="store_true", help="quantize the language model")

    def option(name: str, help: str, **options: Any) -> None:
        group.add_argument(FLAGS[name], dest=name, help=help, **options)

    bits: dict[str, Any] = {"type": int, "metavar": "BITS"}
    option("bits", "bits per weight (default: 4)", **bits)
    option("group_size", "number of weights that share a scale (default: 64)", type=int, metavar="SIZE")
    option("mode", "number format (default: affine)", choices=MODES)
    option("recipe", "one of mlx-lm's mixtures of bits", choices=RECIPES)
    option("vision_bits", "quantize the vision tower and the projector too", **bits)
    option("router_bits", "quantize the router too", **bits)
    return parser


def convert(args: argparse.Namespace) -> None:
    """Check the options, convert with a progress bar, print a table, and upload the folder if that is wanted."""
    given = {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
    if given and not args.quantize:
        raise InputError(f"{FLAGS[next(iter(given))]} says how to quantize; add -q to quantize")
    try:
        quantization = Quantization(**given) if args.quantize else None
    except InputError as error:  # which names parameters, where the user typed flags
        raise InputError(re.sub(r"(\w+)=", lambda match: f"{FLAGS[match[1]]}=", str(error))) from error
    from ..weights.conversion import convert, upload
    from .parts import parts_table
    from .progress import Bar

    with Bar("Converting") as bar:
        parts = convert(
            args.hf_path,
            args.mlx_path,
            revision=args.revision,
            quantization=quantization,
            dequantize=args.dequantize,
            dtype=args.dtype,
            granularities=args.granularities,
            progress=bar.show,
        )
    print(parts_table(parts))
    print(f"Wrote {args.mlx_path}")
    if args.upload_repo:
        print(f"Uploaded to {upload(args.mlx_path, args.upload_repo)}")
