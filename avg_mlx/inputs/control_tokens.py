"""Control tokens come from the chat template only: spelled out in a message, they are text.

A tokenizer finds `</s>` wherever it stands, so that a message could end its own turn and begin another one. Where a
message spells a control token, a second tokenizer takes over. It is the same but for the control tokens, which it knows
by a spelling that nobody can guess, and the template's own are respelled for it. All other ids stay what they were.
"""

import json
import re
import secrets
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from ..errors import InputError
from .tokenizer import Encoder, Tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend


class ControlTokens:
    """The special tokens of a tokenizer, and the added ones that its chat template spells, but for those `excepted`."""

    def __init__(self, tokenizer: Tokenizer, excepted: Collection[str | None]):
        self._backend, self._bos_token_id = tokenizer.backend_tokenizer, tokenizer.bos_token_id
        template = tokenizer.get_chat_template()
        added = [t for t in self._backend.get_added_tokens_decoder().values() if t.content not in excepted]
        tokens = [t.content for t in added if t.special or (t.content in template and not t.content.isspace())]
        self._tokens = sorted(tokens, key=len, reverse=True)  # the longest is found first
        normalizer = self._backend.normalizer
        self._normalize = normalizer.normalize_str if normalizer else str
        self._spelled = {*tokens, *map(self._normalize, tokens)} - {""}
        self._spelling, self._begin, self._end = (secrets.token_hex(16) for _ in range(3))

    def occur_in(self, texts: Sequence[str]) -> bool:
        """Whether any of the texts spells one of them."""
        text = "\0".join(texts)
        found = text + "\0" + self._normalize(text)  # some are looked for before the text is normalized, some after
        return any(token in found for token in self._spelled)

    def enclose(self, text: str) -> str:
        """Mark where a message's text begins and ends, inside of the space around it that a template may take away."""
        core = text.strip()
        return text.replace(core, self._begin + core + self._end, 1) if core else text

    def respell(self, text: str) -> str:
        """Return a conversation of enclosed messages for `encoder`: what stands between them is the template's."""
        control = re.compile("|".join(map(re.escape, self._tokens)))
        parts = re.split(f"({self._begin}|{self._end})", text)
        if parts[1::4] != [self._begin] * len(parts[1::4]) or parts[3::4] != [self._end] * len(parts[1::4]):
            raise InputError(
                f"a message spells a token that only the chat template may write ({', '.join(self._tokens)}), and the "
                "template takes messages apart; leave it out"
            )
        parts[0::4] = [control.sub(lambda token: self._spelling + token[0], part) for part in parts[0::4]]
        return "".join(parts[0::2])

    @cached_property
    def encoder(self) -> Encoder:
        """The tokenizer that finds control tokens in the other spelling only."""
        from tokenizers import Tokenizer as Backend

        spellings = {token: self._spelling + token for token in self._tokens}
        keys = json.loads(self._backend.to_str()) | {"padding": None, "truncation": None}
        model = keys["model"]
        for token in keys["added_tokens"]:
            token["content"] = spellings.get(token["content"], token["content"])
        model["vocab"] = {spellings.get(piece, piece): id for piece, id in model["vocab"].items()}
        model["merges"] = [
            pair for pair in model.get("merges", []) if spellings.keys().isdisjoint([*pair, "".join(pair)])
        ]
        model["unk_token"] = spellings.get(model["unk_token"], model["unk_token"])
        return _Respelled(Backend.from_str(json.dumps(keys)), self._bos_token_id)


class _Respelled:
    def __init__(self, backend: "Backend", bos_token_id: int | None):
        self._backend, self.bos_token_id = backend, bos_token_id

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
