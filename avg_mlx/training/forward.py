"""The language model's losses on a sample's answers, without logits that nobody reads."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ..inputs.image import Crops, make_crops
from ..inputs.image_io import read_image
from ..inputs.prompt import PLACEHOLDER_ID
from ..model.avg_llava import Model
from .data import IGNORED, Sample
from .losses import token_losses

BUCKET = 32  # positions: inputs are padded to multiples, so that few different sizes occur


def load_crops(model: Model, sample: Sample) -> list[Crops]:
    """The sample's images, cut."""
    return [make_crops(read_image(file), model.config) for file in sample.images]


def embed(
    model: Model, sample: Sample, features: Sequence[mx.array], crops: Sequence[Crops], granularity: int
) -> mx.array:
    """The language model's input with all images at `granularity`: (positions, D)."""
    visual_tokens = [model.pack(f, granularity, c) for f, c in zip(features, crops, strict=True)]
    return model.splice(sample.ids, model.embed_text(sample.ids), visual_tokens)


def answer_positions(sample: Sample, visual_tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(positions that predict an answer's token, those tokens), given how many tokens each image takes."""
    lengths = np.ones(len(sample.ids), dtype=np.int64)
    lengths[np.array(sample.ids) == PLACEHOLDER_ID] = visual_tokens
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
    """The losses of all answer tokens of several samples in one pass, in order: (tokens,).

    Inputs are padded on the right, where causal attention does not see it. The head runs on answer positions only.
    """
    inputs, rows, columns, targets = [], [], [], []
    for row, (sample, f, c) in enumerate(zip(samples, features, crops, strict=True)):
        inputs.append(embed(model, sample, f, c, granularity))
        positions, labels = answer_positions(sample, [model.config.visual_tokens(granularity, x.image_size) for x in c])
        rows += [row] * len(positions)
        columns += positions.tolist()
        targets += labels.tolist()
    length = -(-max(map(len, inputs)) // BUCKET) * BUCKET
    hidden = model.hidden(mx.stack([mx.pad(x, [(0, length - len(x)), (0, 0)]) for x in inputs]))
    logits = model.head(hidden[mx.array(rows), mx.array(columns)])
    return token_losses(logits, mx.array(targets))


def feedback_losses(model: Model, sample: Sample, features: Sequence[mx.array], crops: Sequence[Crops]) -> list[float]:
    """The mean loss of a sample's answer tokens at every granularity, in the config's order.

    What stands before the first image is the same each time: it passes the language model once, and its keys and
    values are kept.
    """
    from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

    prefix = sample.ids.index(PLACEHOLDER_ID)
    cache = make_prompt_cache(model.language_model)
    before = model.hidden(model.embed_text(sample.ids[:prefix])[None], cache)[0]
    means = []
    for granularity in model.config.granularities:
        rest = embed(model, sample, features, crops, granularity)[prefix:]
        sizes = [model.config.visual_tokens(granularity, x.image_size) for x in crops]
        positions, labels = answer_positions(sample, sizes)
        early = positions < prefix  # answers to turns before the first image
        after = model.hidden(rest[None], cache)[0, mx.array(positions[~early] - prefix)]
        hidden = mx.concatenate([before[mx.array(positions[early])], after])
        means.append(token_losses(model.head(hidden), mx.array(labels)).mean())
        mx.eval(means)
        trim_prompt_cache(cache, len(rest))
    return np.array(mx.stack(means)).tolist()


def instruction_embeddings(model: Model, sample: Sample) -> mx.array:
    """What the router may read in training: the text that is not to be learned (as trained), (tokens, D)."""
    pairs = zip(sample.ids, sample.labels, strict=True)
    return model.embed_text([i for i, label in pairs if label == IGNORED])
