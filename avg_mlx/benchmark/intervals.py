"""95 % intervals of lmms-eval's scores, from what it knows of each question."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..evaluation.summary import wilson

DRAWS, SEED = 2000, 0
Method = Literal["Wilson", "bootstrap"]


@dataclass(frozen=True)
class Interval:
    """Where a score lies with 95 % confidence."""

    low: float
    high: float
    method: Method


def interval_of(metric: str, score: float, items: Sequence[Any], papers: bool = True) -> Interval | None:
    """The interval of a score.

    items: what lmms-eval says of each question under the metric's name, of which it makes the score. papers: whether
    the task is one of the paper's; others may have a metric of the same name. Shares of right answers have Wilson's
    interval; means of other numbers, MME's sums and F1 are drawn again DRAWS times, with a seed. Returns None where it
    is not known how the score comes about.
    """
    if papers and metric in SPECIAL:
        return SPECIAL[metric](score, items)
    values: list[Any] = [item.get("score") if isinstance(item, dict) else item for item in items]
    if not values or not all(isinstance(value, int | float) for value in values):
        return None
    if not math.isclose(np.mean(values), score, rel_tol=1e-4, abs_tol=1e-6):
        return None
    if set(values) <= {0, 1}:
        return _share(sum(values), len(values))
    return _bootstrap([np.array(values, float)])


def _share(right: float, questions: int, scale: float = 1.0) -> Interval:
    low, high = wilson(round(right), questions)
    return Interval(scale * low, scale * high, "Wilson")


def _bootstrap(parts: Sequence[np.ndarray]) -> Interval:
    """Of the sum of the parts' means, each part drawn again by itself."""
    random = np.random.default_rng(SEED)
    totals = [sum(part[random.integers(0, len(part), len(part))].mean() for part in parts) for _ in range(DRAWS)]
    return _middle(np.array(totals))


def _middle(draws: np.ndarray) -> Interval:
    low, high = np.quantile(draws, (0.025, 0.975))
    return Interval(float(low), float(high), "bootstrap")


def _mme(score: float, items: Sequence[Any]) -> Interval:
    """The two questions about an image count together, and the categories' means are added."""
    pairs: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for item in items:
        pairs[item["category"]][item["question_id"]].append(item["score"])
    points = [
        np.array([100 * np.mean(pair) + 100 * (sum(pair) == len(pair)) for pair in category.values()])
        for category in pairs.values()
    ]
    return _bootstrap(points)


def _f1(score: float, items: Sequence[Any]) -> Interval:
    """Of the answer yes."""
    kinds = Counter((item["ground_truth"], item["prediction"]) for item in items)
    cells = [kinds["yes", "yes"], kinds["no", "yes"], kinds["yes", "no"]]
    shares = np.array([*cells, len(items) - sum(cells)]) / len(items)
    both, wrong, missed, _ = np.random.default_rng(SEED).multinomial(len(items), shares, DRAWS).T
    return _middle(2 * both / np.maximum(2 * both + wrong + missed, 1))


def _mmbench(score: float, items: Sequence[Any]) -> Interval:
    """A question is right if it is in all orders of its choices; only the first has a number below a million."""
    questions = sum(item["index"] < 1_000_000 for item in items)
    return _share(score / 100 * questions, questions, 100.0)


SPECIAL: dict[str, Callable[[float, Sequence[Any]], Interval]] = {
    "mme_perception_score": _mme,
    "mme_cognition_score": _mme,
    "pope_f1_score": _f1,
    "gpt_eval_score": _mmbench,
    "mmmu_acc": lambda score, items: _share(score * len(items), len(items)),
}
