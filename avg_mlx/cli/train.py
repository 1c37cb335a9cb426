"""`avg-mlx train instruct|router|rglf`: fine-tune the language model, the router, or one after the other."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from ..errors import Interrupted
from ..training.options import InstructOptions, RglfOptions, RouterOptions, TrainOptions
from .options import OptionsParser
from .parser import Parser, run

if TYPE_CHECKING:
    from ..training.stages import Trained
    from .progress import Bar

STAGES = {
    "instruct": "stage 3: the language model learns to answer at every granularity",
    "router": "stage 4, RGLF: the router learns from the language model's losses",
    "rglf": "both stages in one command: instruct, feedback, router",
}
LAST_STEPS = 10  # whose mean loss is told at the end


def main(arguments: list[str] | None = None, prog: str = "avg-mlx train") -> int:
    stage, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if stage in STAGES:
        parser = {"instruct": instruct_parser, "router": router_parser, "rglf": rglf_parser}[stage](f"{prog} {stage}")
        work = {"instruct": train_instruct, "router": train_router, "rglf": train_rglf}[stage]
        return run(parser, work, rest)
    parser = Parser(prog=prog, description="\n".join(f"{name:9} {what}" for name, what in STAGES.items()))
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("stage", choices=STAGES)
    parser.parse_args([stage])
    return 2


def instruct_parser(prog: str) -> Parser:
    return OptionsParser(prog, "Multi-granularity instruction tuning.", InstructOptions)


def router_parser(prog: str) -> Parser:
    return OptionsParser(
        prog, "RGLF: the router learns to rank granularities as the language model does.", RouterOptions
    )


def rglf_parser(prog: str) -> Parser:
    description = (
        "Both stages, one after the other: adapters that answer at every granularity, with a router that chooses. "
        "An option is for both, unless the router has its own of that name (--router-…)."
    )
    return OptionsParser(prog, description, RglfOptions)


def train_instruct(args: argparse.Namespace) -> None:
    from ..training import stages

    with _bars(args.options, "Instruct") as [bar]:
        trained = stages.train_instruct(args.options, bar.step)
    _finish(trained)


def train_router(args: argparse.Namespace) -> None:
    from ..training import stages

    with _bars(args.options, "Feedback", "Router") as [feedback_bar, bar]:
        trained = stages.train_router(args.options, bar.step, feedback_bar.show)
    _finish(trained)


def train_rglf(args: argparse.Namespace) -> None:
    from ..training import stages

    with _bars(args.options, "Instruct", "Feedback", "Router") as [instruct_bar, feedback_bar, router_bar]:
        try:
            both = stages.train_rglf(args.options, instruct_bar.step, feedback_bar.show, router_bar.step)
        except Interrupted:
            raise
        except KeyboardInterrupt as stop:
            raise Interrupted("interrupted before or between the stages; --resume goes on from there") from stop
    for trained in both:
        _finish(trained)


@contextmanager
def _bars(options: TrainOptions, *titles: str) -> Iterator[list["Bar"]]:
    """Make a progress bar for each title, which only the first process shows."""
    import mlx.core as mx

    from .progress import Bar

    hidden, every = mx.distributed.init().rank() > 0, options.steps_per_report
    with ExitStack() as stack:
        yield [stack.enter_context(Bar(title, "step", hidden, every)) for title in titles]


def _finish(trained: "Trained") -> None:
    """Print the feedback, the losses and where the adapters are, in the process that writes."""
    from ..training.feedback import summarize
    from ..training.plot import plot_losses

    if not trained.log:
        return
    if trained.feedback:
        print(summarize(trained.feedback) + "\n")
    first, last = trained.log[0], trained.log[-LAST_STEPS:]
    mean = sum(record["loss"] for record in last) / len(last)
    validated = [record for record in trained.log if "validation_loss" in record]
    print(f"Steps: {last[-1]['step']}, of which {trained.steps} were taken now, in {trained.seconds:.1f} s")
    print(f"Training loss: {first['loss']:.4f} in the first step, {mean:.4f} on average in the last {len(last)}")
    if validated:
        print(f"Validation loss: {validated[-1]['validation_loss']:.4f}")
    picture = plot_losses(trained.log, trained.adapters)
    print(f"Adapters: {trained.adapters}" + (f"; losses: {picture}" if picture else ""))
