"""Tables in Markdown that also read well in a terminal."""

from collections.abc import Iterable, Sequence

from .errors import printable


def table(header: Sequence[object], rows: Iterable[Sequence[object]], left: int = 1) -> str:
    """Lay out a table, its columns padded to equal width. The first `left` columns are aligned left, others right."""
    cells = [[printable(cell, 1000).replace("|", r"\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * w if n < left else "-" * (w - 1) + ":" for n, w in enumerate(widths)]
    aligned = (
        [cell.ljust(w) if n < left else cell.rjust(w) for n, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in cells
    )
    lines = ["| " + " | ".join(row) + " |" for row in aligned]
    return "\n".join([lines[0], "| " + " | ".join(rule) + " |", *lines[1:]])
