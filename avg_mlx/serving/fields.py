"""Reading a request's fields: null is absent, unknown ones are left alone, and a wrong one is named."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import shown
from .problems import bad_field

LARGEST = 1e300  # JSON has numbers that no float holds, and 1e400, which is read as infinite


@dataclass(frozen=True)
class Fields:
    """A JSON object of a request. `path` is where it stands there, as errors name it; the body itself has none."""

    values: Mapping[str, Any]
    path: str = ""

    def name(self, key: str) -> str:
        """A field's name with the path to it."""
        return f"{self.path}.{key}" if self.path else key

    def get(self, key: str) -> Any:
        """A field's value, or None."""
        return self.values.get(key)

    def text(self, key: str, default: str | None = None) -> str | None:
        """A text."""
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            raise self.wrong(key, "a text")
        return default if value is None else value

    def flag(self, key: str) -> bool:
        """True or false; false where it is absent."""
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return bool(value)

    def whole(self, key: str, least: int, most: int) -> int | None:
        """A whole number within bounds."""
        value = self.get(key)
        if isinstance(value, float) and value.is_integer():  # JavaScript has no other numbers
            value = int(value)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.wrong(key, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str, least: float = -math.inf, most: float = math.inf) -> float | None:
        """A number within bounds."""
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise self.wrong(key, _bounds(least, most))
        if abs(value) > LARGEST:
            raise self.wrong(key, "a smaller number")
        return float(value)

    def choice(self, key: str, choices: Sequence[str]) -> str | None:
        """One of a few words."""
        value = self.get(key)
        if value is not None and value not in choices:
            raise self.wrong(key, " or ".join(choices))
        return None if value is None else str(value)

    def object(self, key: str) -> "Fields | None":
        """An object inside."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return Fields(value, self.name(key))

    def objects(self, key: str) -> "Iterator[Fields]":
        """The objects of a list inside; there has to be one at least."""
        value = self.get(key)
        if not isinstance(value, list) or not value:
            raise self.wrong(key, "a list with something in it")
        for n, item in enumerate(value):
            path = f"{self.name(key)}[{n}]"
            if not isinstance(item, dict):
                raise bad_field(path, f"is {shown(item)}; expected an object")
            yield Fields(item, path)

    def wrong(self, key: str, expected: str) -> Exception:
        """What to raise for a field that is something else."""
        return bad_field(self.name(key), f"is {shown(self.get(key))}; expected {expected}")

    def refuse(self, key: str, why: str) -> None:
        """Raise if a field is there that asks for what this server does not do."""
        if self.get(key) is not None:
            raise bad_field(self.name(key), f"is not supported: {why}", "unsupported_parameter")


def _bounds(least: float, most: float) -> str:
    if math.isinf(most):
        return "a number" if math.isinf(least) else f"a number from {least:g}"
    return f"a number from {least:g} to {most:g}"
