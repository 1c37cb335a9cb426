"""The two stages from options to a folder of trained adapters, and the feedback between them."""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..config import Config
from ..errors import InputError
from ..inputs.tokenizer import Tokenizer
from ..journal import SETTINGS, Row
from ..model.avg_llava import Model
from ..model.inventory import fingerprint
from ..progress import Progress, silent
from ..weights.adapters import WEIGHTS, AdapterConfig, load_adapters
from ..weights.checkpoint import load
from ..weights.shards import load_arrays
from . import instruct, rglf
from .data import Sample, read_samples, routable
from .features import FeatureCache
from .feedback import Feedback, collect_feedback
from .loop import Task, train
from .optimizer import LoopSettings
from .options import FeedbackOptions, InstructOptions, Optimization, RglfOptions, RouterOptions, TrainOptions
from .plan import Plan, split
from .run import Run, check_folder

FEEDBACK = "feedback.jsonl"  # in a router's folder
Report = Callable[[Row, int], None]  # (a step's record, steps in all)


def _no_report(record: Row, steps: int) -> None:
    """Report to nobody."""


@dataclass(frozen=True)
class Trained:
    """What came of a stage."""

    adapters: Path  # the folder
    log: list[Row]  # a record for each step, in the process that writes
    steps: int  # that were taken now, and not before the run was resumed
    seconds: float  # that they took
    feedback: list[Feedback]  # that the router was trained on


def train_instruct(options: InstructOptions, report: Report = _no_report) -> Trained:
    """Multi-granularity instruction tuning: leaves its adapters in `options.adapter_path`."""
    model, tokenizer = load(options.model)
    return _instruct(model, *_read(options, tokenizer, model.config), options, report)


def _instruct(
    model: Model, learned: Sequence[Sample], held_out: Sequence[Sample], options: InstructOptions, report: Report
) -> Trained:
    """Train stage 3 on samples that were read."""
    granularities = model.config.granularities
    if options.granularities_per_step is not None and options.granularities_per_step > len(granularities):
        raise InputError(
            f"granularities_per_step is {options.granularities_per_step}, but the model has {len(granularities)}"
        )
    lora = {"rank": options.lora_rank, "scale": options.lora_scale, "dropout": options.lora_dropout}
    full = options.fine_tune_type == "full"
    config = AdapterConfig(options.fine_tune_type, options.num_layers, None if full else lora, fingerprint(model))
    run = Run(options.adapter_path, _settings(options, config.base_model, learned, held_out), config)
    with run.open(options.resume):
        trainable = instruct.Trainable(options.train_projector, options.train_newline, options.train_vision)
        mx.random.seed(options.seed)
        instruct.prepare(model, config, trainable, options.grad_checkpoint)
        task = instruct.InstructTask(
            model, learned, held_out, trainable, _micro_batch(options), options.granularities_per_step, options.seed
        )
        lengths = [sample.positions(model.config, model.config.finest) for sample in learned]
        return _train(model, task, lengths, options, run, report, options.vision_learning_rate)


def make_feedback(options: FeedbackOptions, progress: Progress = silent) -> list[Feedback]:
    """Measure the language model's loss for every sample with an image and every granularity, into `options.output`."""
    model, tokenizer = load(options.model, adapter_path=options.adapter_path)
    samples = routable(_read_file(options, options.data, tokenizer, model.config))
    if not samples:
        raise InputError(f"{options.data} leaves no sample to measure; see the warnings above")
    return collect_feedback(model, samples, options.output, progress)


def train_router(options: RouterOptions, report: Report = _no_report, feedback_progress: Progress = silent) -> Trained:
    """RGLF: collects the feedback that is missing, then trains the router; leaves adapters in `options.adapter_path`.

    They hold the `options.base_adapters` too, so that one folder has all. Raises InputError for a model with one
    granularity.
    """
    model, tokenizer = load(options.model)
    _check_choice(model.config, options.model)
    samples = _routable(*_read(options, tokenizer, model.config), options)
    return _router(model, *samples, options, report, feedback_progress)


def train_rglf(
    options: RglfOptions,
    instruct_report: Report = _no_report,
    feedback_progress: Progress = silent,
    router_report: Report = _no_report,
) -> tuple[Trained, Trained]:
    """Stages 3 and 4, one after the other: leaves the adapters of both in `options.adapter_path`.

    What the second would refuse of model, data and folder is refused before the first begins. Returns what came of
    each.
    """
    model, tokenizer = load(options.model)
    _check_choice(model.config, options.model)
    _check_stages(options)
    samples = _read(options, tokenizer, model.config)
    routable_samples = _routable(*samples, options)
    instructed = _instruct(model, *samples, options.instruct, instruct_report)
    del model  # so that there is room for the other
    mx.clear_cache()
    mx.reset_peak_memory()
    model, _ = load(options.model)
    return instructed, _router(model, *routable_samples, options.router, router_report, feedback_progress)


def _check_stages(options: RglfOptions) -> None:
    """Raise InputError for a folder that the second stage would refuse, after hours of the first one."""
    folder = options.adapter_path
    check_folder(folder, options.resume)
    begun, feedback = (folder / SETTINGS).exists(), folder / FEEDBACK
    if feedback.exists() and not begun:
        raise InputError(f"{feedback} is of the model before it is trained; move it away, or choose another folder")
    if begun and not (options.instruct.adapter_path / SETTINGS).exists():
        raise InputError(f"{folder} holds a run of train router alone; resume that, or choose another folder")


def _check_choice(config: Config, model: str) -> None:
    """Raise InputError for a model that leaves a router no choice."""
    if len(config.granularities) == 1:
        raise InputError(
            f"{model} has one granularity, {config.finest}, so there is nothing for a router to choose; "
            f"give it several with avg-mlx convert --hf-path {model} --granularities --mlx-path NEW, and train that"
        )


def _router(
    model: Model,
    learned: Sequence[Sample],
    held_out: Sequence[Sample],
    options: RouterOptions,
    report: Report,
    feedback_progress: Progress,
) -> Trained:
    """Train stage 4 on samples that were read, each with one image."""
    config, inherited = AdapterConfig(num_layers=0, base_model=fingerprint(model)), {}
    if options.base_adapters is not None:
        config = load_adapters(model, options.base_adapters)
        tensors = load_arrays(options.base_adapters / WEIGHTS)
        inherited = {name: array for name, array in tensors.items() if not name.startswith("router.")}
    author = fingerprint(model)
    run = Run(options.adapter_path, _settings(options, author, learned, held_out), config, inherited)
    with run.open(options.resume):
        file = options.feedback or options.adapter_path / FEEDBACK
        cache = FeatureCache(model, options.feature_cache and options.feature_cache / author)
        to_resume = "--resume goes on from there"
        every = [*learned, *held_out]
        rows = collect_feedback(model, every, file, feedback_progress, cache, to_resume, scored=False)
        mx.random.seed(options.seed)
        rglf.prepare(model, options.fresh_router)
        task = rglf.RouterTask(
            model,
            learned,
            rows[: len(learned)],
            held_out,
            rows[len(learned) :],
            _micro_batch(options),
            options.margin,
            options.rank_loss_weight,
            options.ce_loss_weight,
            cache,
            options.token_cost,
        )
        crops = [sum(math.prod(model.config.crop_grid(size)) for size in sample.image_sizes) for sample in learned]
        return _train(model, task, crops, options, run, report, feedback=rows)


def _read_file(
    options: TrainOptions | FeedbackOptions, data: Path, tokenizer: Tokenizer, config: Config
) -> list[Sample]:
    limit, strict = options.max_seq_length, options.strict_paths
    return read_samples(data, options.image_folder, tokenizer, config, limit, strict)


def _read(options: TrainOptions, tokenizer: Tokenizer, config: Config) -> tuple[list[Sample], list[Sample]]:
    """(samples to learn, samples held out for validation)."""
    samples = _read_file(options, options.data, tokenizer, config)
    if options.val_data is not None:
        return _some(samples, options), _read_file(options, options.val_data, tokenizer, config)
    learned, held_out = split(len(samples), options.val_fraction, options.seed)
    return _some([samples[i] for i in learned], options), [samples[i] for i in held_out]


def _routable(
    learned: Sequence[Sample], held_out: Sequence[Sample], options: TrainOptions
) -> tuple[list[Sample], list[Sample]]:
    """Pick those of both that a router can learn from. What stage 3 held out is not learned here either."""
    return _some(routable(learned), options), routable(held_out)


def _some(learned: list[Sample], options: TrainOptions) -> list[Sample]:
    """Return samples to learn; InputError if there are none."""
    if not learned:
        raise InputError(f"{options.data} leaves no sample to learn; see the warnings above")
    return learned


def _micro_batch(options: TrainOptions) -> int:
    """How many samples one process passes at once."""
    return math.ceil(options.batch_size / mx.distributed.init().size())


def _settings(
    options: TrainOptions, model: str, learned: Sequence[Sample], held_out: Sequence[Sample]
) -> dict[str, Any]:
    """What must not change when a run is resumed."""
    keys = " ".join(sample.key for sample in [*learned, *held_out])
    content = {"model": model, "data": hashlib.sha256(keys.encode()).hexdigest()[:16]}  # wherever they lie
    return {**options.settings(), **content, "val_data": options.val_data and options.val_data.name}


def _train(
    model: Model,
    task: Task,
    lengths: Sequence[int],
    options: TrainOptions,
    run: Run,
    report: Report,
    vision_learning_rate: float | None = None,
    feedback: Sequence[Feedback] = (),
) -> Trained:
    """Go through the loop, and tell what came of it."""
    plan = Plan(lengths, options.samples_per_step, options.seed)
    settings = LoopSettings(
        steps=options.iters or options.epochs * plan.steps_per_epoch,
        vision_learning_rate=vision_learning_rate,
        **{entry.name: getattr(options, entry.name) for entry in fields(Optimization)},
    )
    start, taken = time.perf_counter(), 0

    def count(record: Row) -> None:
        nonlocal taken
        taken += 1
        report(record, settings.steps)

    train(model, task, plan, settings, run, count)
    return Trained(options.adapter_path, run.log, taken, time.perf_counter() - start, list(feedback))
