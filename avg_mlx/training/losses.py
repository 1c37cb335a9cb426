"""The losses, as pure functions. Formulas: AVG-LLaVA (arXiv 2410.02745), section 3.3, as its code computes them."""

import mlx.core as mx
import mlx.nn as nn


def token_losses(logits: mx.array, targets: mx.array) -> mx.array:
    """Cross-entropy of each target: (tokens, vocabulary) and (tokens,) → (tokens,) in float32."""
    return nn.losses.cross_entropy(logits.astype(mx.float32), targets)


def ranking_loss(logits: mx.array, feedback: mx.array, margin: float = 1.0) -> mx.array:
    """How far the router ranks granularities otherwise than the language model's losses do: (samples,).

    logits, feedback: (samples, granularities). A better granularity's log-probability is to exceed a worse one's by
    the difference of their losses. As trained: that margin is multiplied by how many ranks lie between them too.
    """
    order = mx.argsort(feedback, axis=-1)
    losses = mx.take_along_axis(feedback, order, axis=-1)
    scores = nn.log_softmax(mx.take_along_axis(logits, order, axis=-1), axis=-1)
    total = mx.zeros(len(logits))
    for apart in range(1, logits.shape[-1]):
        margins = margin * apart * (losses[:, apart:] - losses[:, :-apart])
        total = total + nn.relu(scores[:, apart:] - scores[:, :-apart] + margins).mean(axis=-1)
    return total


def choice_loss(logits: mx.array, feedback: mx.array) -> mx.array:
    """Cross-entropy of the router's choice against the granularity of least loss: (samples,)."""
    return nn.losses.cross_entropy(logits, mx.argmin(feedback, axis=-1))


def rglf_loss(
    logits: mx.array, feedback: mx.array, margin: float = 1.0, rank_weight: float = 1.0, choice_weight: float = 0.1
) -> mx.array:
    """The router's training loss of each sample: (samples,)."""
    return rank_weight * ranking_loss(logits, feedback, margin) + choice_weight * choice_loss(logits, feedback)
