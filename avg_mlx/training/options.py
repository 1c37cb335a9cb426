"""The options of training: names, defaults, bounds and help, from which Python, command line and YAML files take them.

MLX is not imported here, so that `--help` need not wait for it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from ..errors import InputError
from .checked import Checked, Option, options_of

VALIDATION = "validation"
OPTIMIZATION = "optimization: a step takes batch-size × grad-accumulation-steps samples"
PROGRESS = "progress"
TRAINED = "what is trained"
RGLF = "RGLF"

LearningRate = Annotated[float, Option("AdamW's learning rate at its peak", OPTIMIZATION, above=0)]
Schedule = Literal["cosine", "constant"]
FineTuneType = Literal["lora", "dora", "full"]
Stage = TypeVar("Stage", bound="TrainOptions")


@dataclass(frozen=True, kw_only=True)
class Optimization(Checked):
    """How to optimize. Counts are optimizer steps."""

    learning_rate: LearningRate = 1e-5
    lr_schedule: Annotated[Schedule, Option("how the rate goes on after the warm-up", OPTIMIZATION)] = "cosine"
    warmup: Annotated[float, Option("share of the steps in which the rate rises", OPTIMIZATION, low=0, high=1)] = 0.03
    weight_decay: Annotated[float, Option("AdamW's weight decay", OPTIMIZATION, low=0)] = 0.0
    grad_clip: Annotated[float, Option("greatest norm of a step's gradient", OPTIMIZATION, above=0)] = 1.0
    seed: Annotated[int, Option("seed of data order, initialization and dropout", OPTIMIZATION, low=0)] = 0
    steps_per_eval: Annotated[int, Option("steps between validations", VALIDATION, low=1, fixed=False)] = 200
    save_every: Annotated[int, Option("steps between checkpoints", PROGRESS, low=1, fixed=False)] = 100


@dataclass(frozen=True, kw_only=True)
class DataOptions(Checked):
    """A model, and the samples it is to read."""

    model: Annotated[str, Option("converted folder or Hub repository")]
    data: Annotated[Path, Option("JSON list or JSON Lines in LLaVA's format (docs/training.md)")]
    image_folder: Annotated[
        Path | None, Option("folder that image names are relative to (default: the data's folder)", fixed=False)
    ] = None
    strict_paths: Annotated[bool, Option("refuse images outside of that folder", fixed=False)] = False
    max_seq_length: Annotated[
        int | None, Option("skip samples that take more positions (default: the model's context)", low=1)
    ] = None


@dataclass(frozen=True, kw_only=True)
class FeedbackOptions(DataOptions):
    """What to collect feedback on, and where to write it."""

    output: Annotated[Path, Option("JSON Lines file to write")]
    adapter_path: Annotated[Path | None, Option("adapters of train instruct")] = None


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Optimization, DataOptions):
    """What both stages share."""

    adapter_path: Annotated[Path, Option("folder to write adapters, checkpoints and the log to", fixed=False)]
    resume: Annotated[bool, Option("resume the run in --adapter-path", fixed=False)] = False
    val_data: Annotated[Path | None, Option("samples to validate on, in a file of their own", VALIDATION)] = None
    val_fraction: Annotated[float, Option("or the share of the data to hold out", VALIDATION, low=0, high=1)] = 0.0
    epochs: Annotated[int, Option("passes over the data", OPTIMIZATION, low=1)] = 1
    iters: Annotated[int | None, Option("steps, instead of epochs", OPTIMIZATION, low=1)] = None
    batch_size: Annotated[int, Option("samples passed at once, over all processes", OPTIMIZATION, low=1)] = 4
    grad_accumulation_steps: Annotated[int, Option("batches whose gradients make a step", OPTIMIZATION, low=1)] = 1
    steps_per_report: Annotated[
        int, Option("steps between lines of progress, where there is no terminal", PROGRESS, low=1, fixed=False)
    ] = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.val_data is not None and self.val_fraction > 0:
            raise InputError(
                "val_data names a file to validate on, and val_fraction holds samples out; give one of them"
            )

    @property
    def samples_per_step(self) -> int:
        """How many samples an optimizer step takes, over all processes."""
        return self.batch_size * self.grad_accumulation_steps

    def settings(self) -> dict[str, Any]:
        """The options that must stay the same when a run is resumed, as JSON holds them."""
        given = {name: getattr(self, name) for name, option in options_of(type(self)).items() if option.fixed}
        return {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}


@dataclass(frozen=True, kw_only=True)
class InstructOptions(TrainOptions):
    """Options of stage 3, multi-granularity instruction tuning."""

    fine_tune_type: Annotated[FineTuneType, Option("how the language model is trained", TRAINED)] = "lora"
    num_layers: Annotated[int, Option("how many of its last layers are trained, -1 for all", TRAINED, low=-1)] = -1
    lora_rank: Annotated[int, Option("rank of LoRA layers", TRAINED, low=1)] = 8
    lora_scale: Annotated[float, Option("factor of LoRA layers", TRAINED, above=0)] = 20.0
    lora_dropout: Annotated[float, Option("dropout in LoRA layers", TRAINED, low=0, high=0.99)] = 0.0
    granularities_per_step: Annotated[
        int | None, Option("draw K granularities a step: cheaper (default: all)", TRAINED, low=1, metavar="K")
    ] = None
    train_projector: Annotated[bool, Option("train the projector too", TRAINED)] = False
    train_newline: Annotated[bool, Option("train the newline token too", TRAINED)] = False
    train_vision: Annotated[bool, Option("train the vision tower too", TRAINED)] = False
    vision_learning_rate: Annotated[
        float | None, Option("the vision tower's own (default: the same)", TRAINED, above=0)
    ] = None
    grad_checkpoint: Annotated[bool, Option("recompute activations: less memory, more time", TRAINED)] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vision_learning_rate is not None and not self.train_vision:
            raise InputError("vision_learning_rate is given without train_vision; add that, or leave the rate out")


@dataclass(frozen=True, kw_only=True)
class Ranking(Checked):
    """How the router learns to rank granularities."""

    feature_cache: Annotated[
        Path | None,
        Option("keep image features on disk: no vision tower after epoch 1", RGLF, metavar="FOLDER", fixed=False),
    ] = None
    fresh_router: Annotated[bool, Option("begin with a new router instead of the model's", RGLF)] = False
    margin: Annotated[float, Option("margin of the ranking loss", RGLF, low=0)] = 1.0
    rank_loss_weight: Annotated[float, Option("weight of the ranking loss", RGLF, low=0)] = 1.0
    ce_loss_weight: Annotated[float, Option("weight of the choice loss", RGLF, low=0)] = 0.1
    token_cost: Annotated[float, Option("price of the finest visual tokens, not in the paper", RGLF, low=0)] = 0.0


@dataclass(frozen=True, kw_only=True)
class RouterOptions(Ranking, TrainOptions):
    """Options of stage 4, RGLF."""

    learning_rate: LearningRate = 1e-3
    base_adapters: Annotated[
        Path | None,
        Option("adapters of train instruct to train the router for", RGLF, metavar="FOLDER", fixed=False),
    ] = None
    feedback: Annotated[
        Path | None,
        Option(
            "feedback to use, or to write (default: feedback.jsonl in --adapter-path)",
            RGLF,
            metavar="FILE",
            fixed=False,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class RglfOptions(Ranking, InstructOptions):
    """Options of stages 3 and 4, one after the other.

    What both stages have is for both, except for what `router_…` says: there the plain name is stage 3's alone.
    """

    router_learning_rate: Annotated[float, Option("the router's learning rate at its peak", RGLF, above=0)] = 1e-3
    router_epochs: Annotated[int, Option("the router's passes over the data", RGLF, low=1)] = 1
    router_iters: Annotated[int | None, Option("the router's steps, instead of epochs", RGLF, low=1)] = None
    router_batch_size: Annotated[int, Option("samples that the router passes at once", RGLF, low=1)] = 4
    router_grad_accumulation_steps: Annotated[int, Option("batches that make a step of the router", RGLF, low=1)] = 1

    @property
    def instruct(self) -> InstructOptions:
        """Options of stage 3, whose run lies in the folder of both."""
        return self._stage(InstructOptions, adapter_path=self.adapter_path / "instruct")

    @property
    def router(self) -> RouterOptions:
        """Options of stage 4, which puts the adapters of stage 3 beside its own."""
        own = {name: value for name, value in vars(self).items() if name.startswith("router_")}
        own = {name.removeprefix("router_"): value for name, value in own.items()}
        return self._stage(RouterOptions, **own, base_adapters=self.instruct.adapter_path)

    def _stage(self, kind: type[Stage], **given: Any) -> Stage:
        """Options of one stage: what is `given`, and all others that have the same name here."""
        return kind(**{name: getattr(self, name) for name in options_of(kind) if hasattr(self, name)} | given)
