"""How long work tells its caller how far it has come."""

from collections.abc import Callable

Progress = Callable[[int, int], None]  # (units done, units in all)


def silent(done: int, total: int) -> None:
    """Report to nobody."""
