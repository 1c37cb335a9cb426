"""Dataclasses of options: the annotation of a field says what it does and which values it may have."""

import contextlib
import math
import numbers
import os
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..errors import InputError, shown

ACCEPTED: dict[type, Any] = {
    bool: bool,
    int: numbers.Integral,
    float: numbers.Real,
    str: (str, os.PathLike),
    Path: (str, os.PathLike),
}


@dataclass(frozen=True)
class Option:
    """What an option does and which values it may have, written into its field's type: `Annotated[int, Option(…)]`.

    What the field says itself is filled in by `options_of`.
    """

    help: str
    group: str = ""  # heading in the help
    low: float = -math.inf
    above: float = -math.inf  # a lower bound that is not allowed itself
    high: float = math.inf
    metavar: str | None = None
    fixed: bool = True  # must stay the same when a run is resumed
    name: str = ""
    kind: type[Any] = str  # one of ACCEPTED
    choices: tuple[str, ...] = ()
    default: Any = ...  # where there is none

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.default is ...

    @property
    def expected(self) -> str:
        """The values that the option may have, in words."""
        if self.choices:
            return f"{', '.join(self.choices[:-1])} or {self.choices[-1]}"
        if self.kind not in (int, float):
            return {bool: "true or false", str: "a text", Path: "a path"}[self.kind]
        low = f"above {self.above:g}" if self.above > -math.inf else f"from {self.low:g}"
        high = f" up to {self.high:g}" if self.high < math.inf else " upwards" if self.low > -math.inf else ""
        return f"{'a whole number' if self.kind is int else 'a number'} {low}{high}"

    def read(self, text: str) -> Any:
        """Turn text into the option's kind of value, or leave it for `check` to refuse."""
        try:
            return text if self.kind is bool else self.kind(text)
        except ValueError:
            return text

    def check(self, value: object) -> Any:
        """Return a value as the option holds it; InputError if the option may not have it."""
        if value is None and self.default is None:
            return None
        if isinstance(value, ACCEPTED[self.kind]) and isinstance(value, bool) == (self.kind is bool):
            with contextlib.suppress(OverflowError, RuntimeError):  # 400 digits are no float, and some ~ has no home
                held = self.kind(value)
                if self._allows(held):
                    return held.expanduser() if isinstance(held, Path) else held
        raise InputError(f"{self.name} is {shown(value)}; expected {self.expected}")

    def _allows(self, value: Any) -> bool:
        if self.kind in (int, float):
            return self.low <= value <= self.high and self.above < value < math.inf
        return not self.choices or value in self.choices


def options_of(kind: type[Any]) -> dict[str, Option]:
    """{name: option} of a dataclass, in the order of its fields."""
    hints, found = get_type_hints(kind, include_extras=True), {}
    for entry in fields(kind):
        hint, *about = get_args(hints[entry.name]) or (None,)
        if about and isinstance(about[0], Option):
            choices = get_args(hint) if get_origin(hint) is Literal else ()
            [of] = [str] if choices else [part for part in get_args(hint) or (hint,) if part is not NoneType]
            default = ... if entry.default is MISSING else entry.default
            found[entry.name] = replace(about[0], name=entry.name, kind=of, choices=choices, default=default)
    return found


class Checked:
    """Options that are checked when they are made; InputError names the option, its value and the allowed range."""

    def __post_init__(self) -> None:
        for name, option in options_of(type(self)).items():
            object.__setattr__(self, name, option.check(getattr(self, name)))
