"""A picture of a run's losses."""

from collections.abc import Sequence
from pathlib import Path

from .. import plotting
from ..journal import Row


@plotting.style()
def plot_losses(log: Sequence[Row], folder: Path) -> Path | None:
    """Draw a log as loss.png in a run's folder; None where the plotting library (the plot extra) is not installed."""
    figure = plotting.new_figure(4.5)
    if figure is None:
        return None
    axes = figure.subplots()
    axes.plot([r["step"] for r in log], [r["loss"] for r in log], color=plotting.BLUE, label="training")
    validated = [r for r in log if "validation_loss" in r]
    if validated:
        steps, losses = [r["step"] for r in validated], [r["validation_loss"] for r in validated]
        axes.plot(steps, losses, color=plotting.RED, marker="o", markersize=5, label="validation")
    axes.grid()
    axes.set(xlabel="step (linear scale)", ylabel="loss (linear scale)")
    axes.set_title(plotting.short(folder.resolve().name, 80))
    axes.legend()
    return plotting.save(figure, folder / "loss.png")
