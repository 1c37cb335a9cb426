"""Stage 4, RGLF: the router learns to rank granularities as the frozen language model's losses do."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..model.avg_llava import Model
from ..model.router import Router
from ..weights.adapters import add_router
from .data import Sample
from .features import FeatureCache
from .feedback import Feedback
from .forward import instruction_embeddings
from .loop import MicroLoss
from .losses import rglf_loss


def initialize(router: Router) -> None:
    """Draw a router's weights as the authors do: Kaiming-normal scorer, normal voter, PyTorch's defaults elsewhere."""
    for layer in (router.scorer.linear1, router.scorer.linear2):
        layer.weight = nn.init.he_normal()(layer.weight, "fan_in", math.sqrt(2))
    router.voter = mx.random.normal(router.voter.shape)
    attention = router.crop_mixer.attention
    D = attention.query_proj.weight.shape[0]
    xavier = math.sqrt(6 / (D + 3 * D))  # of queries, keys and values as the one matrix that PyTorch has
    for projection in (attention.query_proj, attention.key_proj, attention.value_proj):
        projection.weight = mx.random.uniform(-xavier, xavier, projection.weight.shape)
        projection.bias = mx.zeros_like(projection.bias)
    attention.out_proj.bias = mx.zeros_like(attention.out_proj.bias)


def prepare(model: Model, fresh: bool) -> None:
    """Freeze all but the router, which trains in float32. A new one is made if wanted, or if there is none."""
    from mlx_lm.utils import dequantize_model

    if fresh or not model.config.has_router:
        add_router(model)
        initialize(model.router)
    dequantize_model(model.router)
    model.router.set_dtype(mx.float32)
    model.freeze()
    model.eval()
    model.router.unfreeze()
    model.router.train()


@dataclass
class RouterTask:
    """Learn to rank granularities by feedback that was computed beforehand. The language model is not run."""

    model: Model
    samples: Sequence[Sample]
    feedback: Sequence[Feedback]
    held_out: Sequence[Sample]
    held_out_feedback: Sequence[Feedback]
    micro_batch: int
    margin: float
    rank_weight: float
    choice_weight: float
    cache: FeatureCache
    token_cost: float = 0.0  # what all of the finest granularity's visual tokens add to a loss

    def micro_losses(self, samples: Sequence[int], batch: Sequence[int], step: int) -> Iterable[MicroLoss]:
        """Yield a loss for each micro-batch."""
        for start in range(0, len(samples), self.micro_batch):
            chosen = samples[start : start + self.micro_batch]
            rows = [self.feedback[i] for i in chosen]
            yield self._loss([self.samples[i] for i in chosen], rows, len(batch))

    def validate(self) -> float | None:
        """The mean loss of the held-out samples."""
        total = 0.0
        for start in range(0, len(self.held_out), self.micro_batch):
            part = slice(start, start + self.micro_batch)
            total += float(self._loss(self.held_out[part], self.held_out_feedback[part], len(self.held_out))())
        return total if self.held_out else None

    def _loss(self, samples: Sequence[Sample], rows: Sequence[Feedback], count: int) -> MicroLoss:
        seen = [(self.cache.features(s), instruction_embeddings(self.model, s)) for s in samples]
        seen = [(f.astype(mx.float32), text.astype(mx.float32)) for f, text in seen]
        losses = mx.array(np.array([row.losses for row in rows], np.float32) + self.token_cost * self._shares(samples))

        def loss() -> mx.array:
            logits = mx.stack([self.model.route(features, text) for features, text in seen])
            return rglf_loss(logits, losses, self.margin, self.rank_weight, self.choice_weight).sum() / count

        return loss

    def _shares(self, samples: Sequence[Sample]) -> np.ndarray:
        """Each sample's visual tokens at each granularity, as shares of its most: (samples, granularities)."""
        config = self.model.config
        counts = [[config.visual_tokens(g, sample.image_sizes[0]) for g in config.granularities] for sample in samples]
        return np.array(counts, np.float32) / np.max(counts, axis=1, keepdims=True)
