"""How well the router knows what it knows: how often its choice is as good as the finest, by its confidence."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .. import markdown
from .modes import ADAPTIVE
from .results import Result
from .summary import percent, wilson

BINS = 10  # of confidence, from 0 to 1


def calibrate(results: Sequence[Result], modes: Sequence[str]) -> dict[str, Any] | None:
    """Compare the router's confidence in its choice with how often that choice answers as well as the finest.

    Also tells its regret, which is how much more loss its choice has than the best granularity, on average, and the
    regret of a choice drawn by its probabilities. Returns None unless the adaptive and the finest mode were asked.
    """
    finest = str(max(results[0].granularities))
    if ADAPTIVE not in modes or finest not in modes:
        return None
    probabilities = np.array([result.router for result in results])
    confidence = probabilities.max(axis=1)
    as_good = np.array([result.attempt(ADAPTIVE).correct >= result.attempt(finest).correct for result in results])
    bins = []
    number = np.minimum((confidence * BINS).astype(int), BINS - 1)
    for n in sorted(set(number.tolist())):
        inside = number == n
        bins.append(
            {
                "from": n / BINS,
                "to": (n + 1) / BINS,
                "questions": int(inside.sum()),
                "confidence": float(confidence[inside].mean()),
                "as_good": float(as_good[inside].mean()),
                "interval": wilson(int(as_good[inside].sum()), int(inside.sum())),
            }
        )
    error = sum(one["questions"] * abs(one["as_good"] - one["confidence"]) for one in bins) / len(results)
    summary = {
        "bins": bins,
        "confidence": float(confidence.mean()),
        "as_good": float(as_good.mean()),
        "expected_calibration_error": error,
        "regret": None,
        "expected_regret": None,
    }
    if all(result.losses is not None for result in results):
        losses = np.array([result.losses for result in results])
        lost = losses - losses.min(axis=1, keepdims=True)
        summary["regret"] = float(lost[np.arange(len(lost)), probabilities.argmax(axis=1)].mean())
        summary["expected_regret"] = float((probabilities * lost).sum(axis=1).mean())
    return summary


def calibration_table(calibration: Mapping[str, Any]) -> str:
    """The calibration in Markdown: a row for each bin of confidence."""
    rows = [
        [
            f"{one['from']:.0%}–{one['to']:.0%}",
            one["questions"],
            percent(one["confidence"]),
            percent(one["as_good"]),
            f"{100 * one['interval'][0]:.1f}–{percent(one['interval'][1])}",
        ]
        for one in calibration["bins"]
    ]
    header = ["the router's confidence", "questions", "on average", "as good as the finest", "95 % interval"]
    as_good, confidence = percent(calibration["as_good"]), percent(calibration["confidence"])
    told = f"The router's choice is as good as the finest {as_good} of the time, at a mean confidence of {confidence}; "
    told += f"expected calibration error {calibration['expected_calibration_error']:.3f}."
    if calibration["regret"] is not None:
        told += f" Regret {calibration['regret']:.4f}; expected regret {calibration['expected_regret']:.4f}."
    return f"{markdown.table(header, rows)}\n\n{told}\n"
