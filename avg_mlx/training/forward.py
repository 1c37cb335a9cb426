"""The language model's losses on a sample's answers, without logits that nobody reads."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ..errors import InputError
from ..inference.steps import Seen, read_crops
from ..inputs.image import Crops
from ..inputs.prompt import PLACEHOLDER_ID
from ..model.avg_llava import Model
from .data import IGNORED, Sample
from .losses import token_losses

BUCKET = 32  # positions: inputs are padded to multiples, so that few different sizes occur


def load_crops(model: Model, sample: Sample) -> list[Crops]:
    """Read and cut the sample's images. Raises InputError that names the sample if one cannot be read."""
    try:
        return read_crops(sample.images, model.config)
    except InputError as error:
        raise InputError(f"sample {sample.id}: {error}") from error


def seen_sample(model: Model, sample: Sample, features: Sequence[mx.array], crops: Sequence[Crops]) -> Seen:
    """Put a sample, answers included, into the form in which generation has its prompts."""
    return Seen(sample.ids, model.embed_text(sample.ids), tuple(crops), tuple(features))


def answer_positions(model: Model, sample: Sample, granularity: int) -> tuple[np.ndarray, np.ndarray]:
    """(positions that predict an answer's token, those tokens) with all images at `granularity`."""
    lengths = np.ones(len(sample.ids), dtype=np.int64)
    lengths[np.array(sample.ids) == PLACEHOLDER_ID] = [
        model.config.visual_tokens(granularity, size) for size in sample.image_sizes
    ]
    labels = np.array(sample.labels)
    positions = np.cumsum(lengths) - lengths
    learned = labels != IGNORED
    return positions[learned] - 1, labels[learned]


def answer_losses(
    model: Model,
    samples: Sequence[Sample],
    features: Sequence[Sequence[mx.array]],
    crops: Sequence[Sequence[Crops]],
    granularity: int,
) -> mx.array:
    """Compute the losses of all answer tokens of several samples in one pass: (tokens,), in order.

    Inputs are padded on the right, where causal attention does not see it. The head runs on answer positions only.
    """
    inputs, rows, columns, targets = [], [], [], []
    for row, (sample, f, c) in enumerate(zip(samples, features, crops, strict=True)):
        inputs.append(seen_sample(model, sample, f, c).embeddings(model, [granularity] * len(c)))
        positions, labels = answer_positions(model, sample, granularity)
        rows += [row] * len(positions)
        columns += positions.tolist()
        targets += labels.tolist()
    length = -(-max(map(len, inputs)) // BUCKET) * BUCKET
    hidden = model.hidden(mx.stack([mx.pad(x, [(0, length - len(x)), (0, 0)]) for x in inputs]))
    logits = model.head(hidden[mx.array(rows), mx.array(columns)])
    return token_losses(logits, mx.array(targets))


def feedback_losses(model: Model, sample: Sample, features: Sequence[mx.array], crops: Sequence[Crops]) -> list[float]:
    """Compute the mean loss of a sample's answer tokens at every granularity, in the config's order.

    The text before the first image is the same each time: it passes the language model once, and its keys and values
    are kept.
    """
    from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

    prefix = sample.ids.index(PLACEHOLDER_ID)
    cache = make_prompt_cache(model.language_model)
    seen = seen_sample(model, sample, features, crops)
    before = model.hidden(seen.text[:prefix][None], cache)[0] if prefix else seen.text[:0]
    means = []
    for granularity in model.config.granularities:
        rest = seen.embeddings(model, [granularity] * len(crops))[prefix:]
        positions, labels = answer_positions(model, sample, granularity)
        early = positions < prefix  # answers to turns before the first image
        after = model.hidden(rest[None], cache)[0, mx.array(positions[~early] - prefix)]
        hidden = mx.concatenate([before[mx.array(positions[early])], after])
        means.append(token_losses(model.head(hidden), mx.array(labels)).mean())
        mx.eval(means)
        trim_prompt_cache(cache, len(rest))
    return np.array(mx.stack(means)).tolist()


def instruction_embeddings(model: Model, sample: Sample) -> mx.array:
    """Embed what the router may read in training, which is the text that is not learned (as trained): (tokens, D)."""
    pairs = zip(sample.ids, sample.labels, strict=True)
    return model.embed_text([i for i, label in pairs if label == IGNORED])
