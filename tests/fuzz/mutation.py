"""Small damages, drawn at random: to bytes, and to what JSON holds."""

import json
from random import Random
from typing import Any

# What stands where something else is expected.
ODD_VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 7, 10**3, 10**6, 10**9, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e-300,
    1e308, float("inf"), float("-inf"), float("nan"), "", "0", "a", "<image>", "../x", "/etc/passwd", "\u0000",
    "\ud800", "é" * 9, "a" * 10**5, [], [[]], [None], [0, 0], [1] * 10**4, {}, {"": {}}, {"type": "a"},
]  # fmt: skip
ODD_TEXTS = [
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\x00",
    b"NaN",
    b"-Infinity",
    b"1e999",
    b'"\\ud800"',
    b"\xed\xa0\x80",
    b"//",
]
DEEP = 10**5  # brackets inside each other
DIGITS = 5_000  # more than Python turns into a number


def damaged_bytes(content: bytes, random: Random) -> bytes:
    """A file with a few damages: bits, runs of bytes, a length, its end."""
    data = bytearray(content)
    for _ in range(random.choice([1, 1, 2, 4, 16])):
        place, length = random.randrange(len(data) + 1), random.choice([1, 2, 4, 8, 64])
        match random.randrange(8):
            case 0 if data:
                data[place % len(data)] ^= 1 << random.randrange(8)
            case 1:
                data[place : place + length] = random.randbytes(length)
            case 2:
                data[place : place + length] = random.choice([b"\x00", b"\xff", b"\x7f", b"\x80"]) * length
            case 3:
                del data[place : place + length]
            case 4:
                data[place:place] = data[place : place + length] * random.choice([1, 2, 100])
            case 5:
                data[place : place + 4] = random.choice([0, 1, 2**16, 2**31 - 1, 2**32 - 1]).to_bytes(4, "big")
            case 6:
                data[place : place + 4] = random.choice([0, 1, 2**16, 2**31 - 1, 2**32 - 1]).to_bytes(4, "little")
            case 7 if random.random() < 0.3:
                del data[place:]
    return bytes(data)


def damaged_json(content: Any, random: Random) -> bytes:
    """JSON with damages to what it holds, and rarely to its text."""
    content = json.loads(json.dumps(content))
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        content = with_odd_value(content, random)
    text = json.dumps(content).encode()
    return _odd_text(text, random) if random.random() < 0.15 else text


def with_odd_value(content: Any, random: Random) -> Any:
    """The same with one of its values, at any depth, changed, taken away, or put elsewhere."""
    places = list(_places(content))
    if not places:
        return random.choice(ODD_VALUES)
    holder, key = random.choice(places)
    match random.randrange(6):
        case 0:
            del holder[key]
        case 1:
            other, there = random.choice(places)
            holder[key] = json.loads(json.dumps(other[there]))
        case 2 if isinstance(holder, dict):
            holder[random.choice(["", "type", f"{key}s", key.upper(), "auto_map"])] = random.choice(ODD_VALUES)
        case 3 if isinstance(holder, list):
            holder.insert(key, random.choice([holder[key], *ODD_VALUES]))
        case 4 if isinstance(holder[key], int | float):
            holder[key] *= random.choice([-1, 0, 0.5, 2, 1000, 10**6])
        case _:
            holder[key] = random.choice(ODD_VALUES)
    return content


def _places(content: Any):
    """(holder, key) of every value."""
    keys = content.keys() if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    for key in list(keys):
        yield content, key
        yield from _places(content[key])


def _odd_text(text: bytes, random: Random) -> bytes:
    """Text that is hardly JSON any more."""
    place = random.randrange(len(text) + 1)
    match random.randrange(6):
        case 0:
            return text[:place]
        case 1:
            return text[:place] + random.choice(ODD_TEXTS) + text[place:]
        case 2:
            return b"[" * DEEP + text + b"]" * DEEP
        case 3:
            return b'{"a":' * DEEP + text + b"}" * DEEP
        case 4:
            return text.replace(b"1", b"1" * DIGITS, 1)
        case _:
            return damaged_bytes(text, random)
