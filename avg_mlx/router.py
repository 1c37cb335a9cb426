"""The visual granularity router: pyramid + instruction → one logit per granularity.

Ported from AVG-LLaVA (arXiv 2410.02745, section 3.2) as its weights were trained.
"""

import mlx.core as mx
import mlx.nn as nn

from .config import Config

HEADS = 8  # of the crop mixer; the authors fixed it
DROPOUT = 0.1


def text_filter(text: mx.array, base_features: mx.array, count: int) -> mx.array:
    """Keep the text tokens that resemble the image most.

    text: (tokens, D) embeddings of the whole prompt but the image; base_features: (patches, D) of the base crop.
    Returns (count, D), zero rows where the prompt is shorter. As trained: in order of falling similarity, not of
    reading.
    """
    # The mean of cosines is the cosine's numerator with the mean of unit vectors: one product instead of many.
    direction = _unit(base_features.astype(mx.float32)).mean(axis=0)
    similarity = _unit(text.astype(mx.float32)) @ direction  # (tokens,)
    kept = text[mx.argsort(-similarity)[:count]]
    return mx.pad(kept, [(0, count - kept.shape[0]), (0, 0)])


def _unit(x: mx.array) -> mx.array:
    return x / mx.maximum(mx.linalg.norm(x, axis=-1, keepdims=True), 1e-8)


class CropAttention(nn.MultiHeadAttention):
    """Self-attention whose weights drop out in training, as PyTorch's encoder layer has it."""

    def __init__(self, D: int):
        super().__init__(D, HEADS, bias=True)
        self.dropout = nn.Dropout(DROPOUT)

    def __call__(self, x: mx.array) -> mx.array:  # type: ignore[override]
        if not self.training:
            return super().__call__(x, x, x)
        projections = (self.query_proj, self.key_proj, self.value_proj)
        q, k, v = (mx.unflatten(p(x), -1, (HEADS, -1)).swapaxes(1, 2) for p in projections)
        weights = mx.softmax(q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5, axis=-1)
        return self.out_proj((self.dropout(weights) @ v).swapaxes(1, 2).flatten(-2))


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

    def __call__(self, x: mx.array) -> mx.array:
        """(positions, crops, D) → the same."""
        x = self.norm1(x + self.dropout(self.attention(x)))
        y = self.linear2(self.dropout(nn.relu(self.linear1(x))))
        return self.norm2(x + self.dropout(y))


class Scorer(nn.Module):
    """Scores every position by itself: (…, D) → (…, granularities)."""

    def __init__(self, D: int, granularities: int):
        super().__init__()
        self.linear1 = nn.Linear(D, D)
        self.linear2 = nn.Linear(D, granularities)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear2(nn.gelu(self.linear1(x)))


class Router(nn.Module):
    """Text filter → crop mixer → scorer → vote → mean over crops → logit norm."""

    def __init__(self, config: Config):
        super().__init__()
        self.filtered_text_num = config.filtered_text_num
        self.crop_mixer = CropMixer(config.hidden_size)
        self.scorer = Scorer(config.hidden_size, len(config.granularities))
        self.voter = mx.zeros((config.voter_size, 1))
        self.logit_norm = nn.LayerNorm(len(config.granularities))

    def __call__(self, pyramid: dict[int, mx.array], features: mx.array, text: mx.array) -> mx.array:
        """pyramid: {g: (crops, g, D)} in the config's order; features: (crops, patches, D); text: (tokens, D).

        Returns (granularities,) logits for the whole image.
        """
        filtered = text_filter(text, features[0], self.filtered_text_num).astype(features.dtype)
        filtered = mx.broadcast_to(filtered, (len(features), *filtered.shape))
        x = mx.concatenate([*pyramid.values(), filtered], axis=1)  # (crops, positions, D)
        x = self.crop_mixer(x.swapaxes(0, 1))  # (positions, crops, D)
        scores = self.scorer(x)  # (positions, crops, granularities)
        votes = (scores * self.voter[:, None]).sum(axis=0)  # (crops, granularities)
        return self.logit_norm(votes.mean(axis=0))
