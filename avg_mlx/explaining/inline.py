"""Evidence as HTML for notebooks: a small picture within the text, and words on coloured ground."""

import base64
import io
from collections.abc import Iterable
from html import escape

import numpy as np
from PIL import Image, ImageColor

from ..errors import printable
from ..plotting import AGAINST, FOR
from .heat import fit

LONGEST = 320  # pixels of the picture's longer side


def overlay(image: Image.Image, heat: np.ndarray) -> str:
    """Lay a heat map over the image in grey, and return an <img> that holds it as a JPEG of some 10 kB."""
    width, height = fit(image.size, LONGEST)
    gray = np.asarray(image.convert("L").resize((width, height), Image.Resampling.BOX), np.float32)[..., None]
    strength = heat / (np.abs(heat).max() or 1.0)
    shown = np.asarray(Image.fromarray(strength.astype(np.float32)).resize((width, height), Image.Resampling.NEAREST))
    colors = np.where(shown[..., None] > 0, ImageColor.getrgb(FOR), ImageColor.getrgb(AGAINST))
    alpha = 0.85 * np.sqrt(np.abs(shown))[..., None]
    stream = io.BytesIO()
    pixels = (alpha * colors + (1 - alpha) * (128 + gray / 2)).astype(np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG", quality=80)
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<img alt="evidence over the image" width="{width}" src="data:image/jpeg;base64,{data}">'


def words(pairs: Iterable[tuple[str, float]]) -> str:
    """(word, evidence) on ground of the evidence's colour, as dark as there is much of it."""
    pairs = list(pairs)
    most = max((abs(value) for _, value in pairs), default=0) or 1.0
    spans = []
    for text, value in pairs:
        color = ImageColor.getrgb(FOR if value > 0 else AGAINST)
        ground = f"rgba{(*color, round(0.6 * abs(value) / most, 3))}"
        label = escape(printable(text) or "␣")
        spans.append(f'<span style="background:{ground};padding:0 .2em" title="{value:+.3f}">{label}</span>')
    return f'<p style="margin:.3em 0">{" ".join(spans)}</p>'
