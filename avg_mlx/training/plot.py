"""A picture of a run's losses."""

import json
from pathlib import Path


def plot_losses(folder: Path) -> Path | None:
    """Draw `folder`/log.jsonl as loss.png; None where the plotting library (the plot extra) is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([r["step"] for r in records], [r["loss"] for r in records], linewidth=1, label="training")
    validated = [r for r in records if "validation_loss" in r]
    if validated:
        losses = [r["validation_loss"] for r in validated]
        axes.plot([r["step"] for r in validated], losses, marker="o", label="validation")
    axes.set(xlabel="step", ylabel="loss", title=folder.resolve().name)
    axes.legend()
    picture = folder / "loss.png"
    partial = folder / ".partial-loss.png"
    figure.savefig(partial, dpi=150)
    partial.replace(picture)
    return picture
