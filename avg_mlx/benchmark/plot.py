"""Pictures of a run: scores against visual tokens, and what the router chose, for each benchmark."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import plotting
from ..evaluation.modes import ADAPTIVE
from ..evaluation.plot import STYLES, Style, draw_choices, draw_modes, name_modes
from .modes import BUDGET, COST

COLUMNS = 3
DIALLED = (plotting.BLUE, "d", 5, "cost=: the router's choice at a token cost")
BUDGETED = (plotting.PINK, "s", 5, "budget=: the router's choice within a budget")


@plotting.style()
def plot_scores(summary: Mapping[str, Any], picture: Path) -> Path | None:
    """Draw each benchmark's modes as points with their intervals, in shares of the highest score.

    Returns None if nothing was scored, or where the plotting library (the plot extra) is not installed.
    """
    panels = {name: points for name, one in summary["benchmarks"].items() if (points := _points(one))}
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / max(1, columns))
    figure = plotting.new_figure(0.9 + 3.6 * rows, 1 + 4.5 * columns)
    if figure is None or not panels:
        return None
    grid = figure.subplots(rows, columns, squeeze=False)
    styles = {**STYLES, **{mode: style for mode in summary["modes"] if (style := _style(mode))}}
    labels: dict[str, Any] = {}
    for axes, (name, points) in zip(grid.flat, panels.items(), strict=False):
        one = summary["benchmarks"][name]
        axes.set_title(f"{one['title']} ({one['questions']:,} questions)")
        draw_modes(axes, points, styles)
        axes.set_ylabel("score with 95 % interval (linear scale)")
        labels |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=2)
    for axes, points in zip(grid.flat, panels.values(), strict=False):
        name_modes(figure, axes, points, styles)
    return plotting.save(figure, picture)


def _points(one: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens, score and interval of each mode, as shares of the highest score."""
    points = {}
    for mode, found in one["modes"].items():
        score = next(iter(found["scores"].values()), None)
        if score is None or not found["visual_tokens"]:
            continue
        low, high = score["interval"] or (score["score"], score["score"])
        accuracy, *interval = (value / score["highest"] for value in (score["score"], low, high))
        points[mode] = {"visual_tokens": found["visual_tokens"], "accuracy": accuracy, "interval": interval}
    return points


def _style(mode: str) -> Style | None:
    return DIALLED if mode.startswith(COST) else BUDGETED if mode.startswith(BUDGET) else None


def plot_shares(summary: Mapping[str, Any], picture: Path) -> Path | None:
    """Draw how often the router took each granularity: a bar for each benchmark, the coarsest on top.

    Returns None without the router's own choices, or where the plotting library is not installed.
    """
    shares = {
        one["title"]: {"questions": one["questions"], "shares": one["modes"][ADAPTIVE]["shares"]}
        for one in summary["benchmarks"].values()
        if ADAPTIVE in one["modes"] and any(one["modes"][ADAPTIVE]["shares"].values())
    }
    return draw_choices(
        shares, summary["granularities"], "a benchmark's images, the number of whose questions", picture
    )
