"""Stage 3, multi-granularity instruction tuning: the answers' loss at every granularity."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import InputError, listing
from ..inputs.image import Crops
from ..model.avg_llava import Model
from ..weights.adapters import AdapterConfig, add_lora, trained_tensors
from .data import Sample
from .forward import answer_losses, load_crops
from .loop import MicroLoss


@dataclass(frozen=True)
class Trainable:
    """What instruction tuning changes beside the language model."""

    projector: bool = False
    newline: bool = False
    vision: bool = False


def prepare(model: Model, config: AdapterConfig, trainable: Trainable, grad_checkpoint: bool) -> None:
    """Freeze `model` except for what is to be trained. New LoRA layers follow MLX's random state.

    Raises InputError if nothing would be trained, or what cannot be.
    """
    layers = model.language_model.layers
    if grad_checkpoint and config.has_lora and (config.lora_parameters or {}).get("dropout"):
        raise InputError("grad_checkpoint computes activations anew, with another dropout; set lora_dropout to 0")
    if config.num_layers > len(layers):
        raise InputError(f"num_layers is {config.num_layers}, but the language model has {len(layers)}; choose fewer")
    odd = {bits for part in model.language_model.modules() if 32 % (bits := getattr(part, "bits", 32))}
    if config.fine_tune_type == "dora" and odd:
        raise InputError(f"mlx-lm's dora does not fit weights of {listing(sorted(map(str, odd)))} bits; choose lora")
    model.freeze()
    if config.fine_tune_type == "full" and config.num_layers == -1:
        _unfreeze(model.language_model)
    elif config.fine_tune_type == "full":
        for layer in layers[len(layers) - config.num_layers :]:
            _unfreeze(layer)
    elif config.has_lora:
        add_lora(model, config)
    if trainable.projector:
        _unfreeze(model.projector)
    if trainable.newline and not model.config.has_newline:
        raise InputError("train_newline is given, but this model has no newline token; leave it out")
    if trainable.newline:
        model.unfreeze(keys="image_newline", recurse=False)
    if trainable.vision:
        _unfreeze(model.vision_tower)
    if not trained_tensors(model):
        raise InputError("nothing would be trained; raise num_layers, or add train_projector and the like")
    model.train()
    if grad_checkpoint:
        _checkpoint_gradients(layers[0])


def _unfreeze(module: nn.Module) -> None:
    if any(hasattr(part, "scales") for part in module.modules()):
        raise InputError("quantized weights cannot be trained themselves; set fine_tune_type to lora, or dequantize")
    module.unfreeze()


def _checkpoint_gradients(layer: nn.Module) -> None:
    """Recompute activations as mlx-lm does: it patches the layer's class, and must do so only once."""
    from mlx_lm.tuner.trainer import grad_checkpoint

    if type(layer).__call__.__name__ != "checkpointed_fn":
        grad_checkpoint(layer)


@dataclass
class InstructTask:
    """Learn to answer at all granularities, or at `granularities_per_step` of them, drawn anew each step."""

    model: Model
    samples: Sequence[Sample]
    held_out: Sequence[Sample]
    trainable: Trainable
    micro_batch: int
    granularities_per_step: int | None = None
    seed: int = 0

    def micro_losses(self, samples: Sequence[int], batch: Sequence[int], step: int) -> Iterable[MicroLoss]:
        """Yield a loss for each micro-batch and granularity. Samples without images pass only once."""
        granularities = self.model.config.granularities
        if self.granularities_per_step is not None:
            rng = np.random.default_rng([self.seed, step])
            drawn = rng.choice(len(granularities), self.granularities_per_step, replace=False)
            granularities = tuple(granularities[i] for i in sorted(drawn))
        tokens = sum(self.samples[i].answer_tokens for i in batch)
        chosen = [self.samples[i] for i in samples]
        for start in range(0, len(chosen), self.micro_batch):
            yield from self._losses(chosen[start : start + self.micro_batch], granularities, tokens)

    def validate(self) -> float | None:
        """The mean loss over held-out answer tokens and all granularities."""
        tokens = sum(sample.answer_tokens for sample in self.held_out)
        total = 0.0
        for start in range(0, len(self.held_out), self.micro_batch):
            chosen = self.held_out[start : start + self.micro_batch]
            total += sum(float(loss()) for loss in self._losses(chosen, self.model.config.granularities, tokens))
        return total if self.held_out else None

    def _vision_stages(self) -> tuple[Callable[[mx.array], mx.array], Callable[[mx.array], mx.array]]:
        """The way from pixels to features in two parts: the frozen one, and the one that gradients must pass."""
        tower, projector = self.model.vision_tower, self.model.projector
        if self.trainable.vision:
            return lambda pixels: pixels, lambda pixels: projector(tower(pixels))
        if self.trainable.projector:
            return tower, projector
        return lambda pixels: projector(tower(pixels)), lambda features: features

    def _losses(self, samples: Sequence[Sample], granularities: Sequence[int], tokens: int) -> Iterator[MicroLoss]:
        model = self.model
        text_only = [sample for sample in samples if not sample.images]
        seen = [sample for sample in samples if sample.images]
        if text_only:
            nothing: list[list[Any]] = [[] for _ in text_only]
            yield lambda: answer_losses(model, text_only, nothing, nothing, granularities[0]).sum() / tokens
        if not seen:
            return
        crops = [load_crops(model, sample) for sample in seen]
        frozen, learned = self._vision_stages()
        half_seen = frozen(mx.array(np.concatenate([c.pixels for images in crops for c in images])))
        mx.eval(half_seen)  # once for all granularities

        def loss_at(granularity: int) -> MicroLoss:
            def loss() -> mx.array:
                features = _deal_out(learned(half_seen), crops)
                losses = answer_losses(model, seen, features, crops, granularity)
                return losses.sum() / (tokens * len(granularities))

            return loss

        for granularity in granularities:
            yield loss_at(granularity)


def _deal_out(features: mx.array, crops: Sequence[Sequence[Crops]]) -> list[list[mx.array]]:
    """Deal the features of all crops, which passed in one batch, to each image of each sample."""
    ends = np.cumsum([len(c) for images in crops for c in images])[:-1]
    parts = iter(mx.split(features, ends.tolist()))
    return [[next(parts) for _ in images] for images in crops]
