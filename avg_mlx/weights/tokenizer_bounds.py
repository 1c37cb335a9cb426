"""What a tokenizer.json may ask for: the library that runs it aborts the process where memory ends.

A tokenizer is a small program too. Its parts may replace text by more text, repeat it, and match patterns that take
exponential time. So only the parts that language models' tokenizers have are allowed, and only as far as they can make
nothing large of a small text.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import InputError, printable

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MODELS = ("BPE", "WordLevel")  # the latter as bench makes it up
PARTS = {
    "normalizer": ("NFC", "Prepend", "Replace"),
    "pre_tokenizer": ("ByteLevel", "Digits", "Metaspace", "Punctuation", "Split", "Whitespace", "WhitespaceSplit"),
    "post_processor": ("ByteLevel", "TemplateProcessing"),
    "decoder": ("ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Strip"),
}
MAX_GROWTH = 6  # of a text that is normalized or decoded: twofold with Llama's, threefold at most with Qwen's
MAX_ADDED = 16  # tokens around a text
MAX_PIECE = 1024  # characters of a token; the longest known have some hundreds

# What a pattern of linear time is made of: atoms with their quantifiers, and the alternatives of GPT-2's and Llama 3's
# patterns that try again, but not often where \s+ is an alternative too.
_TOKEN = re.compile(
    r"""(?P<bar>\|)
      | (?P<space>\\s\+\(\?!\\S\) | \\s\*\[\\r\\n\]\+?)(?=\||$)
      | (?: \[\^?(?:\\[pP]\{\^?\w+\}|\\.|[^\[\]\\])+\]  # [^\s\p{L}]
          | \\[pP]\{\^?\w+\} | \\[sSdDwWrnt] | \\[^A-Za-z0-9]
          | \(\?i?:[^()\[\]\\.*+?{}^$]+\)  # (?i:'s|'t)
          | [^()\[\]\\.*+?{}^$|] )
        (?P<times>[*+?]|\{\d(?:,\d)?\})?""",
    re.VERBOSE,
)


def check_tokenizer(keys: Mapping[str, Any]) -> None:
    """Raise InputError if a tokenizer may make much of little. keys: the content of its tokenizer.json, or parts of it.

    Keys of another form than a tokenizer's raise whatever they do.
    """
    model = keys.get("model")
    if model is not None:
        if model["type"] not in MODELS:
            raise InputError(f"its model is {printable(model['type'])}, expected {' or '.join(MODELS)}")
        pieces = [*model["vocab"], *(token["content"] for token in keys.get("added_tokens") or [])]
        affixes = [model.get(name) or "" for name in ("continuing_subword_prefix", "end_of_word_suffix")]
        longest = max(map(len, [*pieces, *affixes]), default=0)
        if longest > MAX_PIECE:
            raise InputError(f"it has a token of {longest} characters, and at most {MAX_PIECE} are allowed")
    for name, types in PARTS.items():
        steps = _steps(keys.get(name))
        foreign = [printable(step["type"]) for step in steps if step["type"] not in types]
        if foreign:
            raise InputError(f"its {name} has {', '.join(foreign)}; known are {', '.join(types)}")
        growth = math.prod(_growth(step) for step in steps)
        if growth > MAX_GROWTH:
            raise InputError(f"its {name} may make a text {growth:.0f} times as long; {MAX_GROWTH} are allowed")
        if sum(step["type"] == "TemplateProcessing" for step in steps) > 1:
            raise InputError("it adds tokens to a text twice")


def parts_of(backend: "Tokenizer") -> dict[str, Any]:
    """Return what a loaded tokenizer does beside its model, as a tokenizer.json has it."""
    parts = {name: getattr(backend, name) for name in PARTS}
    return {name: json.loads(part.__getstate__()) for name, part in parts.items() if part is not None}


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps that a part of a tokenizer consists of, one after another."""
    if part is None or part["type"] != "Sequence":
        return [part] if part else []
    (steps,) = (value for value in part.values() if isinstance(value, list))
    return [inner for step in steps for inner in _steps(step)]


def _growth(step: dict[str, Any]) -> float:
    """How many times as long a step may make a text."""
    match step["type"]:
        case "NFC":
            return 3
        case "Prepend":
            return 1 + len(step["prepend"])
        case "Replace":
            pattern = step["pattern"].get("String")
            if not pattern:
                raise InputError("it replaces what is not a fixed text")
            return max(1, len(step["content"]) / len(pattern))
        case "Split":
            pattern = step["pattern"].get("Regex", "")
            if not is_linear(pattern):
                raise InputError(f"it splits at {printable(pattern, 60)}, which may take very long")
        case "TemplateProcessing":
            tokens = step["special_tokens"]
            unknown = [
                piece
                for piece in step["single"]
                if "Sequence" not in piece and piece["SpecialToken"]["id"] not in tokens
            ]
            texts = sum("Sequence" in piece for piece in step["single"])
            longest = max(len(step["single"]), *(len(token["ids"]) for token in tokens.values()), 0)
            if unknown or texts != 1 or longest > MAX_ADDED:
                raise InputError(f"it repeats a text, or adds more than {MAX_ADDED} tokens or unknown ones to it")
    return 1


def is_linear(pattern: str) -> bool:
    """Whether a regular expression takes linear time, and is of the plain kind in which this can be seen.

    In each alternative at most two atoms are optional, and what is repeated without limit is followed only by what may
    be absent, so that nothing is tried over and over again.
    """
    branches: list[list[re.Match[str]]] = [[]]
    at = 0
    while at < len(pattern):
        token = _TOKEN.match(pattern, at)
        if token is None or (token["space"] and branches[-1]):
            return False
        if token["bar"]:
            branches.append([])
        else:
            branches[-1].append(token)
        at = token.end()
    spaces = any("".join(token[0] for token in branch) == r"\s+" for branch in branches)
    return all(_branch_is_linear(branch, spaces) for branch in branches)


def _branch_is_linear(branch: list[re.Match[str]], spaces: bool) -> bool:
    times = [token["times"] or "" for token in branch]
    endless = next((n for n, quantifier in enumerate(times) if quantifier in ("*", "+")), len(times))
    optional = sum(quantifier == "?" or "," in quantifier for quantifier in times[:endless])
    again = [quantifier for quantifier in times[endless + 1 :] if quantifier not in ("*", "?")]
    return optional <= 2 and not again and (spaces or not any(token["space"] for token in branch))
