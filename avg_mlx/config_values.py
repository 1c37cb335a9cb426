"""The values of a config, checked: each of its type, within its bounds, or one of those that can be run."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from .errors import InputError, shown

MAX_SIZE = 1 << 24  # of any width, vocabulary, context or count of heads; products of two stay far below 64 bits

IN_WORDS: dict[Any, str] = {
    int: f"a whole number above 0, up to {MAX_SIZE}",
    range: f"a whole number from 0 to {MAX_SIZE}",
    float: "a number above 0",
    bool: "true or false",
    str: "a text",
    dict: "an object",
    tuple[float, float, float]: "a list of three numbers",
    list[int]: "a token's number or a list of them",
    list[str]: "a list of names",
}


def check_types(keys: Mapping[str, Any], where: str, types: Mapping[str, Any], required: Iterable[str] = ()) -> None:
    """Raise an InputError that lists all missing keys, or else all values that are not of their type in IN_WORDS."""
    missing = [name for name in required if name not in keys]
    if missing:
        raise InputError(f"{where} lacks {', '.join(missing)}; is it the config of a LLaVA checkpoint?")
    wrong = [
        f"{name} is {shown(keys[name])}, expected {IN_WORDS[kind]}"
        for name, kind in types.items()
        if name in keys and not _is(kind, keys[name])
    ]
    if wrong:
        raise InputError(f"{where} is damaged: {'; '.join(wrong)}; download it again")


def _is(kind: Any, value: Any) -> bool:
    if kind in (int, range):
        return type(value) is int and (kind is int) <= value <= MAX_SIZE
    if kind is float:
        return type(value) in (int, float) and 0 < value < math.inf
    if kind == tuple[float, float, float]:
        finite = isinstance(value, list | tuple) and [type(n) in (int, float) and abs(n) < math.inf for n in value]
        return finite == [True] * 3
    if kind == list[int]:
        return all(_is(range, number) for number in (value if isinstance(value, list) else [value]))
    if kind == list[str]:
        return isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
    return isinstance(value, kind)


def at_most(what: str, value: int, limit: int) -> None:
    """Raise InputError for a number above its limit."""
    if value > limit:
        raise InputError(f"{what} is {value}, but at most {limit} can be run; is the config damaged?")


def one_of(what: str, value: Any, allowed: tuple[str, ...]) -> str:
    """Return a value that is among the `allowed` ones. Raises InputError for any other."""
    if value not in allowed:
        raise InputError(f"{what} is {shown(value)}, but only {' and '.join(map(repr, allowed))} can be run")
    return value
