"""`avg-mlx train instruct|router|rglf`: fine-tune the language model, the router, or one after the other."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..errors import InputError, Interrupted
from ..training.checked import Option, options_of
from ..training.options import InstructOptions, RouterOptions, TrainOptions
from .options import OptionsParser, missing_options, read_yaml, values_of
from .parser import Parser, run

if TYPE_CHECKING:
    from ..training.stages import Trained
    from .progress import Bar

STAGES = {
    "instruct": "stage 3: the language model learns to answer at every granularity",
    "router": "stage 4, RGLF: the router learns from the language model's losses",
    "rglf": "the whole recipe from one config file: instruct, feedback, router",
}
Options = TypeVar("Options", bound=TrainOptions)
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
    parser = Parser(prog=prog, description="Instruct, feedback and router, as a config file says (docs/training.md).")
    parser.add_argument("-c", "--config", required=True, metavar="FILE", help="YAML: model, data, output, …")
    parser.add_argument("--resume", action="store_true", help="resume where it stopped")
    return parser


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
    """Run one stage after the other, each as its own command would."""
    instruct, router = read_recipe(args.config, args.resume)  # both are checked before hours are spent
    try:
        train_instruct(argparse.Namespace(options=instruct))
        train_router(argparse.Namespace(options=router))
    except Interrupted:
        raise
    except KeyboardInterrupt as stop:
        raise Interrupted("interrupted between two steps of the recipe; --resume goes on from there") from stop


def read_recipe(file: str, resume: bool) -> tuple[InstructOptions, RouterOptions]:
    """Read the options of both stages. Raises InputError for what cannot be used."""
    recipe = read_yaml(file)
    sections = {stage: recipe.pop(stage, None) or {} for stage in ("instruct", "router")}
    if "output" not in recipe or not all(isinstance(section, dict) for section in sections.values()):
        raise InputError(f"{file}: expected model, data, output, and options under instruct and router")
    sections_and_output = {"output": Option("", name="output", kind=Path), **dict.fromkeys(sections, Option(""))}
    shared = values_of(file, recipe, _of_recipes(TrainOptions) | sections_and_output, "train rglf")
    output = shared.pop("output")
    tuned = {"adapter_path": output / "instruct"}
    routed = {
        "adapter_path": output / "adapters",
        "base_adapters": output / "instruct",
        "feedback": output / "feedback.jsonl",
    }

    def make(kind: type[Options], stage: str, folders: dict[str, Path]) -> Options:
        own = values_of(f"{file}, {stage}", sections[stage], _of_recipes(kind), f"train {stage}")
        given = {**shared, **folders, "resume": resume, **own}
        if missing := missing_options(kind, given):
            raise InputError(f"{file} lacks {' and '.join(missing)}; expected model, data and output")
        try:
            return kind(**given)
        except InputError as error:
            raise InputError(f"{file}, {stage}: {error}") from None

    return make(InstructOptions, "instruct", tuned), make(RouterOptions, "router", routed)


def _of_recipes(kind: type[TrainOptions]) -> dict[str, Option]:
    """The options that a recipe may set; train rglf sets the others itself."""
    own = ("adapter_path", "base_adapters", "resume")
    return {name: option for name, option in options_of(kind).items() if name not in own}


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
