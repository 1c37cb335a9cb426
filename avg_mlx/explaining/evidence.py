"""The router's vote, taken apart exactly: what each position of the pyramid and each kept word adds to it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

import mlx.core as mx
import numpy as np

from ..config import Config
from ..geometry import token_grid
from ..model.router import Router, Scores


@dataclass(frozen=True)
class Word:
    """A token of the prompt that the text filter kept, and its votes."""

    position: int  # in the prompt's token ids, where the image is one placeholder
    id: int
    text: str
    votes: tuple[float, ...]  # for each granularity


@dataclass(frozen=True, eq=False)
class Votes:
    """All that the router's vote for each granularity is the sum of.

    Whatever has a last axis of granularities, or is one number for each of them, has them in the config's order. The
    logits are the votes' sums, normalized: (sums − their mean) / their deviation · weight + bias.
    """

    granularities: tuple[int, ...]
    # For each level of the pyramid: (crops, rows, columns, granularities), the base crop first.
    levels: tuple[np.ndarray, ...] = field(repr=False)
    words: tuple[Word, ...]  # the most similar to the image first
    unfilled: np.ndarray  # (granularities,): of the rows for which a short prompt has no words
    weight: np.ndarray  # (granularities,), the logit norm's
    bias: np.ndarray
    eps: float

    @property
    def sums(self) -> np.ndarray:
        """The votes, before they are normalized: (granularities,)."""
        words = sum((np.array(word.votes) for word in self.words), self.unfilled)
        return words + sum(level.sum(axis=(0, 1, 2)) for level in self.levels)

    @cached_property
    def deviation(self) -> float:
        """What the logit norm divides the votes by."""
        return float(np.sqrt(self.sums.var() + self.eps))

    def evidence(self, choice: int, over: int) -> "Evidence":
        """Tell what speaks for one granularity over another, in logits."""
        first, second = (self.granularities.index(g) for g in (choice, over))

        def difference(votes: np.ndarray) -> np.ndarray:
            """The difference of two maps of votes, as the logit norm weighs them."""
            weighed = (votes - votes.mean(axis=-1, keepdims=True)) / self.deviation * self.weight
            return weighed[..., first] - weighed[..., second]

        return Evidence(
            choice=choice,
            over=over,
            levels=tuple(map(difference, self.levels)),
            words=tuple(float(difference(np.array(word.votes))) for word in self.words),
            unfilled=float(difference(self.unfilled)),
            bias=float(self.bias[first] - self.bias[second]),
        )


@dataclass(frozen=True, eq=False)
class Evidence:
    """What speaks for one granularity over another: numbers whose sum is the difference of their two logits.

    That difference is the logarithm of how many times likelier the router thinks the first.
    """

    choice: int
    over: int
    # For each level of the pyramid: (crops, rows, columns), the base crop first.
    levels: tuple[np.ndarray, ...] = field(repr=False)
    words: tuple[float, ...]  # for each kept word
    unfilled: float
    bias: float  # what the router thinks of the two before it sees anything

    @property
    def image(self) -> float:
        """What the image adds."""
        return float(sum(level.sum() for level in self.levels))

    @property
    def total(self) -> float:
        """The difference of the two logits."""
        return self.image + sum(self.words) + self.unfilled + self.bias


def take_apart(config: Config, router: Router, scores: Scores, words: Sequence[tuple[int, int, str]]) -> Votes:
    """Weigh each score as the vote does.

    words: (position, id, text) of all text tokens of the prompt, of which `scores.kept` says which were kept.
    """
    voter = _numbers(router.voter)
    positions = sum(config.granularities)
    image = _numbers(scores.image) * voter[:positions] / len(scores.image)
    text = (_numbers(scores.text) * voter[positions:]).mean(axis=0)  # (filtered_text_num, granularities)
    ends = np.cumsum(config.granularities)[:-1]
    grids = [token_grid(g, config.vision.patch_grid) for g in config.granularities]
    levels = zip(np.split(image, ends, axis=1), grids, strict=True)
    kept = cast(list[int], scores.kept.tolist())
    return Votes(
        granularities=config.granularities,
        levels=tuple(level.reshape(len(level), *grid, -1) for level, grid in levels),
        words=tuple(Word(*words[i], tuple(row.tolist())) for i, row in zip(kept, text[: len(kept)], strict=True)),
        unfilled=text[len(kept) :].sum(axis=0),
        weight=_numbers(router.logit_norm.weight),
        bias=_numbers(router.logit_norm.bias),
        eps=router.logit_norm.eps,
    )


def _numbers(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)
