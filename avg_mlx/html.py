"""Pieces of HTML with which results show themselves in notebooks: small, escaped, with nothing from outside."""

from collections.abc import Iterable
from html import escape

from .errors import printable
from .plotting import BLUE

MOST = 2000  # characters of a text that are shown
CELL = "text-align:left;padding:0 .6em 0 0;border:none;background:none"


def paragraph(text: str, bold: str = "") -> str:
    """A paragraph of plain text, which may begin with something in bold."""
    strong = f"<b>{escape(printable(bold, MOST))}</b> " if bold else ""
    return f'<p style="margin:.3em 0">{strong}{escape(printable(text, MOST))}</p>'


def bars(rows: Iterable[tuple[str, float, str, bool]]) -> str:
    """A table of (name, share from 0 to 1, what is written beside its bar, whether it is the chosen one)."""
    lines = []
    for name, share, text, chosen in rows:
        color, weight = (BLUE, "bold") if chosen else ("#999", "normal")
        bar = f'<div style="background:{color};width:{12 * share:.2f}em;height:.8em"></div>'
        lines.append(
            f'<tr style="background:none"><td style="{CELL};font-weight:{weight}">{escape(printable(name))}</td>'
            f'<td style="{CELL}">{bar}</td><td style="{CELL}">{escape(printable(text))}</td></tr>'
        )
    return f'<table style="border:none;margin:.3em 0">{"".join(lines)}</table>'
