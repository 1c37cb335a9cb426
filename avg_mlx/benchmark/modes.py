"""The modes of a benchmark: how closely each looks at images, by a name that can be typed."""

import math
from collections.abc import Sequence

from ..config import Config
from ..errors import InputError
from ..evaluation.modes import ADAPTIVE
from ..inference.options import Looking

COST, BUDGET = "cost=", "budget="
EXPECTED = "expected adaptive, a granularity, cost=COST or budget=TOKENS"


def looking_of(mode: str) -> Looking:
    """What a mode means: `adaptive`, a granularity, `cost=` a token cost, or `budget=` visual tokens an image.

    Raises InputError for any other name.
    """
    if mode == ADAPTIVE:
        return Looking()
    if mode.isdecimal():
        return Looking(granularity=int(mode))
    for prefix, convert in ((COST, float), (BUDGET, int)):
        if mode.startswith(prefix):
            try:
                value = convert(mode.removeprefix(prefix))
            except ValueError:
                break
            if value < 0 or math.isnan(value) or (prefix == BUDGET and not value):
                break
            return Looking(token_cost=value) if prefix == COST else Looking(max_visual_tokens=int(value))
    raise InputError(f"mode {mode} is unknown; {EXPECTED}")


def name_of(looking: Looking) -> str:
    """The name of the mode that looks like this."""
    if looking.max_visual_tokens is not None:
        if looking.token_cost:
            raise InputError("max_visual_tokens and token_cost are two modes; give one")
        return f"{BUDGET}{looking.max_visual_tokens}"
    if looking.token_cost:
        return f"{COST}{looking.token_cost:g}"
    return ADAPTIVE if looking.granularity == "auto" else str(looking.granularity)


def default_modes(config: Config) -> list[str]:
    """The router's choice, where there is a router, and the finest granularity, to which times are compared."""
    return [*([ADAPTIVE] if config.has_router else []), str(config.finest)]


def check_modes(modes: Sequence[str | int], config: Config) -> dict[str, Looking]:
    """Each mode once, by its name, with what it means. Raises InputError for one that the model does not have."""
    lookings = [looking_of(str(mode)) for mode in modes]
    for looking in lookings:
        looking.check(config)
        if looking == Looking() and not config.has_router:
            raise InputError(f"this model has no router, so there is no mode {ADAPTIVE}; {EXPECTED}")
    return {name_of(looking): looking for looking in lookings}
