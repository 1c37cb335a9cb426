"""What answers and scores add up to: the paper's two tables, and the same as JSON."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .. import markdown
from ..config import Config
from ..evaluation.modes import ADAPTIVE
from ..evaluation.summary import percent
from .intervals import DRAWS, SEED
from .paper import Benchmark, Metric
from .results import Result
from .scoring import Score

Scores = Mapping[str, Score]


def summarize(
    benchmark: Benchmark, results: Sequence[Result], scores: Mapping[str, Scores], config: Config
) -> dict[str, Any]:
    """A benchmark's scores, visual tokens, time and choices in each mode; `scores` are lmms-eval's, by mode."""
    largest: dict[str, float] = {}
    for name, score in (pair for one in scores.values() for pair in one.items()):
        largest[name] = max(largest.get(name, 0.0), score.value)
    return {
        "title": benchmark.title,
        "questions": len(results),
        "modes": {
            mode: {"scores": _scores(benchmark, one, largest)} | _efficiency(results, mode, config)
            for mode, one in scores.items()
        },
        "paper": {
            "avg_llava": {metric.name: metric.avg_llava for metric in benchmark.metrics if metric.avg_llava},
            "llava_next": {metric.name: metric.llava_next for metric in benchmark.metrics if metric.llava_next},
            "reduction": benchmark.reduction,
            "speed_up": benchmark.speed_up,
        },
    }


def _scores(benchmark: Benchmark, scores: Scores, largest: Mapping[str, float]) -> dict[str, Any]:
    """Those that the benchmark names first, and all others in lmms-eval's own scale: to 1, to 100, or to whatever."""
    named = {metric.name: metric for metric in benchmark.metrics if metric.name in scores}
    highest = {name: next((top for top in (1.0, 100.0) if largest[name] <= top), largest[name]) for name in scores}
    others = {name: Metric(name, name, 1.0, highest[name]) for name in scores if name not in named}
    shown = named or others
    return {name: _score(metric, scores[name], name in shown) for name, metric in (named | others).items()}


def _score(metric: Metric, score: Score, in_table: bool) -> dict[str, Any]:
    interval = score.interval
    return {
        "in_table": in_table,
        "label": metric.label,
        "score": metric.scale * score.value,
        "interval": [metric.scale * interval.low, metric.scale * interval.high] if interval else None,
        "interval_method": interval.method if interval else None,
        "highest": metric.highest,
    }


def _efficiency(results: Sequence[Result], mode: str, config: Config) -> dict[str, Any]:
    """Means over the questions that have an answer, and ratios to the finest granularity's, if that was asked."""
    answered = [result for result in results if result.attempts[mode].problem is None]
    finest, tokens = str(config.finest), sum(result.attempts[mode].visual_tokens for result in answered)
    of_finest = sum(result.visual_tokens_finest for result in answered)
    chosen = Counter(g for result in answered for g in result.attempts[mode].granularities)
    both = [r for r in answered if finest in r.attempts and r.attempts[finest].problem is None]
    return {
        "unanswered": len(results) - len(answered),
        "visual_tokens": tokens / len(answered) if answered else None,
        "reduction": 1 - tokens / of_finest if of_finest else None,
        "time_to_first_token": float(np.mean([r.time_to_first_token(mode) for r in answered])) if answered else None,
        "total_time": float(np.mean([r.total_time(mode) for r in answered])) if answered else None,
        "speed_up": sum(r.total_time(finest) for r in both) / sum(r.total_time(mode) for r in both) if both else None,
        "shares": {
            str(g): chosen[g] / chosen.total() if chosen else 0.0 for g in sorted({*config.granularities, *chosen})
        },
    }


def tables(summary: Mapping[str, Any]) -> str:
    """The paper's two tables in Markdown, what they mean, and which tasks were left out."""
    benchmarks: Mapping[str, Any] = summary["benchmarks"]
    lines = []
    if benchmarks:
        lines = [_score_table(benchmarks, summary["modes"]), "", _efficiency_table(benchmarks, summary["modes"]), ""]
        lines += [
            "In brackets: 95 % intervals, Wilson's of shares of right answers, and otherwise by the bootstrap "
            f"({DRAWS} draws, seed {SEED}). lmms-eval {summary['lmms_eval']} asked and scored.",
            "Reduction of all visual tokens, and speed-up of the mean time of an answer, are against the finest's.",
        ]
    lines += [f"{reason}." for reason in summary["failed"]]
    return "\n".join(lines) + "\n"


def _score_table(benchmarks: Mapping[str, Any], modes: Sequence[str]) -> str:
    rows = []
    for one in benchmarks.values():
        for name, shown in next(iter(one["modes"].values()))["scores"].items():
            if not shown["in_table"]:
                continue
            paper = [_number(one["paper"][whose].get(name)) for whose in ("avg_llava", "llava_next")]
            cells = [_with_interval(one["modes"][mode]["scores"].get(name)) for mode in modes]
            rows.append([f"{one['title']} {shown['label']}".strip(), f"{one['questions']:,}", *cells, *paper])
    return markdown.table(["benchmark", "questions", *modes, "paper: AVG-LLaVA", "paper: LLaVA-NeXT"], rows)


def _efficiency_table(benchmarks: Mapping[str, Any], modes: Sequence[str]) -> str:
    levels = sorted(
        {level for one in benchmarks.values() for mode in modes for level in one["modes"][mode]["shares"]}, key=int
    )
    header = ["benchmark", "mode", "visual tokens", "reduction", "speed-up", "first token", "total", "not answered"]
    rows = []
    for one in benchmarks.values():
        for mode in modes:
            found, paper = one["modes"][mode], one["paper"] if mode == ADAPTIVE else {}
            rows.append(
                [
                    one["title"],
                    mode,
                    _number(found["visual_tokens"]),
                    _percent(found["reduction"]),
                    _ratio(found["speed_up"]),
                    *(_seconds(found[time]) for time in ("time_to_first_token", "total_time")),
                    found["unanswered"] or "",
                    *(_percent(found["shares"].get(level) or None) for level in levels),
                    _percent(paper.get("reduction")),
                    _ratio(paper.get("speed_up")),
                ]
            )
    return markdown.table([*header, *levels, "paper: reduction", "paper: speed-up"], rows, left=2)


def _with_interval(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return ""
    interval, highest = score["interval"], score["highest"]
    between = f" ({_number(interval[0], highest)}–{_number(interval[1], highest)})" if interval else ""
    return _number(score["score"], highest) + between


def _number(value: float | None, highest: float = 100.0) -> str:
    return "" if value is None else f"{value:.1f}" if highest > 1 else f"{value:.3f}"


def _percent(share: float | None) -> str:
    return "" if share is None else percent(share)


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}×"


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.3f} s"
