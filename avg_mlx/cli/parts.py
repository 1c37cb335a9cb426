"""The table with which convert and fuse end: what each part of a model takes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..markdown import table

if TYPE_CHECKING:
    from ..model.inventory import Part


def parts_table(parts: "Sequence[Part]") -> str:
    """Return a row for each part, and one for the whole, as Markdown."""
    from ..model.inventory import Part

    whole = Part("total", sum(p.parameters for p in parts), sum(p.bytes for p in parts))
    rows = ((p.name, f"{p.parameters:,}", f"{p.bits_per_weight:.2f}", f"{p.bytes:,}") for p in (*parts, whole))
    return table(("part", "parameters", "bits/weight", "bytes"), rows)
