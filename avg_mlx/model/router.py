"""The visual granularity router: from features and instruction to one logit per granularity.

Ported from AVG-LLaVA (arXiv 2410.02745, section 3.2) as its weights were trained.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..config import Config

Pool = Callable[[mx.array], mx.array]  # (crops, tokens, D) → (crops, positions, D); a position averages tokens

HEADS = 8  # attention heads of the crop mixer; the authors' code fixes the number
DROPOUT = 0.1


def text_filter(text: mx.array, base_features: mx.array, count: int) -> mx.array:
    """Keep the text tokens that resemble the image most.

    text: (tokens, D), the embeddings of the whole prompt without the image. base_features: (patches, D), the features
    of the base crop. Returns (count, D); missing rows are zero where the prompt is shorter. As trained, the rows stand
    in order of falling similarity, not in reading order.
    """
    return _filled(text[most_similar(text, base_features, count)], count)


def most_similar(text: mx.array, base_features: mx.array, count: int) -> mx.array:
    """Return which text tokens the filter keeps, in its order: `count` of them, or all of a shorter prompt."""
    # The mean of the cosines is one product with the mean of the unit vectors.
    direction = _unit(base_features.astype(mx.float32)).mean(axis=0)
    similarity = _unit(text.astype(mx.float32)) @ direction  # (tokens,)
    return mx.argsort(-similarity)[:count]


def _filled(kept: mx.array, count: int) -> mx.array:
    return mx.pad(kept, [(0, count - kept.shape[0]), (0, 0)])


def _unit(x: mx.array) -> mx.array:
    return x / mx.maximum(mx.linalg.norm(x, axis=-1, keepdims=True), 1e-8)


class CropAttention(nn.MultiHeadAttention):
    """Self-attention across crops, separately for each position. In training its weights drop out, as PyTorch's do."""

    def __init__(self, D: int):
        super().__init__(D, HEADS, bias=True)
        self.dropout = nn.Dropout(DROPOUT)

    def __call__(self, x: mx.array, pool: Pool) -> mx.array:  # type: ignore[override]
        projections = (self.query_proj, self.key_proj, self.value_proj)
        q, k, v = (mx.unflatten(pool(p(x)), -1, (HEADS, -1)).transpose(1, 2, 0, 3) for p in projections)
        weights = mx.softmax((q * q.shape[-1] ** -0.5) @ k.swapaxes(-1, -2), axis=-1, precise=True)
        mixed = self.dropout(weights) @ v  # (positions, heads, crops, D / heads)
        return self.out_proj(mixed.transpose(2, 0, 1, 3).flatten(-2))


class CropMixer(nn.Module):
    """A post-norm Transformer layer. As trained: each position attends to itself in the image's other crops."""

    def __init__(self, D: int):
        super().__init__()
        self.attention = CropAttention(D)
        self.linear1 = nn.Linear(D, D)
        self.linear2 = nn.Linear(D, D)
        self.norm1 = nn.LayerNorm(D)
        self.norm2 = nn.LayerNorm(D)
        self.dropout = nn.Dropout(DROPOUT)

    def __call__(self, x: mx.array, pool: Pool) -> mx.array:
        """Apply the layer to the pooled tokens: (crops, tokens, D) → (crops, positions, D).

        The projection of an average is the average of the projections, so attention projects before it pools, which
        takes fewer rows.
        """
        x = self.norm1(pool(x) + self.dropout(self.attention(x, pool)))
        y = self.linear2(self.dropout(nn.relu(self.linear1(x))))
        return self.norm2(x + self.dropout(y))


class Scorer(nn.Module):
    """Scores each position separately: (…, D) → (…, granularities)."""

    def __init__(self, D: int, granularities: int):
        super().__init__()
        self.linear1 = nn.Linear(D, D)
        self.linear2 = nn.Linear(D, granularities)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear2(nn.gelu(self.linear1(x)))


@dataclass(frozen=True)
class Scores:
    """What the scorer gives each position for every granularity, before positions are weighed."""

    kept: mx.array  # (kept,): which text tokens the filter kept, in its order
    image: mx.array  # (crops, positions of the pyramid, granularities)
    text: mx.array  # (readers, filtered_text_num, granularities); rows after the kept ones have no token


class Router(nn.Module):
    """Runs text filter → crop mixer → scorer → mean over crops → vote → logit norm."""

    def __init__(self, config: Config):
        super().__init__()
        self.filtered_text_num = config.filtered_text_num
        self.crop_mixer = CropMixer(config.hidden_size)
        self.scorer = Scorer(config.hidden_size, len(config.granularities))
        self.voter = mx.zeros((config.voter_size, 1))
        self.logit_norm = nn.LayerNorm(len(config.granularities))

    def __call__(self, features: mx.array, text: mx.array, pool: Pool) -> mx.array:
        """Return one logit per granularity for the whole image, (granularities,).

        features: (crops, patches, D), which `pool` turns into the pyramid. text: (tokens, D).
        """
        return self.vote(self.score(features, text, pool))

    def score(self, features: mx.array, text: mx.array, pool: Pool) -> Scores:
        """Score every position of the pyramid in each crop, and of the kept text; parameters as for a call."""
        kept = most_similar(text, features[0], self.filtered_text_num)
        filtered = _filled(text[kept], self.filtered_text_num).astype(features.dtype)
        # Every crop reads the same text with the same result, so one crop stands for all. With dropout results differ.
        readers = len(features) if self.training else 1
        filtered = mx.broadcast_to(filtered, (readers, *filtered.shape))
        image = self.scorer(self.crop_mixer(features, pool))
        return Scores(kept, image, self.scorer(self.crop_mixer(filtered, lambda x: x)))

    def vote(self, scores: Scores) -> mx.array:
        """Turn scores into logits, (granularities,): the voter's weighted sum of their means over crops, normalized."""
        means = mx.concatenate([x.mean(axis=0) for x in (scores.image, scores.text)])  # (positions, granularities)
        return self.logit_norm((means * self.voter).sum(axis=0))
