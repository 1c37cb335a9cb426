"""One look for all pictures: colours, fonts, lines, and how they are saved. matplotlib is loaded when one is drawn."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError
from .files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 8.0  # inches of a picture, which are 1200 pixels
DPI = 150
FORMATS = (".png", ".pdf", ".svg")
MISSING = "pictures are drawn by matplotlib, which is not installed; install it: pip install 'avg-mlx[plot]'"

# Colours that colour-blind readers tell apart (Okabe and Ito's). What they tell is told by shapes or words too.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PINK, BLACK, GREY = "#56B4E9", "#CC79A7", "#000000", "0.35"
DIVERGING = "PuOr"  # from orange, against, over white to purple, for: safe for colour-blind readers too
AGAINST, FOR = "#B35806", "#542788"  # near its ends

# Fonts that have what DejaVu Sans lacks, above all the letters of China, Japan and Korea: those of macOS and of Linux.
FALLBACKS = ("Arial Unicode MS", "PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo", "Noto Sans CJK JP")
LOOK: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": "medium",
    "axes.labelsize": "medium",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.prop_cycle": f"cycler(color={[BLUE, ORANGE, GREEN, RED, SKY, BLACK]})",
    "axes.linewidth": 0.8,
    "grid.color": "0.92",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": "small",
    "lines.linewidth": 1.2,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "svg.hashsalt": "avg-mlx",  # the same picture is the same file
}


@contextmanager
def style() -> Iterator[None]:
    """Draw in this look within the block, or within a function that this decorates.

    Does nothing where the plotting library (the plot extra) is not installed.
    """
    try:
        from matplotlib import font_manager, rc_context
    except ImportError:
        yield
        return
    known = {font.name for font in font_manager.fontManager.ttflist}
    fonts = ["DejaVu Sans", *(name for name in FALLBACKS if name in known)]
    settings: Any = LOOK | {"font.family": fonts}
    with rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a box stands in its place
        yield


def new_figure(height: float, width: float = WIDTH) -> "Figure | None":
    """Make a figure of so many inches, or return None where the plotting library is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def check_picture(file: Path) -> None:
    """Raise InputError, before any work, if a picture cannot be drawn or written there."""
    if file.suffix.lower() not in FORMATS:
        raise InputError(f"{file} is no name of a picture; end it with {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    if file.is_dir():
        raise InputError(f"{file} is a folder; name a file")
    if not file.parent.is_dir():
        raise InputError(f"{file.parent} is not a folder; make it first")
    if new_figure(1) is None:
        raise InputError(MISSING)


def save(figure: "Figure", picture: Path) -> Path:
    """Write a picture as a whole, in the format that its name ends with."""
    undated = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
    with replacing(picture) as partial:
        figure.savefig(partial, dpi=DPI, metadata=undated.get(picture.suffix.lower()))
    return picture


def shares(axis: Any) -> None:
    """Let an axis of shares show per cent."""
    axis.set_major_formatter(lambda share, _: f"{100 * share:.4g}%")


def bars(axes: "Axes", names: list[str]) -> None:
    """Prepare axes for horizontal bars, one for each name, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def shades(count: int) -> list[tuple[float, float, float]]:
    """Colours from light, for coarse, to dark; they differ in brightness too, so that they can be printed in grey."""
    from matplotlib import colormaps

    return [colormaps["viridis"](1 - n / max(1, count - 1))[:3] for n in range(count)]


def short(name: str, most: int = 32) -> str:
    """Return a name, cut where it would leave its picture no room."""
    return name if len(name) <= most else f"{name[: most - 1]}…"
