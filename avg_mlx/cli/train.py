"""`avg-mlx train instruct|router|rglf`: fine-tune the language model, the router, or one after the other."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from . import Parser, number, run

if TYPE_CHECKING:
    from ..training.stages import TrainOptions

STAGES = {
    "instruct": "stage 3: the language model learns to answer at every granularity",
    "router": "stage 4, RGLF: the router learns from the language model's losses",
    "rglf": "the whole recipe from one config file: instruct, feedback, router",
}


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


class ConfigParser(Parser):
    """Reads the options of a --config file, if one is named, before those of the command line."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        arguments = sys.argv[1:] if args is None else list(args)
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        finder.add_argument("-c", "--config")
        try:
            file = finder.parse_known_args(arguments)[0].config
            return super().parse_args((options_of(read_config(file)) if file else []) + arguments, namespace)
        except (InputError, argparse.ArgumentError) as error:
            self.error(str(error))


def _common_parser(prog: str, description: str, batch_size: int, learning_rate: str) -> Parser:
    # Options that are not given are left out, so that training's own defaults hold. A shortened --config would not be
    # found before the others.
    parser = ConfigParser(prog=prog, description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    count, share = number(int, 1), number(float, 0, 1)
    add = parser.add_argument
    add("-c", "--config", metavar="FILE", help="YAML file of options, named as here; the command line wins")
    add("--model", required=True, help="converted folder or Hub repository")
    add("--data", required=True, type=Path, help="JSON list or JSON Lines in LLaVA's format (docs/training.md)")
    add("--image-folder", type=Path, help="where image names lead from (default: the data's folder)")
    add("--adapter-path", required=True, type=Path, help="folder to write adapters, checkpoints and the log to")
    add("--resume", action="store_true", help="go on with the run in --adapter-path")
    group = parser.add_argument_group("validation")
    group.add_argument("--val-data", type=Path, help="samples to validate on, in a file of their own")
    group.add_argument("--val-fraction", type=share, help="or the share of the data to hold out (0)")
    group.add_argument("--steps-per-eval", type=count, help="steps between validations (200)")
    group = parser.add_argument_group("optimization", "A step takes batch-size × grad-accumulation-steps samples.")
    add = group.add_argument
    add("--epochs", type=count, help="passes over the data (1)")
    add("--iters", type=count, help="steps, instead of epochs")
    add("--batch-size", type=count, help=f"samples passed at once, over all processes ({batch_size})")
    add("--grad-accumulation-steps", type=count, help="batches whose gradients make a step (1)")
    add("--learning-rate", type=number(float, 0, exclusive=True), help=f"AdamW's, at its peak ({learning_rate})")
    add("--lr-schedule", choices=("cosine", "constant"), help="after the warm-up (cosine)")
    add("--warmup", type=share, help="share of the steps in which the rate rises (0.03)")
    add("--weight-decay", type=number(float, 0), help="(0)")
    add("--grad-clip", type=number(float, 0, exclusive=True), help="greatest norm of a step's gradient (1)")
    add("--max-seq-length", type=count, help="skip samples that take more positions (the model's context)")
    add("--save-every", type=count, help="steps between checkpoints (100)")
    add("--seed", type=number(int, 0), help="of data order, initialization and dropout (0)")
    return parser


def instruct_parser(prog: str) -> Parser:
    parser = _common_parser(prog, "Multi-granularity instruction tuning.", 4, "1e-5")
    count = number(int, 1)
    group = parser.add_argument_group("what is trained")
    add = group.add_argument
    add("--fine-tune-type", choices=("lora", "dora", "full"), help="of the language model (lora)")
    add("--num-layers", type=number(int, -1), help="its last layers to train, -1 for all (-1)")
    add("--lora-rank", type=count, help="(8)")
    add("--lora-scale", type=number(float, 0, exclusive=True), help="(20)")
    add("--lora-dropout", type=number(float, 0, 0.99), help="(0)")
    add("--granularities-per-step", type=count, metavar="K", help="draw K granularities a step: cheaper (all)")
    add("--train-projector", action="store_true", help="also the projector")
    add("--train-newline", action="store_true", help="also the newline token")
    add("--train-vision", action="store_true", help="also the vision tower")
    add("--vision-learning-rate", type=number(float, 0, exclusive=True), help="the tower's own (the same)")
    add("--grad-checkpoint", action="store_true", help="recompute activations: less memory, more time")
    return parser


def router_parser(prog: str) -> Parser:
    parser = _common_parser(
        prog, "RGLF: the router learns to rank granularities as the language model does.", 4, "1e-3"
    )
    group = parser.add_argument_group("RGLF")
    add = group.add_argument
    add("--base-adapters", type=Path, metavar="FOLDER", help="adapters of train instruct to train the router for")
    add("--feedback", type=Path, metavar="FILE", help="feedback to use, or to write (feedback.jsonl in --adapter-path)")
    add(
        "--feature-cache",
        type=Path,
        metavar="FOLDER",
        help="keep image features on disk: no vision tower after epoch 1",
    )
    add("--fresh-router", action="store_true", help="begin with a new router instead of the model's")
    add("--margin", type=number(float, 0), help="of the ranking loss (1)")
    add("--rank-loss-weight", type=number(float, 0), help="(1)")
    add("--ce-loss-weight", type=number(float, 0), help="of the choice loss (0.1)")
    add("--token-cost", type=number(float, 0), help="price of the finest visual tokens, not in the paper (0)")
    return parser


def rglf_parser(prog: str) -> Parser:
    parser = Parser(prog=prog, description="Instruct, feedback and router, as a config file says (docs/training.md).")
    parser.add_argument("-c", "--config", required=True, metavar="FILE", help="YAML: model, data, output, …")
    parser.add_argument("--resume", action="store_true", help="go on where it stopped")
    return parser


def train_instruct(args: argparse.Namespace) -> None:
    from ..training import stages

    options = _options(stages.InstructOptions, args)
    with _bars("Instruct") as [bar]:
        stages.train_instruct(options, bar.step)
    _finish(options)


def train_router(args: argparse.Namespace) -> None:
    from ..training import stages

    options = _options(stages.RouterOptions, args)
    with _bars("Feedback", "Router") as [feedback_bar, bar]:
        stages.train_router(options, bar.step, feedback_bar.show)
    _finish(options)


def train_rglf(args: argparse.Namespace) -> None:
    """One stage after the other, each as its own command would do it."""
    recipe = read_config(args.config)
    sections = {stage: recipe.pop(stage, None) or {} for stage in ("instruct", "router")}
    if "output" not in recipe or not all(isinstance(section, dict) for section in sections.values()):
        raise InputError(f"{args.config}: expected model, data, output, and options under instruct and router")
    output = Path(recipe.pop("output"))
    shared = options_of(recipe) + (["--resume"] if args.resume else [])
    tuned, routed = output / "instruct", output / "adapters"
    instruct = [*shared, "--adapter-path", str(tuned), *options_of(sections["instruct"])]
    feedback = ["--base-adapters", str(tuned), "--feedback", str(output / "feedback.jsonl")]
    router = [*shared, "--adapter-path", str(routed), *feedback, *options_of(sections["router"])]
    instruct_args = instruct_parser("avg-mlx train instruct").parse_args(instruct)
    router_args = router_parser("avg-mlx train router").parse_args(router)  # both are read before hours are spent
    train_instruct(instruct_args)
    train_router(router_args)


def read_config(file: str) -> dict[str, Any]:
    """The mapping in a YAML file."""
    import yaml

    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read {file} ({error}); expected a YAML file of options") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no options; expected lines such as learning-rate: 1.0e-5")
    return content


def options_of(config: dict[str, Any]) -> list[str]:
    """Options as on the command line; true stands for a bare flag, and mlx-lm's lora_parameters may be nested."""
    arguments = []
    for key, value in config.items():
        name = f"--{str(key).replace('_', '-')}"
        if isinstance(value, dict) and name == "--lora-parameters":
            arguments += options_of({f"lora-{inner}": v for inner, v in value.items()})
        elif value is True:
            arguments.append(name)
        elif value is not None and value is not False:
            arguments += [name, str(value)]
    return arguments


def _options(kind: "type[TrainOptions]", args: argparse.Namespace) -> Any:
    given = {key: value for key, value in vars(args).items() if key in kind.__dataclass_fields__}
    return kind(**given)


@contextmanager
def _bars(*titles: str) -> Iterator[list[Any]]:
    """Progress bars of the first process; steps are counted by the last, samples by others."""
    import mlx.core as mx

    from .progress import Bar

    hidden = mx.distributed.init().rank() > 0
    with ExitStack() as stack:
        yield [stack.enter_context(Bar(title, "step", hidden)) for title in titles]


def _finish(options: "TrainOptions") -> None:
    import mlx.core as mx

    from ..training.plot import plot_losses

    if mx.distributed.init().rank() == 0:
        picture = plot_losses(options.adapter_path)
        print(f"Adapters: {options.adapter_path}" + (f"; losses: {picture}" if picture else ""))
