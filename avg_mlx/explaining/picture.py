"""The picture of an explanation: crops and tokens, evidence over the image, words, probabilities, tokens saved."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .. import plotting
from ..geometry import Box, CropGeometry, ImageGeometry
from .evidence import Evidence, Word
from .explanation import Explanation
from .heat import fit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

LONGEST = 1000  # pixels of the photo's longer side, and half of that of the heat's
LONG = 8.0  # times the other side, from which on an image is stretched to be seen
WIDE = 2.0  # width to height from which on photo and heat stand above each other
TALLEST, FLATTEST = 4.4, 0.9  # inches of the photo's panel
WORDS = 14  # bars; the words of least evidence share another one
NOT_ROUTED = "The router did not run, so there is no evidence to show: this is where the tokens lie."


@plotting.style()
def draw_explanation(explanation: Explanation, file: str | Path, title: str = "", over: int | None = None) -> Path:
    """Draw one image's explanation (docs/explaining.md), with what speaks for its granularity `over` another.

    file: .png, .pdf or .svg. title: such as the question. over: by default the next best. Returns the path. Raises
    InputError if nothing can be written there, or where the plotting library (the plot extra) is not installed.
    """
    picture = Path(file)
    plotting.check_picture(picture)
    evidence = explanation.evidence(over)
    left, top, right, bottom = _frame(explanation.geometry)
    ratio = (right - left) / (bottom - top)
    stacked, panels = ratio > WIDE, 1 if evidence is None else 2
    room = plotting.WIDTH * 0.95 / (1 if stacked or panels == 1 else 2)
    height = float(np.clip(room / ratio, FLATTEST, TALLEST))
    above = (height + 0.75) * (panels if stacked else 1)
    below = 0.3 if evidence is None else 0.9 + 0.2 * max(len(explanation.levels), min(len(evidence.words), WORDS + 1))
    figure = plotting.new_figure(0.6 + above + below)
    assert figure is not None  # check_picture has seen to it
    figure.suptitle(_heading(explanation, title), fontsize="large", x=0.01, ha="left", linespacing=1.4)
    parts: Any = figure.subfigures(2, 1, height_ratios=(above, below))
    axes = parts[0].subplots(*((panels, 1) if stacked else (1, panels)), squeeze=False).flat
    _draw_tokens(axes[0], explanation)
    if evidence is None:
        parts[1].text(0.01, 0.5, NOT_ROUTED, va="center")
    else:
        _draw_heat(parts[0], axes[1], explanation, evidence)
        words, odds = parts[1].subplots(1, 2, width_ratios=(3, 2))
        _draw_words(words, explanation, evidence)
        _draw_probabilities(odds, explanation)
    return plotting.save(figure, picture)


def _heading(explanation: Explanation, title: str) -> str:
    """The question, and what was chosen."""
    view = explanation.view
    chosen = f"Granularity {view.granularity}, {view.reason}: {view.visual_tokens:,} of "
    chosen += f"{view.visual_tokens_finest:,} visual tokens ({view.saved:.1%} saved)"
    question = plotting.short(" ".join(title.split()), 90)
    return f"{question}\n{chosen}" if question else chosen


def _frame(geometry: ImageGeometry) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of all that is shown: the image, and the padding around it that crops show too."""
    height, width = geometry.image_size
    boxes = [(0.0, 0.0, float(height), float(width)), *(crop.box for crop in geometry.crops)]
    tops, lefts, bottoms, rights = zip(*boxes, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


def _show(axes: "Axes", explanation: Explanation, image: Image.Image | None) -> None:
    """Prepare a panel, and show the image in it where its crops see it."""
    left, top, right, bottom = _frame(explanation.geometry)
    height, width = explanation.geometry.image_size
    axes.set_facecolor("0.2")
    if image is not None:
        shown = np.asarray(image.resize(fit(image.size, min(LONGEST, max(image.size))), Image.Resampling.BOX))
        axes.imshow(shown, extent=(0, width, height, 0))
    axes.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[])
    axes.set_aspect("equal" if 1 / LONG < (right - left) / (bottom - top) < LONG else "auto")
    axes.spines[:].set_visible(False)


def _draw_tokens(axes: "Axes", explanation: Explanation) -> None:
    """Draw the crops over the image, and their tokens; what packing cuts away is hatched."""
    geometry = explanation.geometry
    _show(axes, explanation, explanation.image)
    local = geometry.crops[1:] or geometry.crops
    for crop in local:
        _outline(axes, crop)
        for box in _cut(crop):
            _rectangle(axes, box, facecolor=(1, 1, 1, 0.55), edgecolor="0.4", hatch="////", linewidth=0)
    for color, width in (("white", 3.4), (plotting.BLUE, 2.0)):
        for crop in local:
            _rectangle(axes, crop.box, fill=False, edgecolor=color, linewidth=width, clip_on=False)
    rows, columns = geometry.token_grid
    whole = f"the whole in {rows} × {columns} tokens"
    crops = f"{len(local)} crop{'s' if len(local) > 1 else ''} of {rows} × {columns} tokens"
    cut = "\nhatched: tokens that are cut away" if any(crop.kept < rows * columns for crop in local) else ""
    axes.set_title(f"{crops}, and {whole}{cut}" if geometry.crops[1:] else whole, loc="left")


def _outline(axes: "Axes", crop: CropGeometry) -> None:
    """Draw the lines between a crop's tokens, legible on light and on dark."""
    top, left, bottom, right = crop.row_edges[0], crop.column_edges[0], crop.row_edges[-1], crop.column_edges[-1]
    thin = min(1.0, 12 / max(len(crop.row_edges), len(crop.column_edges)))
    for color, width in (("black", 1.2 * thin), ("white", 0.6 * thin)):
        style: dict[str, Any] = {"color": color, "linewidth": width, "alpha": 0.7}
        axes.hlines(crop.row_edges, left, right, **style)
        axes.vlines(crop.column_edges, top, bottom, **style)


def _cut(crop: CropGeometry) -> list[Box]:
    """What packing cuts away of a crop: boxes above, below, left and right of what it keeps."""
    y, x = crop.row_edges, crop.column_edges
    (first, last), (start, stop) = crop.kept_rows, crop.kept_columns
    boxes = [(y[0], x[0], y[first], x[-1]), (y[last], x[0], y[-1], x[-1])]
    boxes += [(y[first], x[0], y[last], x[start]), (y[first], x[stop], y[last], x[-1])]
    return [(top, left, bottom, right) for top, left, bottom, right in boxes if top < bottom and left < right]


def _rectangle(axes: "Axes", box: Box, **style: Any) -> None:
    from matplotlib.patches import Rectangle

    top, left, bottom, right = box
    axes.add_patch(Rectangle((left, top), right - left, bottom - top, **style))


def _draw_heat(figure: "Figure | SubFigure", axes: "Axes", explanation: Explanation, evidence: Evidence) -> None:
    """Lay the evidence over the image in grey."""
    height, width = explanation.geometry.image_size
    pale = explanation.image and explanation.image.convert("L").point(lambda x: 128 + x // 2).convert("RGB")
    _show(axes, explanation, pale)
    heat = explanation.heat(evidence, LONGEST // 2)
    padding = evidence.image - heat.sum()
    heat *= heat.size / 100  # in a hundredth of the image
    most = float(np.abs(heat).max()) or 1.0
    alpha = 0.9 * np.sqrt(np.abs(heat) / most)
    scale: dict[str, Any] = {"cmap": plotting.DIVERGING, "vmin": -most, "vmax": most, "interpolation": "nearest"}
    axes.imshow(heat, extent=(0, width, height, 0), alpha=alpha, aspect=axes.get_aspect(), **scale)
    for crop in explanation.geometry.crops[1:]:
        _rectangle(axes, crop.box, fill=False, edgecolor="0.3", linewidth=0.6)
    beside = f"\nof which on padding, in black: {_signed(padding)}" if abs(padding) >= 0.005 else ""
    title = f"The image: {_signed(evidence.image)} for {evidence.choice} over {evidence.over}{beside}"
    axes.set_title(title, loc="left")
    bar = figure.colorbar(_solid(scale), ax=axes, orientation="horizontal", shrink=0.9, aspect=30)
    bar.set_label(f"← for {evidence.over}      evidence in 1 % of the image      for {evidence.choice} →")
    bar.outline.set_visible(False)


def _solid(scale: dict[str, Any]) -> Any:
    """The heat's colours for its legend, without transparency."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(scale["vmin"], scale["vmax"]), scale["cmap"])


def _draw_words(axes: "Axes", explanation: Explanation, evidence: Evidence) -> None:
    """Draw the words of most evidence as bars, in reading order."""
    pairs = explanation.words(evidence)
    strongest = sorted(pairs, key=lambda pair: -abs(pair[1]))[:WORDS]
    bars = [(_readable(word), value) for word, value in pairs if (word, value) in strongest]
    if others := [value for word, value in pairs if (word, value) not in strongest]:
        bars.append((f"({len(others)} others)", sum(others)))
    bars = bars or [("(none is kept)", 0.0)]
    names, values = [name for name, _ in bars], [value for _, value in bars]
    colors = [plotting.FOR if value > 0 else plotting.AGAINST for value in values]
    drawn = axes.barh(range(len(bars)), values, 0.7, color=colors)
    axes.bar_label(drawn, [_signed(value) for value in values], padding=2, fontsize="x-small", color=plotting.GREY)
    axes.axvline(0, color=plotting.GREY, linewidth=0.8)
    plotting.bars(axes, names)
    axes.margins(x=0.2)
    rest, times = evidence.unfilled + evidence.bias, np.exp(evidence.total)
    title = f"The words: {_signed(sum(values))}; neither words nor image: {_signed(rest)}\n"
    title += f"All together: {_signed(evidence.total)}, so {evidence.choice} is {times:.3g} times as likely"
    axes.set_title(title, loc="left")
    axes.set_xlabel(f"evidence for {evidence.choice} over {evidence.over} (logits, linear scale)")


def _signed(value: float) -> str:
    """A number with its sign, as a picture shows it."""
    return f"{round(value, 2) + 0:+.2f}".replace("-", "−")  # + 0: there is no negative zero


def _readable(word: Word) -> str:
    """A word as a label may show it: on one line, and white space visible."""
    text = word.text.strip() or word.text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")
    return plotting.short("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text), 20)


def _draw_probabilities(axes: "Axes", explanation: Explanation) -> None:
    """Draw how likely the router thinks each granularity, the coarsest on top."""
    routing = explanation.view.routing
    assert routing is not None
    counts = {level.granularity: level.visual_tokens for level in explanation.levels}
    pairs = sorted(zip(routing.granularities, routing.probabilities, strict=True))
    chosen = [granularity == explanation.view.granularity for granularity, _ in pairs]
    colors = [plotting.BLUE if is_chosen else "0.75" for is_chosen in chosen]
    drawn = axes.barh(range(len(pairs)), [probability for _, probability in pairs], 0.7, color=colors)
    labels = [f"{probability:.1%}, {counts[granularity]:,} tokens" for granularity, probability in pairs]
    axes.bar_label(drawn, labels, padding=3, fontsize="small")
    plotting.bars(axes, [str(granularity) for granularity, _ in pairs])
    for label, is_chosen in zip(axes.get_yticklabels(), chosen, strict=True):
        label.set_fontweight("bold" if is_chosen else "normal")
    axes.set_xlim(0, 1.75 * max(routing.probabilities))
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.set_title("Probability of each granularity,\nand the visual tokens it takes", loc="left")
