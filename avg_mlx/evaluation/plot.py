"""Pictures of an evaluation: accuracy against visual tokens, and what the router chose."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import plotting
from ..plotting import BLUE, GREEN, GREY, RED
from .labels import Box, Point, along, place
from .modes import ADAPTIVE, ORACLE, RANDOM

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKER = 11  # points; a label keeps that far from every mode
LEADER = 6  # points between marker and label from which on a line joins them
WIDE = 0.065  # share of a bar from which on its number stands inside
# Colours, shapes for print, and what the legend says.
Style = tuple[str, str, int, str]
STYLES: dict[str, Style] = {
    ADAPTIVE: (BLUE, "D", 8, "adaptive: the router's choice"),
    RANDOM: (RED, "^", 9, "random: a choice by chance"),
    ORACLE: (GREEN, "*", 13, "oracle: the choice of least loss"),
}
DIAL = "the dial: the router's choice at other token costs"
FIXED = "one granularity for all: visual tokens per crop"


@plotting.style()
def plot_accuracy(summary: Mapping[str, Any], picture: Path) -> Path | None:
    """Draw each mode of a summary as a point with its interval.

    Returns None where the plotting library (the plot extra) is not installed.
    """
    figure = plotting.new_figure(5.2)
    if figure is None:
        return None
    axes = figure.subplots()
    axes.set_title(f"{summary['questions']:,} questions")
    draw_modes(axes, summary["modes"], STYLES, summary.get("dial", {}).get("curve", ()))
    figure.legend(loc="outside lower center", ncols=2)
    name_modes(figure, axes, summary["modes"], STYLES)
    return plotting.save(figure, picture)


def draw_modes(
    axes: "Axes", modes: Mapping[str, Any], styles: Mapping[str, Style], curve: Sequence[tuple[float, float]] = ()
) -> None:
    """Draw modes as points with intervals; those without a style are one granularity for all.

    modes: `visual_tokens`, `accuracy` and `interval` of each. curve: (visual tokens, accuracy) of the dial.
    """
    fixed = [one for mode, one in modes.items() if mode not in styles]
    if fixed:
        _draw(axes, fixed, color=GREY, marker="o", markersize=5, linestyle="-", linewidth=1, label=FIXED, zorder=3)
    for mode, (color, marker, size, label) in styles.items():
        if mode in modes:
            _draw(axes, [modes[mode]], color=color, marker=marker, markersize=size, linestyle="", label=label)
    if curve:
        tokens, accuracy = zip(*curve, strict=True)
        axes.plot(tokens, accuracy, color=STYLES[ADAPTIVE][0], linewidth=1, linestyle=":", label=DIAL, zorder=2)
    _scale(axes, [one["visual_tokens"] for one in modes.values()])


def _draw(axes: "Axes", modes: Sequence[Mapping[str, Any]], **style: Any) -> None:
    """Draw modes as points with intervals."""
    accuracy = [one["accuracy"] for one in modes]
    below = [max(0.0, one["accuracy"] - one["interval"][0]) for one in modes]
    above = [max(0.0, one["interval"][1] - one["accuracy"]) for one in modes]
    tokens = [one["visual_tokens"] for one in modes]
    axes.errorbar(tokens, accuracy, yerr=[below, above], elinewidth=1, capsize=2.5, **style)


def _scale(axes: "Axes", tokens: Sequence[float]) -> None:
    """Set the axes' scales, ticks and names."""
    from matplotlib.ticker import NullLocator

    low, high = min(tokens), max(tokens)
    spare = 1.1 * (high / low) ** 0.1
    axes.set_xscale("log")
    axes.set_xlim(low / spare, high * spare)
    axes.xaxis.set_major_locator(_ticks(*axes.get_xlim()))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(y=0.12)
    bottom, top = axes.get_ylim()
    axes.set_yticks([tick for tick in axes.get_yticks() if max(bottom, 0) <= tick <= min(top, 1)])
    plotting.shares(axes.yaxis)
    axes.grid()
    axes.set_xlabel("mean visual tokens per question (log scale)")
    axes.set_ylabel("accuracy with 95 % interval (linear scale)")


def _ticks(low: float, high: float) -> Any:
    """1, 2, 5, 10 and so on; where fewer than three of them lie between `low` and `high`, other round numbers."""
    from matplotlib.ticker import FixedLocator, MaxNLocator

    ticks = [digit * 10.0**power for power in range(-1, 7) for digit in (1, 2, 5)]
    shown = [tick for tick in ticks if low <= tick <= high]
    return FixedLocator(shown) if len(shown) > 2 else MaxNLocator(4)


def name_modes(figure: "Figure", axes: "Axes", modes: Mapping[str, Any], styles: Mapping[str, Style]) -> None:
    """Write each mode's name beside its point, once nothing else will move."""
    from matplotlib.patheffects import withStroke

    figure.draw_without_rendering()  # so that it is known where everything stands
    to_points = 72 / figure.dpi

    def at(tokens: float, accuracy: float) -> Point:
        x, y = axes.transData.transform((tokens, accuracy)) * to_points
        return Point(float(x), float(y))

    points = [at(one["visual_tokens"], one["accuracy"]) for one in modes.values()]
    lines = [
        point
        for one in modes.values()
        for point in along(*(at(one["visual_tokens"], accuracy) for accuracy in one["interval"]))
    ]
    fixed = [point for mode, point in zip(modes, points, strict=True) if mode not in styles]
    lines += [point for start, end in itertools.pairwise(fixed) for point in along(start, end)]
    texts = [
        axes.annotate(
            mode,
            (one["visual_tokens"], one["accuracy"]),
            (0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            color=styles[mode][0] if mode in styles else GREY,
            fontsize="small",
            path_effects=[withStroke(linewidth=2, foreground="white")],  # legible where it crosses a line
            zorder=4,
        )
        for mode, one in modes.items()
    ]
    extents = [text.get_window_extent() for text in texts]
    sizes = [(extent.width * to_points, extent.height * to_points) for extent in extents]
    area = Box(*(float(side) * to_points for side in axes.bbox.extents))
    for point, box, text in zip(points, place(points, sizes, MARKER, lines, area), texts, strict=True):
        text.set_position((box.middle.x - point.x, box.middle.y - point.y))
        text.set_in_layout(False)
        end = box.nearest(point)
        if math.dist(point, end) > MARKER / 2 + LEADER:
            line = {"arrowstyle": "-", "color": text.get_color(), "linewidth": 0.6, "shrinkA": 0, "shrinkB": MARKER / 2}
            offset = (end.x - point.x, end.y - point.y)
            axes.annotate("", text.xy, offset, textcoords="offset points", arrowprops=line).set_in_layout(False)


def plot_choices(summary: Mapping[str, Any], picture: Path) -> Path | None:
    """Draw how often the router took each granularity: a bar for each category, the coarsest on top.

    Returns None if there are no categories or no router, or where the plotting library is not installed.
    """
    categories = summary["modes"].get(ADAPTIVE, {}).get("categories", {})
    return draw_choices(categories, summary["granularities"], "a category's questions, whose number", picture)


@plotting.style()
def draw_choices(categories: Mapping[str, Any], granularities: Sequence[int], whose: str, picture: Path) -> Path | None:
    """Draw a bar for each category, of the `shares` of granularities among its `questions`; `whose` says of what."""
    asked = {name: one for name, one in categories.items() if one["questions"]}
    figure = plotting.new_figure(1.4 + 0.36 * len(asked))
    if figure is None or not asked:
        return None
    levels = sorted(granularities)
    names = sorted(asked, key=lambda name: (sum(g * asked[name]["shares"][str(g)] for g in levels), name))
    axes = figure.subplots()
    left = [0.0] * len(names)
    for level, color in zip(levels, plotting.shades(len(levels)), strict=True):
        shares = [asked[name]["shares"][str(level)] for name in names]
        bars = axes.barh(
            range(len(names)), shares, 0.76, left, color=color, edgecolor="white", linewidth=0.7, label=level
        )
        ink = "black" if sum(color) > 1.5 else "white"
        labels = [f"{share:.0%}" if share >= WIDE else "" for share in shares]
        axes.bar_label(bars, labels, label_type="center", color=ink, fontsize="x-small")
        left = [a + b for a, b in zip(left, shares, strict=True)]
    plotting.bars(axes, [f"{plotting.short(name)} ({asked[name]['questions']:,})" for name in names])
    plotting.shares(axes.xaxis)
    axes.set(xlim=(0, 1), xlabel=f"share of {whose} is in brackets (linear scale)")
    figure.legend(title="visual tokens per crop that the router chose", loc="outside upper center", ncols=len(levels))
    return plotting.save(figure, picture)


@plotting.style()
def plot_reliability(summary: Mapping[str, Any], picture: Path) -> Path | None:
    """Draw how often the router's choice is as good as the finest, against its confidence, for each bin of that.

    Returns None if there is no calibration, or where the plotting library is not installed.
    """
    figure = plotting.new_figure(5.6, 6.4)
    if figure is None or "calibration" not in summary:
        return None
    bins, (color, marker, size, _) = summary["calibration"]["bins"], STYLES[ADAPTIVE]
    axes = figure.subplots()
    axes.plot((0, 1), (0, 1), color=GREY, linewidth=0.8, linestyle="--", label="confidence that is right")
    x, y = ([one[name] for one in bins] for name in ("confidence", "as_good"))
    below, above = ([abs(one["as_good"] - one["interval"][end]) for one in bins] for end in (0, 1))
    style: dict[str, Any] = {"color": color, "marker": marker, "markersize": size / 2, "linewidth": 1}
    label = "questions by confidence, whose number is below"
    axes.errorbar(x, y, yerr=[below, above], elinewidth=1, capsize=2.5, label=label, **style)
    for one in bins:
        middle = (one["from"] + one["to"]) / 2
        axes.text(middle, 0.015, f"{one['questions']:,}", ha="center", color=GREY, fontsize="x-small")
    for axis in (axes.xaxis, axes.yaxis):
        plotting.shares(axis)
    axes.grid()
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="the router's confidence in its choice (linear scale)")
    axes.set_ylabel("as good as the finest, with 95 % interval (linear scale)")
    figure.legend(loc="outside lower center")
    return plotting.save(figure, picture)
