"""Ways to choose a granularity for a question."""

import hashlib
from collections.abc import Sequence

import numpy as np

from ..config import Config
from ..errors import InputError

ADAPTIVE, RANDOM, ORACLE = "adaptive", "random", "oracle"


def all_modes(config: Config) -> list[str]:
    """Every mode of a model: the router's choice, each granularity, and chance and hindsight among several."""
    fixed = [str(g) for g in sorted(config.granularities)]
    return [*([ADAPTIVE] if config.has_router else []), *fixed, *([RANDOM, ORACLE] if len(fixed) > 1 else [])]


def check_modes(modes: Sequence[str | int], config: Config) -> list[str]:
    """Return each of `modes` once, in the order of `all_modes`. Raises InputError if the model lacks one."""
    known, wanted = all_modes(config), [str(mode) for mode in modes]
    if ADAPTIVE in wanted and not config.has_router:
        raise InputError(f"this model has no router; choose from {', '.join(known)}")
    unknown = [mode for mode in wanted if mode not in known]
    if unknown:
        raise InputError(f"mode {unknown[0]} is not one of this model's; choose from {', '.join(known)}")
    return [mode for mode in known if mode in wanted]


def granularity_of(
    mode: str,
    granularities: Sequence[int],
    probabilities: Sequence[float] | None,
    losses: Sequence[float] | None,
    seed: int,
    key: str,
) -> int:
    """The granularity that a mode takes, given the router's probabilities and the feedback losses of all of them.

    Chance is a function of `seed` and the question's `key`, so that neither the order of questions nor the process
    that answers matters.
    """
    if mode == ADAPTIVE:
        assert probabilities is not None
        return granularities[int(np.argmax(probabilities))]
    if mode == ORACLE:
        assert losses is not None
        return granularities[int(np.argmin(losses))]
    if mode == RANDOM:
        digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
        return granularities[int.from_bytes(digest) % len(granularities)]
    return int(mode)
