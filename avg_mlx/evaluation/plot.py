"""Pictures of an evaluation: accuracy against visual tokens, and what the router chose."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Where a mode's name stands, in points from its own; the fixed ones' stand below.
PLACES = {"oracle": (0, 8, "center", "bottom"), "adaptive": (8, 0, "left", "center")}


def plot_accuracy(summary: Mapping[str, Any], picture: Path) -> Path | None:
    """Draw a summary's modes, each a point; None where the plotting library (the plot extra) is not installed."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter
    except ImportError:
        return None
    points = {mode: (one["visual_tokens"], one["accuracy"]) for mode, one in summary["modes"].items()}
    fixed = {mode: point for mode, point in points.items() if mode.isdecimal()}
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    if fixed:
        axes.plot(*zip(*fixed.values(), strict=True), marker="o", color="0.6", linewidth=1)
    for mode, point in points.items():
        if mode not in fixed:
            axes.plot(*point, marker="o", markersize=8)
        x, y, ha, va = PLACES.get(mode, (0, -8, "center", "top"))
        color = "0.4" if mode in fixed else "black"
        axes.annotate(mode, point, (x, y), textcoords="offset points", ha=ha, va=va, color=color)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator([tokens for tokens, _ in (fixed or points).values()]))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    axes.margins(0.1, 0.15)
    axes.set(xlabel="visual tokens (mean)", ylabel="accuracy", title=f"{summary['questions']} questions")
    return _save(figure, picture)


def plot_choices(summary: Mapping[str, Any], picture: Path) -> Path | None:
    """Draw how often the router took each granularity, a bar for each category; None if there is nothing to draw."""
    categories = summary["modes"].get("adaptive", {}).get("categories")
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    except ImportError:
        return None
    if not categories:
        return None
    names, levels = list(categories), sorted(summary["granularities"])
    figure = Figure(figsize=(7, 1.2 + 0.4 * len(names)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(names)
    for n, level in enumerate(levels):
        shares = [categories[name]["shares"][str(level)] for name in names]
        axes.barh(names, shares, left=left, color=colormaps["viridis"](1 - n / len(levels)), label=str(level))
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set(xlim=(0, 1), xlabel="questions, by the granularity that the router chose")
    figure.legend(ncols=len(levels), loc="outside upper center", frameon=False)
    return _save(figure, picture)


def _save(figure: "Figure", picture: Path) -> Path:
    partial = picture.with_name(f".partial-{picture.name}")
    figure.savefig(partial, dpi=150)
    partial.replace(picture)
    return picture
