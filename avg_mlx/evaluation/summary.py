"""What the results of an evaluation say in all: a summary, and its table in Markdown."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .answering import Attempt, Result

FEW = 6  # categories that still have their columns in the table


def summarize(results: Sequence[Result], settings: Mapping[str, Any], skipped: int) -> dict[str, Any]:
    """Accuracy, visual tokens, time and choices of each mode; times also as ratios of the finest granularity's."""
    modes: list[str] = settings["modes"]
    summary = {mode: _summarize_mode(results, mode) for mode in modes}
    finest = str(max(results[0].granularities))
    for one in summary.values():
        for time in ("time_to_first_token", "total_time"):
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
    """How often each granularity was taken."""
    taken = Counter(attempt.granularity for attempt in attempts)
    return {str(g): taken[g] / len(attempts) for g in levels}


def wilson(correct: int, questions: int, z: float = 1.96) -> list[float]:
    """Wilson's 95 % interval of a share: [low, high]."""
    p, n = correct / questions, questions
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return [max(0.0, (middle - half) / (1 + z**2 / n)), min(1.0, (middle + half) / (1 + z**2 / n))]


def table(summary: Mapping[str, Any]) -> str:
    """A summary in Markdown, a line for each mode."""
    modes, settings = summary["modes"], summary["settings"]
    some = next(iter(modes.values()))
    categories = list(some["categories"]) if len(some["categories"]) <= FEW else []
    levels = sorted(summary["granularities"])
    header = ["mode", "accuracy", "95 % interval", *categories, "visual tokens", "reduction", "first token", "total"]
    rows = [[*header, *map(str, levels)], ["---"] + ["---:"] * (len(header) - 1 + len(levels))]
    for mode, one in modes.items():
        rows.append(
            [
                mode,
                _percent(one["accuracy"]),
                f"{100 * one['interval'][0]:.1f}–{_percent(one['interval'][1])}",
                *(_percent(one["categories"][name]["accuracy"]) for name in categories),
                f"{one['visual_tokens']:.1f}",
                _percent(one["reduction"]),
                *(_ratio(one[f"{time}_ratio"]) for time in ("time_to_first_token", "total_time")),
                *(_percent(one["shares"][str(g)]) if one["shares"][str(g)] else "" for g in levels),
            ]
        )
    left_out = f", {summary['skipped']} more left out" if summary["skipped"] else ""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", f"{summary['questions']} questions{left_out}; seed {settings['seed']}. {_times(modes, max(levels))}"]
    lines += [f"Columns {levels[0]} to {levels[-1]}: how often that granularity was chosen."] if len(levels) > 1 else []
    return "\n".join(lines) + "\n"


def _times(modes: Mapping[str, Any], finest: int) -> str:
    if str(finest) not in modes:
        return f"Times have nothing to be compared with: mode {finest} is not among these."
    one = modes[str(finest)]
    return (
        f"Times, to the first token and in all, are means as ratios of mode {finest}'s, "
        f"which took {one['time_to_first_token']:.4f} s and {one['total_time']:.4f} s."
    )


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}×"
