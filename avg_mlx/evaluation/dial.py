"""The dial: what the router would have taken at other token costs, from answers that are there already."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .. import markdown
from ..errors import InputError
from .modes import ADAPTIVE
from .results import Result
from .summary import percent, wilson

# Costs that a curve is drawn through and a target is sought among: 0, and two digits from 0.0001 to below 100.
COSTS = (0.0, *(float(f"{digits}e{power}") for power in range(-5, 1) for digits in range(10, 100, 5)))


@dataclass(frozen=True)
class Dial:
    """Every question's answers at every granularity, and the router's probabilities: (questions, granularities)."""

    granularities: tuple[int, ...]
    probabilities: np.ndarray
    tokens: np.ndarray
    correct: np.ndarray

    @classmethod
    def of(cls, results: Sequence[Result]) -> "Dial":
        """Read what an evaluation found. Raises InputError if it lacks a granularity or the router."""
        levels = results[0].granularities
        attempts = [{attempt.granularity: attempt for attempt in result.attempts} for result in results]
        absent = sorted({g for one in attempts for g in levels if g not in one})
        if absent or any(result.router is None for result in results):
            lacking = ", ".join([ADAPTIVE] * any(result.router is None for result in results) + list(map(str, absent)))
            raise InputError(f"token costs are compared by answers of all modes, and {lacking} are missing; add them")
        return cls(
            tuple(levels),
            np.array([result.router for result in results]),
            np.array([[one[g].visual_tokens for g in levels] for one in attempts]),
            np.array([[one[g].correct for g in levels] for one in attempts]),
        )

    def choices(self, token_cost: float) -> np.ndarray:
        """The number of the granularity that each question takes, among `granularities`."""
        if token_cost == 0:  # to the bit what the router takes
            return self.probabilities.argmax(axis=1)
        with np.errstate(divide="ignore"):
            scores = np.log(self.probabilities)
        return (scores - token_cost * self.tokens / self.tokens.max(axis=1, keepdims=True)).argmax(axis=1)

    def at(self, token_cost: float) -> dict[str, Any]:
        """Accuracy, visual tokens and choices at a token cost."""
        choices = self.choices(token_cost)
        rows, questions = np.arange(len(choices)), len(choices)
        correct, tokens = int(self.correct[rows, choices].sum()), int(self.tokens[rows, choices].sum())
        taken = Counter(self.granularities[choice] for choice in choices)
        return {
            "token_cost": token_cost,
            "accuracy": correct / questions,
            "interval": wilson(correct, questions),
            "visual_tokens": tokens / questions,
            "reduction": 1 - tokens / int(self.tokens.max(axis=1).sum()),
            "shares": {str(g): taken[g] / questions for g in sorted(self.granularities)},
        }

    @cached_property
    def sweep(self) -> list[dict[str, Any]]:
        """What is `at` each of COSTS."""
        return [self.at(cost) for cost in COSTS]

    def reach_accuracy(self, share: float) -> dict[str, Any]:
        """Return what is at the highest of COSTS whose accuracy is at least `share`; InputError if there is none."""
        reached = [one for one in self.sweep if one["accuracy"] >= share]
        if not reached:
            best = max(one["accuracy"] for one in self.sweep)
            raise InputError(f"no token cost reaches an accuracy of {share:g}; the best is {best:.4f}")
        return reached[-1]

    def reach_tokens(self, count: float) -> dict[str, Any]:
        """Return what is at the lowest of COSTS that takes at most `count` visual tokens; InputError if none does."""
        reached = [one for one in self.sweep if one["visual_tokens"] <= count]
        if not reached:
            least = min(one["visual_tokens"] for one in self.sweep)
            raise InputError(f"no token cost comes down to {count:g} visual tokens; the fewest are {least:.1f}")
        return reached[0]


def turned(
    results: Sequence[Result], token_costs: Sequence[float], accuracy: float | None, tokens: float | None
) -> dict[str, Any]:
    """What a summary says of the dial: `costs` as asked, `targets` and what reaches them, and the whole `curve`."""
    dial = Dial.of(results)
    targets = {}
    if accuracy is not None:
        targets[f"an accuracy of at least {accuracy}"] = _or_why_not(dial.reach_accuracy, accuracy)
    if tokens is not None:
        targets[f"at most {tokens} visual tokens"] = _or_why_not(dial.reach_tokens, tokens)
    curve = dict.fromkeys((one["visual_tokens"], one["accuracy"]) for one in dial.sweep)
    return {"costs": [dial.at(cost) for cost in token_costs], "targets": targets, "curve": list(map(list, curve))}


def _or_why_not(reach: Callable[[float], dict[str, Any]], target: float) -> dict[str, Any] | str:
    """The setting that reaches a target, or why none does."""
    try:
        return reach(target)
    except InputError as error:
        return str(error)


def dial_table(dial: Mapping[str, Any]) -> str:
    """The dial in Markdown: a row for each token cost, and what reaches the targets."""
    reached = {target: one for target, one in dial["targets"].items() if isinstance(one, dict)}
    settings = {one["token_cost"]: one for one in (*dial["costs"], *reached.values())}
    lines = [f"--token-cost {one['token_cost']:g} gives {target}." for target, one in reached.items()]
    lines += [f"{one}." for one in dial["targets"].values() if isinstance(one, str)]
    if settings:
        levels = list(next(iter(settings.values()))["shares"])
        header = ["token cost", "accuracy", "95 % interval", "visual tokens", "reduction", *levels]
        lines = [markdown.table(header, [_row(one) for _, one in sorted(settings.items())]), "", *lines]
    return "\n".join(lines).rstrip() + "\n"


def _row(one: Mapping[str, Any]) -> list[str]:
    low, high = one["interval"]
    return [
        f"{one['token_cost']:g}",
        percent(one["accuracy"]),
        f"{100 * low:.1f}–{percent(high)}",
        f"{one['visual_tokens']:.1f}",
        percent(one["reduction"]),
        *(percent(share) if share else "" for share in one["shares"].values()),
    ]
