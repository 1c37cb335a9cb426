"""How closely an image is looked at: the router's scores, and what is made of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import mlx.core as mx

from ..config import Config
from ..errors import InputError
from ..geometry import Pair
from ..inputs.image import Crops
from .options import Looking


@dataclass(frozen=True)
class Routing:
    """The router's scores for one image, in the config's order of granularities."""

    granularities: tuple[int, ...]
    logits: tuple[float, ...]
    probabilities: tuple[float, ...]

    @classmethod
    def of(cls, config: Config, logits: mx.array) -> "Routing":
        """Read the scores from an array of (granularities,) logits."""
        logits = logits.astype(mx.float32)
        return cls(config.granularities, _floats(logits), _floats(mx.softmax(logits)))

    def best_of(self, allowed: Sequence[int]) -> int:
        """The best-scored granularity among `allowed`."""
        return max(allowed, key=lambda g: self.logits[self.granularities.index(g)])

    @property
    def choice(self) -> int:
        """The best-scored granularity of all."""
        return self.best_of(self.granularities)


@dataclass(frozen=True)
class View:
    """How closely one image is looked at, and why."""

    granularity: int
    source: Literal["router", "forced", "budget"]  # "budget": the router's own choice did not fit it
    routing: Routing | None  # None when the granularity is forced
    crops: int
    crop_grid: Pair  # (rows, columns) of local crops
    visual_tokens: int
    visual_tokens_finest: int  # what the finest granularity would take


def view_image(config: Config, crops: Crops, routing: Routing | None, looking: Looking) -> View:
    """Choose one image's granularity: the best-scored that fits the budget, or the forced one where `routing` is None.

    Raises InputError if no granularity fits the budget.
    """
    counts = {g: config.visual_tokens(g, crops.image_size) for g in config.granularities}
    source: Literal["router", "forced", "budget"] = "forced"
    if routing is None:
        chosen = int(looking.granularity)
    else:
        budget = looking.max_visual_tokens
        fitting = [g for g in counts if budget is None or counts[g] <= budget]
        if not fitting:
            raise InputError(
                f"no granularity fits into {budget} visual tokens; this image takes at least {min(counts.values())}"
            )
        chosen = routing.best_of(fitting)
        source = "router" if chosen == routing.choice else "budget"
    return View(chosen, source, routing, len(crops), crops.crop_grid, counts[chosen], counts[config.finest])


def _floats(x: mx.array) -> tuple[float, ...]:
    return tuple(cast(list[float], x.tolist()))
