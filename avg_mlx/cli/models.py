"""`avg-mlx models` lists the checkpoints on this machine, and says how to run or convert each."""

import argparse
import json
import shlex
import sys
from typing import TYPE_CHECKING, Any

from ..errors import printable
from ..markdown import table
from .parser import Parser, run

if TYPE_CHECKING:
    from ..weights.library import Checkpoint, Place

HEADER = ("model", "family", "text model", "weights", "router", "size")
ROUTER = {True: "yes", False: "no", None: "?"}


def main(arguments: list[str] | None = None, prog: str = "avg-mlx models") -> int:
    """Run the verb and return its exit status."""
    return run(build_parser(prog), models, arguments)


def build_parser(prog: str) -> Parser:
    """The options of the verb."""
    parser = Parser(prog=prog, description="List the checkpoints in the Hub's cache and in folders here.")
    help = "where to look, and in its direct subfolders (default: the current folder)"
    parser.add_argument("folders", nargs="*", default=["."], metavar="FOLDER", help=help)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def models(args: argparse.Namespace) -> None:
    """List what can be converted, and then what can be run; what is wrong with others goes to standard error."""
    from ..weights.library import find_checkpoints

    checkpoints, problems = find_checkpoints(args.folders)
    if args.json:
        print(json.dumps({"models": [described(each) for each in checkpoints], "problems": problems}, indent=2))
        return
    for title, converted in (("To convert:", False), ("To run:", True)):
        if chosen := [each for each in checkpoints if each.converted == converted]:
            commands = (f"    {command(each)}" for each in chosen)
            print(title, "", table(HEADER, map(row, chosen), left=5), "", *commands, "", sep="\n")
    for problem in problems:
        print(problem, file=sys.stderr)


def row(checkpoint: "Checkpoint") -> tuple[str, ...]:
    """What the table says of a checkpoint."""
    return (
        printable(checkpoint.place.title),
        checkpoint.family,
        printable(checkpoint.text_model, 20),
        f"{' and '.join(map(str, checkpoint.bits))} bits" if checkpoint.bits else checkpoint.dtype or "?",
        ROUTER[checkpoint.has_router],
        size(checkpoint.bytes),
    )


def described(checkpoint: "Checkpoint") -> dict[str, Any]:
    """The same for programs."""
    return {
        "model": checkpoint.place.name,
        "revision": checkpoint.place.revision,
        "folder": str(checkpoint.place.folder.absolute()),
        "family": checkpoint.family,
        "converted": checkpoint.converted,
        "text_model": checkpoint.text_model,
        "bits": max(checkpoint.bits, default=None),
        "dtype": checkpoint.dtype,
        "router": checkpoint.has_router,
        "bytes": checkpoint.bytes,
        "command": command(checkpoint),
    }


def command(checkpoint: "Checkpoint") -> str:
    """The command that runs a converted checkpoint, or converts another one to 4 bits."""
    place = checkpoint.place
    revision = ["--revision", place.revision] if place.revision else []
    if checkpoint.converted:
        question = ["--image", "photo.jpg", "--prompt", "What is this?"]
        words = ["generate", "--model", place.name, *revision, *question]
    else:
        words = ["convert", "--hf-path", place.name, *revision, "-q", "--mlx-path", destination(place)]
    return shlex.join(["avg-mlx", *words])


def destination(place: "Place") -> str:
    """What to call a folder that is converted to 4 bits."""
    name = place.title.rpartition("/")[2].replace("@", "-") if place.cached else place.folder.resolve().name
    return f"{name.lstrip('-')}-4bit"  # what begins with a dash would be taken for an option


def size(count: int) -> str:
    """A number of bytes in decimal units, as macOS shows them."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
