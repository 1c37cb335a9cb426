"""Why an image is looked at as closely as it is: the router's vote, where it lies in the image, and in which words."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from .. import html
from ..errors import InputError
from ..geometry import ImageGeometry
from ..inference.view import View
from . import inline
from .evidence import Evidence, Votes, Word
from .heat import fit, spread_over_image, spread_over_patches

HEAT_SIDE = 96  # numbers along the longer side of an image's heat map in JSON
DIGITS = 8  # after the point, of votes in JSON


@dataclass(frozen=True, eq=False)
class Explanation:
    """How closely one image is looked at, where its tokens lie, and what the router's decision is made of."""

    view: View
    geometry: ImageGeometry = field(repr=False)  # at the view's granularity
    patches: ImageGeometry = field(repr=False)  # at the finest there can be: a token for each patch
    levels: tuple[ImageGeometry, ...] = field(repr=False)  # at each of the model's granularities, in the config's order
    votes: Votes | None = field(repr=False)  # None if the router did not run
    image: Image.Image | None = field(default=None, repr=False)  # upright, for the picture

    def evidence(self, over: int | None = None) -> Evidence | None:
        """Tell what speaks for the view's granularity over another one, by default the one of the best score.

        None if the router did not run, or if there is no other one. Raises InputError if `over` is not another one.
        """
        others = [level.granularity for level in self.levels if level.granularity != self.view.granularity]
        if over is not None and over not in others:
            choices = ", ".join(map(str, others))
            raise InputError(f"{over} is no granularity to compare {self.view.granularity} with; choose from {choices}")
        if self.votes is None or self.view.routing is None or not others:
            return None
        return self.votes.evidence(self.view.granularity, self.view.routing.best_of(others) if over is None else over)

    def words(self, evidence: Evidence) -> list[tuple[Word, float]]:
        """Pair each kept word with its part of the evidence, in reading order."""
        words = self.votes.words if self.votes else ()
        return sorted(zip(words, evidence.words, strict=True), key=lambda pair: pair[0].position)

    def heat(self, evidence: Evidence, longest: int = HEAT_SIDE) -> np.ndarray:
        """Lay evidence over the image: (rows, columns), the longer side `longest`.

        The sum is the image's evidence but for what lies on padding.
        """
        patch_grid = self.patches.token_grid
        crops = np.sum([spread_over_patches(level, patch_grid) for level in evidence.levels], axis=0)
        return spread_over_image(crops, self.patches, fit(self.geometry.image_size, longest))

    def to_dict(self) -> dict[str, Any]:
        """Return all that the picture shows and what it is made of, for JSON, as docs/explaining.md lists the keys."""
        view = self.view
        return {
            "granularity": view.granularity,
            "granularity_source": view.source,
            "visual_tokens": view.visual_tokens,
            "visual_tokens_finest": view.visual_tokens_finest,
            "geometry": self.geometry.to_dict(),
            "router": view.routing and asdict(view.routing),
            "votes": self.votes and self._votes_to_dict(self.votes),
            "evidence": [self._evidence_to_dict(each) for each in self.comparisons()],
        }

    def comparisons(self) -> list[Evidence]:
        """Tell what speaks for the view's granularity over each other one, the one of the best score first."""
        routing = self.view.routing
        if routing is None:
            return []
        scored = sorted(zip(routing.logits, routing.granularities, strict=True), reverse=True)
        compared = [self.evidence(granularity) for _, granularity in scored if granularity != self.view.granularity]
        return [evidence for evidence in compared if evidence is not None]

    def _repr_html_(self) -> str:
        evidence, told = self.evidence(), self.view._repr_html_()
        if evidence is None:
            return told
        title = html.paragraph(f"what speaks for {evidence.choice} (purple) over {evidence.over} (orange)")
        shown = inline.overlay(self.image, self.heat(evidence, inline.LONGEST)) if self.image else ""
        words = inline.words((word.text, value) for word, value in self.words(evidence))
        return told + title + shown + words

    def _votes_to_dict(self, votes: Votes) -> dict[str, Any]:
        levels = [
            {"geometry": geometry.to_dict(), "votes": _rounded(np.moveaxis(level, -1, 1))}
            for geometry, level in zip(self.levels, votes.levels, strict=True)
        ]
        return {
            "sums": _rounded(votes.sums),
            "levels": levels,
            "words": [asdict(word) | {"votes": _rounded(np.array(word.votes))} for word in votes.words],
            "unfilled": _rounded(votes.unfilled),
            "norm": {"weight": votes.weight.tolist(), "bias": votes.bias.tolist(), "eps": votes.eps},
        }

    def _evidence_to_dict(self, evidence: Evidence) -> dict[str, Any]:
        heat = self.heat(evidence)
        return {
            "for": evidence.choice,
            "over": evidence.over,
            "total": evidence.total,
            "image": evidence.image,
            "padding": evidence.image - float(heat.sum()),
            "words": list(evidence.words),
            "unfilled": evidence.unfilled,
            "bias": evidence.bias,
            "heat": _rounded(heat),
        }


def _rounded(numbers: np.ndarray) -> Any:
    return numbers.round(DIGITS).tolist()
