"""`avg-mlx explain`: what in the image and in the question asked for a closer look, as a picture, a table or JSON."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..markdown import table
from .answering import add_looking_options, add_model_options, model_name, read_inputs
from .parser import Parser, number, run, text

if TYPE_CHECKING:
    from ..explaining.explanation import Explanation


def main(arguments: list[str] | None = None, prog: str = "avg-mlx explain") -> int:
    """Run the verb and return its exit status."""
    return run(build_parser(prog), explain, arguments)


def build_parser(prog: str) -> Parser:
    """The options of the verb."""
    parser = Parser(prog=prog, description="Show what made the router look at an image as closely as it does.")
    add = parser.add_argument
    add_model_options(parser)
    add("--prompt", "-p", type=text, required=True, help="the question; <image> marks a place; - reads standard input")
    add(
        "--image",
        nargs="+",
        action="extend",
        required=True,
        help="path, http(s) URL, data URI, or - for standard input",
    )
    add_looking_options(parser)
    add("--over", type=number(int, 1), metavar="G", help="compare the choice with G (default: with the next best)")
    add("--output", type=Path, metavar="FILE", help="draw a picture (.png, .pdf or .svg); several images are numbered")
    add("--json", action="store_true", help="print one JSON object instead of tables (docs/explaining.md)")
    return parser


def explain(args: argparse.Namespace) -> None:
    """Read the images, load the model, explain, and show it."""
    from ..explaining.explain import explain
    from ..explaining.picture import draw_explanation
    from ..plotting import check_picture
    from ..weights.checkpoint import load

    if args.output is not None:
        check_picture(args.output)
    prompt, images = read_inputs(args)
    name = model_name(args)
    model, tokenizer = load(name, revision=args.revision, adapter_path=args.adapter_path)
    options = ("granularity", "max_visual_tokens", "token_cost", "system_prompt", "max_pixels")
    explained = explain(model, tokenizer, prompt, images, **{option: getattr(args, option) for option in options})
    for each in explained:
        each.evidence(args.over)  # says what is wrong with --over before anything is shown
    if args.json:
        about = {"model": name, "revision": args.revision, "prompt": prompt}
        print(json.dumps(about | {"images": [each.to_dict() for each in explained]}, ensure_ascii=False))
    else:
        print("\n\n".join(told(each, args.over) for each in explained))
    for picture, each in zip(pictures(args.output, len(explained)), explained, strict=False):
        print(f"Picture: {draw_explanation(each, picture, prompt, args.over)}", file=sys.stderr)


def pictures(output: Path | None, count: int) -> list[Path]:
    """The files of so many pictures, numbered if there are several."""
    if output is None:
        return []
    if count == 1:
        return [output]
    return [output.with_stem(f"{output.stem}-{number}") for number in range(1, count + 1)]


def told(explanation: "Explanation", over: int | None) -> str:
    """What was chosen; votes and probabilities of all granularities; and what speaks for the choice over another."""
    view = explanation.view
    lines = [f"Granularity: {view.granularity}, {view.reason}"]
    lines.append(f"Visual tokens: {view.visual_tokens} of {view.visual_tokens_finest} ({view.saved:.1%} saved)")
    votes, evidence = explanation.votes, explanation.evidence(over)
    if votes is None or view.routing is None:
        return "\n".join([*lines, "The router did not run, so there is nothing to explain."])
    counts = [level.visual_tokens for level in explanation.levels]
    columns = (view.routing.granularities, counts, votes.sums, view.routing.logits, view.routing.probabilities)
    rows = [
        (g, f"{count:,}", f"{vote:.3f}", f"{logit:.3f}", f"{probability:.1%}")
        for g, count, vote, logit, probability in sorted(zip(*columns, strict=True))
    ]
    lines += ["", table(("granularity", "visual tokens", "votes", "logit", "probability"), rows, left=0)]
    if evidence is not None:
        words = ((repr(word.text), value) for word, value in explanation.words(evidence))
        parts = [("the image", evidence.image), *words]
        parts += [("rows without a word", evidence.unfilled), ("bias", evidence.bias)]
        parts.append(("together: the difference of their logits", evidence.total))
        header = ("what", f"speaks for {evidence.choice} over {evidence.over}")
        lines += ["", table(header, [(what, f"{value:+.3f}") for what, value in parts])]
    return "\n".join(lines)
