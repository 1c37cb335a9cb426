"""The two stages from options to a trained adapter folder, and the feedback between them."""

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..config import Config
from ..errors import InputError
from ..model.avg_llava import Model
from ..model.inventory import fingerprint
from ..weights.adapters import WEIGHTS, AdapterConfig, load_adapters
from ..weights.checkpoint import load
from ..weights.shards import load_arrays
from . import instruct, rglf
from .data import Sample, read_samples
from .features import FeatureCache
from .feedback import Feedback, collect_feedback, routable
from .loop import LoopSettings, Task, train
from .plan import Plan, split
from .run import Run

logger = logging.getLogger(__name__)

Report = Callable[[dict[str, Any], int], None]  # (a step's record, steps in all)
FeedbackReport = Callable[[int, int], None]  # (samples done, samples in all)


def _no_report(record: dict[str, Any], steps: int) -> None:
    pass


def _no_feedback_report(done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class TrainOptions:
    """What both stages share. Steps are counted in optimizer steps of batch_size · grad_accumulation_steps samples."""

    model: str
    data: Path
    adapter_path: Path
    image_folder: Path | None = None
    val_data: Path | None = None
    val_fraction: float = 0.0
    epochs: int = 1
    iters: int | None = None  # steps, instead of epochs
    batch_size: int = 4
    grad_accumulation_steps: int = 1
    learning_rate: float = 1e-5
    warmup: float = 0.03
    lr_schedule: str = "cosine"
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    max_seq_length: int | None = None
    steps_per_eval: int = 200
    save_every: int = 100
    seed: int = 0
    resume: bool = False

    def loop_settings(self, plan: Plan, vision_learning_rate: float | None) -> LoopSettings:
        return LoopSettings(
            steps=self.iters or self.epochs * plan.steps_per_epoch,
            learning_rate=self.learning_rate,
            warmup=self.warmup,
            schedule=self.lr_schedule,
            weight_decay=self.weight_decay,
            grad_clip=self.grad_clip,
            vision_learning_rate=vision_learning_rate,
            steps_per_eval=self.steps_per_eval,
            save_every=self.save_every,
            seed=self.seed,
        )

    @property
    def samples_per_step(self) -> int:
        return self.batch_size * self.grad_accumulation_steps

    @property
    def micro_batch(self) -> int:
        """Samples that one process passes at once."""
        return math.ceil(self.batch_size / mx.distributed.init().size())

    def fixed(self) -> dict[str, Any]:
        """The options that a run is resumed with unchanged."""
        free = ("adapter_path", "image_folder", "resume", "save_every", "steps_per_eval")
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name not in free}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


@dataclass(frozen=True)
class InstructOptions(TrainOptions):
    """Stage 3."""

    fine_tune_type: str = "lora"
    num_layers: int = -1
    lora_rank: int = 8
    lora_scale: float = 20.0
    lora_dropout: float = 0.0
    granularities_per_step: int | None = None
    train_projector: bool = False
    train_newline: bool = False
    train_vision: bool = False
    vision_learning_rate: float | None = None
    grad_checkpoint: bool = False


@dataclass(frozen=True)
class RouterOptions(TrainOptions):
    """Stage 4."""

    learning_rate: float = 1e-3
    base_adapters: Path | None = None  # of stage 3, to train the router for
    feedback: Path | None = None  # a file to use or to write; by default in adapter_path
    feature_cache: Path | None = None
    fresh_router: bool = False
    margin: float = 1.0
    rank_loss_weight: float = 1.0
    ce_loss_weight: float = 0.1
    token_cost: float = 0.0


def train_instruct(options: InstructOptions, report: Report = _no_report) -> None:
    """Multi-granularity instruction tuning; its adapters are in `options.adapter_path` afterwards."""
    model, tokenizer = load(options.model)
    granularities = model.config.granularities
    if options.granularities_per_step is not None and options.granularities_per_step > len(granularities):
        raise InputError(f"{options.granularities_per_step} granularities per step, but there are {len(granularities)}")
    if options.vision_learning_rate is not None and not options.train_vision:
        raise InputError("--vision-learning-rate is for --train-vision; add that, or leave it out")
    learned, held_out = _read(options, tokenizer, model.config, lambda samples: samples)

    lora = {"rank": options.lora_rank, "scale": options.lora_scale, "dropout": options.lora_dropout}
    full = options.fine_tune_type == "full"
    config = AdapterConfig(options.fine_tune_type, options.num_layers, None if full else lora, fingerprint(model))
    run = Run(options.adapter_path, _settings(options, config.base_model, learned, held_out), config)
    _open(run, options)
    trainable = instruct.Trainable(options.train_projector, options.train_newline, options.train_vision)
    mx.random.seed(options.seed)
    instruct.prepare(model, config, trainable, options.grad_checkpoint)
    task = instruct.InstructTask(
        model, learned, held_out, trainable, options.micro_batch, options.granularities_per_step, options.seed
    )
    lengths = [sample.positions(model.config, model.config.finest) for sample in learned]
    _train(model, task, lengths, options, run, report, options.vision_learning_rate)


def make_feedback(
    model_path: str,
    data: Path,
    output: Path,
    image_folder: Path | None = None,
    adapter_path: Path | None = None,
    max_seq_length: int | None = None,
    report: FeedbackReport = _no_feedback_report,
) -> list[Feedback]:
    """The language model's loss for every sample with an image and every granularity, kept in `output`."""
    model, tokenizer = load(model_path, adapter_path=adapter_path)
    samples = _with_one_image(read_fitting(data, image_folder, tokenizer, model.config, max_seq_length))
    if not samples:
        raise InputError(f"{data} leaves no sample to measure; see the warnings above")
    return collect_feedback(model, samples, output, lambda done: report(done, len(samples)))


def train_router(
    options: RouterOptions, report: Report = _no_report, feedback_report: FeedbackReport = _no_feedback_report
) -> None:
    """RGLF: feedback where it is not there yet, then the router; its adapters are in `options.adapter_path` afterwards.

    They hold the `options.base_adapters` too, so that one folder has all.
    """
    model, tokenizer = load(options.model)
    config, inherited = AdapterConfig(num_layers=0, base_model=fingerprint(model)), {}
    if options.base_adapters is not None:
        config = load_adapters(model, options.base_adapters)
        inherited = load_arrays(Path(options.base_adapters) / WEIGHTS)
        inherited = {name: array for name, array in inherited.items() if not name.startswith("router.")}
    learned, held_out = _read(options, tokenizer, model.config, _with_one_image)
    run = Run(options.adapter_path, _settings(options, fingerprint(model), learned, held_out), config, inherited)
    _open(run, options)
    file = options.feedback or options.adapter_path / "feedback.jsonl"
    cache = FeatureCache(model, options.feature_cache and options.feature_cache / fingerprint(model))
    samples = learned + held_out
    rows = collect_feedback(model, samples, file, lambda done: feedback_report(done, len(samples)), cache)
    mx.random.seed(options.seed)
    rglf.prepare(model, options.fresh_router)
    task = rglf.RouterTask(
        model,
        learned,
        rows[: len(learned)],
        held_out,
        rows[len(learned) :],
        options.micro_batch,
        options.margin,
        options.rank_loss_weight,
        options.ce_loss_weight,
        cache,
        options.token_cost,
    )
    crops = [sum(math.prod(model.config.crop_grid(size)) for size in sample.image_sizes) for sample in learned]
    _train(model, task, crops, options, run, report)


def read_fitting(
    data: Path, image_folder: Path | None, tokenizer, config: Config, max_seq_length: int | None
) -> list[Sample]:
    """The samples that fit into `max_seq_length` positions, or the model's context; how many do not is logged."""
    limit = min(max_seq_length or config.context_length, config.context_length)
    samples = read_samples(data, image_folder, tokenizer, config)
    fitting = [sample for sample in samples if sample.positions(config, config.finest) <= limit]
    if len(fitting) < len(samples):
        skipped = len(samples) - len(fitting)
        logger.warning("%d of %d samples skipped: they take more than %d positions", skipped, len(samples), limit)
    return fitting


def _with_one_image(samples: list[Sample]) -> list[Sample]:
    """Those that feedback is for; how many are not is logged."""
    chosen = routable(samples)
    if len(chosen) < len(samples):
        logger.warning("%d of %d samples skipped: not exactly one image", len(samples) - len(chosen), len(samples))
    return chosen


def _read(
    options: TrainOptions, tokenizer, config: Config, choose: Callable[[list[Sample]], list[Sample]]
) -> tuple[list[Sample], list[Sample]]:
    """(samples to learn, samples held out for validation)."""

    def read(data: Path) -> list[Sample]:
        return choose(read_fitting(data, options.image_folder, tokenizer, config, options.max_seq_length))

    samples = read(options.data)
    if options.val_data is not None:
        learned, held_out = samples, read(options.val_data)
    else:
        numbers = split(len(samples), options.val_fraction, options.seed)
        learned, held_out = ([samples[i] for i in part] for part in numbers)
    if not learned:
        raise InputError(f"{options.data} leaves no sample to learn; see the warnings above")
    return learned, held_out


def _settings(
    options: TrainOptions, model: str, learned: Sequence[Sample], held_out: Sequence[Sample]
) -> dict[str, Any]:
    """What must not change when a run is resumed."""
    keys = " ".join(sample.key for sample in [*learned, *held_out])
    return {**options.fixed(), "model": model, "data": hashlib.sha256(keys.encode()).hexdigest()[:16]}


def _open(run: Run, options: TrainOptions) -> None:
    if mx.distributed.init().rank() == 0:
        run.open(options.resume)


def _train(
    model: Model,
    task: Task,
    lengths: Sequence[int],
    options: TrainOptions,
    run: Run,
    report: Report,
    vision_learning_rate: float | None = None,
) -> None:
    plan = Plan(lengths, options.samples_per_step, options.seed)
    settings = options.loop_settings(plan, vision_learning_rate)
    train(model, task, plan, settings, run, lambda record: report(record, settings.steps))
