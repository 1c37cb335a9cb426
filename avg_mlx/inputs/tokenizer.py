"""What this package asks of a tokenizer: the part of mlx-lm's `TokenizerWrapper` that it uses."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol


class Detokenizer(Protocol):
    """Turns tokens into text as they come, and holds back characters that are not complete yet."""

    @property
    def text(self) -> str:
        """The whole text so far."""

    @property
    def last_segment(self) -> str:
        """The text that has come since this was last asked."""

    def add_token(self, token: int) -> None:
        """Take the next token."""

    def finalize(self) -> None:
        """Give out what was held back."""


class Tokenizer(Protocol):
    """A tokenizer with a chat template."""

    bos_token_id: int | None
    eos_token_ids: Collection[int]

    @property
    def detokenizer(self) -> Detokenizer:
        """A new detokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text, with BOS in front unless special tokens are left out."""

    def apply_chat_template(
        self, conversation: Sequence[Mapping[str, Any]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        """The text of a conversation."""

    def get_vocab(self) -> dict[str, int]:
        """Every token and its id."""

    def add_eos_token(self, token: str) -> None:
        """Let another token, or the id that a text of digits spells, end answers."""
