"""What this package asks of a tokenizer: the part of mlx-lm's `TokenizerWrapper` that it uses."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from ..errors import InputError, printable

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend


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


class Encoder(Protocol):
    """What turns text into ids."""

    bos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text, with BOS in front unless special tokens are left out."""


class Tokenizer(Encoder, Protocol):
    """A tokenizer with a chat template."""

    eos_token_ids: Collection[int]

    @property
    def backend_tokenizer(self) -> "Backend":
        """The tokenizer in Rust."""

    @property
    def special_tokens_map(self) -> Mapping[str, str]:
        """What templates call each special token, and its text."""

    @property
    def think_start(self) -> str | None:
        """What an answer's thinking begins with, if the model thinks."""

    @property
    def think_end(self) -> str | None:
        """What an answer's thinking ends with."""

    @property
    def has_thinking(self) -> bool:
        """What templates are told as `enable_thinking`."""

    @property
    def detokenizer(self) -> Detokenizer:
        """A new detokenizer."""

    def get_chat_template(self) -> str:
        """The template that writes conversations, in Jinja."""

    def get_vocab(self) -> dict[str, int]:
        """Every token and its id."""

    def add_eos_token(self, token: str) -> None:
        """Let another token, or the id that a text of digits spells, end answers."""


@contextmanager
def tokenizer_errors(what: str, remedy: str) -> Iterator[None]:
    """Turn whatever a tokenizer raises into an InputError that says what fails, why, and what to do."""
    try:
        yield
    except BaseException as error:
        # A panic in Rust is no Exception, and its class cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        raise InputError(f"{what} ({printable(reason)}); {remedy}") from error
