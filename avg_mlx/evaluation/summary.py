"""What the results of an evaluation add up to: a summary, and its table in Markdown."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .. import markdown
from .results import Attempt, Result

FEW = 6  # categories, up to which the table has a column for each
TIMES = ("time_to_first_token", "total_time")


def summarize(results: Sequence[Result], settings: Mapping[str, Any], skipped: int) -> dict[str, Any]:
    """Accuracy, visual tokens, time and choices of each mode. Times are also given as ratios to the finest mode's."""
    modes: list[str] = settings["modes"]
    summary = {mode: _summarize_mode(results, mode) for mode in modes}
    finest = str(max(results[0].granularities))
    for one in summary.values():
        for time in TIMES:
            one[f"{time}_ratio"] = one[time] / summary[finest][time] if finest in summary else None
    return {
        "questions": len(results),
        "skipped": skipped,
        "settings": dict(settings),
        "granularities": results[0].granularities,
        "visual_tokens_finest": float(np.mean([result.visual_tokens_finest for result in results])),
        "modes": summary,
    }


def _summarize_mode(results: Sequence[Result], mode: str) -> dict[str, Any]:
    attempts = [result.attempt(mode) for result in results]
    visual_tokens = sum(attempt.visual_tokens for attempt in attempts)
    categories: dict[str, list[Attempt]] = {}
    for result, attempt in zip(results, attempts, strict=True):
        if result.category is not None:
            categories.setdefault(result.category, []).append(attempt)
    levels = sorted(results[0].granularities)
    return {
        "correct": sum(attempt.correct for attempt in attempts),
        "accuracy": _accuracy(attempts),
        "interval": wilson(sum(attempt.correct for attempt in attempts), len(results)),
        "categories": {
            name: {"questions": len(part), "accuracy": _accuracy(part), "shares": _shares(part, levels)}
            for name, part in sorted(categories.items())
        },
        "visual_tokens": visual_tokens / len(results),
        "reduction": 1 - visual_tokens / sum(result.visual_tokens_finest for result in results),
        "time_to_first_token": float(np.mean([result.time_to_first_token(mode) for result in results])),
        "total_time": float(np.mean([result.total_time(mode) for result in results])),
        "shares": _shares(attempts, levels),
    }


def _accuracy(attempts: Sequence[Attempt]) -> float:
    return sum(attempt.correct for attempt in attempts) / len(attempts)


def _shares(attempts: Sequence[Attempt], levels: Sequence[int]) -> dict[str, float]:
    """The share of the attempts that each granularity has."""
    taken = Counter(attempt.granularity for attempt in attempts)
    return {str(g): taken[g] / len(attempts) for g in levels}


def wilson(correct: int, questions: int, z: float = 1.96) -> list[float]:
    """Wilson's 95 % interval of the share of correct answers: [low, high]."""
    p, n = correct / questions, questions
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return [max(0.0, (middle - half) / (1 + z**2 / n)), min(1.0, (middle + half) / (1 + z**2 / n))]


def table(summary: Mapping[str, Any]) -> str:
    """A summary in Markdown: a row for each mode, and what the columns mean."""
    modes, settings = summary["modes"], summary["settings"]
    categories = list(next(iter(modes.values()))["categories"])
    categories = categories if len(categories) <= FEW else []
    levels = sorted(summary["granularities"])
    header = ["mode", "accuracy", "95 % interval", *categories, "visual tokens", "reduction", "first token", "total"]
    rows = [
        [
            mode,
            percent(one["accuracy"]),
            f"{100 * one['interval'][0]:.1f}–{percent(one['interval'][1])}",
            *(percent(one["categories"][name]["accuracy"]) for name in categories),
            f"{one['visual_tokens']:.1f}",
            percent(one["reduction"]),
            *(_ratio(one[f"{time}_ratio"]) for time in TIMES),
            *(percent(one["shares"][str(g)]) if one["shares"][str(g)] else "" for g in levels),
        ]
        for mode, one in modes.items()
    ]
    left_out = f", {summary['skipped']} more left out" if summary["skipped"] else ""
    lines = [f"{summary['questions']} questions{left_out}; seed {settings['seed']}. {_times(modes, str(max(levels)))}"]
    lines += [f"Columns {levels[0]} to {levels[-1]}: how often that granularity was chosen."] if len(levels) > 1 else []
    return "\n".join([markdown.table([*header, *levels], rows), "", *lines]) + "\n"


def _times(modes: Mapping[str, Any], finest: str) -> str:
    if finest not in modes:
        return f"There are no ratios of times, since mode {finest}, to which they would refer, was not asked for."
    first, total = (modes[finest][time] for time in TIMES)
    return (
        "Times to the first token and in total are means, as ratios to those of "
        f"mode {finest}, which are {first:.4f} s and {total:.4f} s."
    )


def percent(share: float) -> str:
    """A share with one decimal."""
    return f"{share:.1%}"


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}×"
