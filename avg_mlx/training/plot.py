"""A picture of a run's losses."""

from collections.abc import Sequence
from pathlib import Path

from ..files import replacing
from ..journal import Row


def plot_losses(log: Sequence[Row], folder: Path) -> Path | None:
    """Draw a log as loss.png in a run's folder; None where the plotting library (the plot extra) is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([r["step"] for r in log], [r["loss"] for r in log], linewidth=1, label="training")
    validated = [r for r in log if "validation_loss" in r]
    if validated:
        losses = [r["validation_loss"] for r in validated]
        axes.plot([r["step"] for r in validated], losses, marker="o", label="validation")
    axes.set(xlabel="step", ylabel="loss", title=folder.resolve().name)
    axes.legend()
    picture = folder / "loss.png"
    with replacing(picture) as partial:
        figure.savefig(partial, dpi=150)
    return picture
