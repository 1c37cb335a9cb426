"""What the engine has done since it was started."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

from ...inference.steps import Seconds
from ...inference.view import View
from ..jobs import Totals


@dataclass
class Tally:
    """Counts what `Totals` tells."""

    outcomes: Counter[str] = field(default_factory=Counter)
    granularities: Counter[int] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    seconds: Seconds = field(default_factory=Seconds)

    def routed(self, views: Sequence[View], positions: int, vision_calls: int, under_load: bool) -> None:
        """Count a request that was looked at."""
        image_positions = sum(view.visual_tokens for view in views)
        self.granularities.update(view.granularity for view in views)
        self.counts.update(
            under_load=int(under_load),
            text_positions=positions - image_positions,
            image_positions=image_positions,
            image_positions_finest=sum(view.visual_tokens_finest for view in views),
            vision_calls=vision_calls,
            vision_hits=len(views) - vision_calls,
        )

    def worked(self, seconds: Seconds) -> None:
        """Add seconds of work."""
        for stage in fields(Seconds):
            setattr(self.seconds, stage.name, getattr(self.seconds, stage.name) + getattr(seconds, stage.name))

    def totals(self) -> Totals:
        """A copy that does not change any more."""
        counted = {name: self.counts[name] for name in COUNTED}
        return Totals(dict(self.outcomes), dict(self.granularities), seconds=replace(self.seconds), **counted)


COUNTED = [field.name for field in fields(Totals) if field.type in ("int", int)]
