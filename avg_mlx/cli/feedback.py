"""`avg-mlx feedback`: the language model's loss for every sample and granularity."""

import argparse

from ..training.options import FeedbackOptions
from .options import OptionsParser
from .parser import run


def main(arguments: list[str] | None = None, prog: str = "avg-mlx feedback") -> int:
    return run(build_parser(prog), feedback, arguments)


def build_parser(prog: str) -> OptionsParser:
    description = (
        "Measure how well each granularity does on each sample. The same command resumes what was interrupted."
    )
    return OptionsParser(prog, description, FeedbackOptions)


def feedback(args: argparse.Namespace) -> None:
    """Collect with a progress bar, then print how often each granularity wins."""
    import mlx.core as mx

    from ..training.feedback import summarize
    from ..training.stages import make_feedback
    from .progress import Bar

    first = mx.distributed.init().rank() == 0
    with Bar("Feedback", "sample", hidden=not first) as bar:
        rows = make_feedback(args.options, bar.show)
    if first:
        print(summarize(rows))
