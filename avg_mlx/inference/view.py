"""How closely an image is looked at: the router's scores, and what is made of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import mlx.core as mx

from .. import html
from ..config import Config
from ..errors import InputError
from ..geometry import Pair
from ..inputs.image import Crops
from .options import AUTO, Looking

# Why: the router's choice, or the finest for want of one; a cheaper choice for the token cost; forced by the caller; or
# what fits where those do not.
ViewSource = Literal["router", "finest", "cost", "forced", "budget"]


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

    def best_of(self, allowed: Sequence[int], costs: Mapping[int, float] | None = None) -> int:
        """The best-scored granularity among `allowed`, each score lowered by what the granularity costs.

        Scores are logits: they differ from log-probabilities by the same number for all.
        """
        costs = costs or dict.fromkeys(allowed, 0.0)
        return max(allowed, key=lambda g: self.logits[self.granularities.index(g)] - costs[g])

    @property
    def choice(self) -> int:
        """The best-scored granularity of all."""
        return self.best_of(self.granularities)


@dataclass(frozen=True)
class View:
    """How closely one image is looked at, and why."""

    granularity: int
    source: ViewSource
    routing: Routing | None  # None when the granularity is forced, or there is no router
    crops: int
    crop_grid: Pair  # (rows, columns) of local crops
    visual_tokens: int
    visual_tokens_finest: int  # what the finest granularity would take

    @property
    def reason(self) -> str:
        """Why, in words."""
        if self.source == "forced":
            return "forced"
        if self.routing is None:
            within = self.source == "budget"
            return "the finest within the budget" if within else "the finest: this model has no router"
        return f"by the {'router after cost' if self.source == 'cost' else self.source}"

    @property
    def saved(self) -> float:
        """The share of the finest granularity's visual tokens that are saved."""
        return 1 - self.visual_tokens / self.visual_tokens_finest

    def _repr_html_(self) -> str:
        counts = f"{self.visual_tokens:,} of {self.visual_tokens_finest:,} visual tokens ({self.saved:.1%} saved)"
        told = html.paragraph(f"{self.reason}: {counts}", f"Granularity {self.granularity},")
        if self.routing is None:
            return told
        odds = sorted(zip(self.routing.granularities, self.routing.probabilities, strict=True))
        return told + html.bars((f"{g}", share, f"{share:.1%}", g == self.granularity) for g, share in odds)


def view_image(config: Config, crops: Crops, routing: Routing | None, looking: Looking) -> View:
    """Choose one image's granularity; `routing` is None if it is forced, or if there is no router.

    Raises InputError if no granularity fits the budget.
    """
    counts = {g: config.visual_tokens(g, crops.image_size) for g in config.granularities}
    if looking.granularity == AUTO:
        chosen, source = _choose(counts, routing, looking.max_visual_tokens, looking.token_cost)
    else:
        chosen, source = int(looking.granularity), "forced"
        counts[chosen] = config.visual_tokens(chosen, crops.image_size)
    return View(chosen, source, routing, len(crops), crops.crop_grid, counts[chosen], counts[max(counts)])


def _choose(
    counts: Mapping[int, int], routing: Routing | None, budget: int | None, token_cost: float
) -> tuple[int, ViewSource]:
    """Choose the best granularity that fits, or the finest where there are no scores, and say why.

    counts: the visual tokens that each granularity takes. token_cost: what the finest one's cost, in log-probability.
    """
    fitting = [g for g in counts if budget is None or counts[g] <= budget]
    if not fitting:
        raise InputError(
            f"no granularity fits into {budget} visual tokens; this image takes at least {min(counts.values())}"
        )
    if routing is None:
        return max(fitting), "finest" if max(fitting) == max(counts) else "budget"
    costs = {g: token_cost * count / max(counts.values()) for g, count in counts.items()}
    chosen, wished = routing.best_of(fitting, costs), routing.best_of(list(counts), costs)
    if chosen != wished:
        return chosen, "budget"
    return chosen, "router" if chosen == routing.choice else "cost"


def _floats(x: mx.array) -> tuple[float, ...]:
    return tuple(cast(list[float], x.tolist()))
