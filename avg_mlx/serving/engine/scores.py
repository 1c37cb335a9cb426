"""Log-probabilities of an answer's tokens, and the bytes that tokens stand for."""

import re
from collections import deque

import mlx.core as mx
import numpy as np

from ...inputs.tokenizer import Tokenizer
from ..jobs import ChosenToken, TokenScore


class Vocabulary:
    """What each token stands for: its name in the tokenizer says it."""

    def __init__(self, tokenizer: Tokenizer):
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        self._backend = tokenizer.backend_tokenizer
        self._bytes = {letter: byte for byte, letter in bytes_to_unicode().items()}
        self._special = {id for id, token in self._backend.get_added_tokens_decoder().items() if token.special}

    def data(self, id: int) -> bytes:
        """The bytes of a token; none for an id of the model's that the tokenizer does not have."""
        name = self._backend.id_to_token(id) or ""
        if id in self._special:
            return name.encode()
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", name):
            return bytes.fromhex(byte[1])
        if self._is_byte_level and all(letter in self._bytes for letter in name):
            return bytes(self._bytes[letter] for letter in name)
        return name.replace("▁", " ").encode()

    @property
    def _is_byte_level(self) -> bool:
        return "ByteLevel" in str(self._backend.decoder)

    def score(self, id: int, logprob: float) -> TokenScore:
        """A token with its log-probability."""
        data = self.data(id)
        return TokenScore(id, data.decode(errors="replace"), data, logprob)


class Scores:
    """A logits processor that changes nothing, and remembers the model's distribution of each step.

    It stands before all others, so that penalties and biases are not in it.
    """

    def __init__(self, vocabulary: Vocabulary, likeliest: int):
        self._vocabulary, self._likeliest = vocabulary, likeliest
        self._steps: deque[mx.array] = deque()  # log-probabilities of the tokens that are still to come

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Remember a step: logits is (1, vocabulary)."""
        wide = logits.astype(mx.float32)
        self._steps.append((wide - mx.logsumexp(wide, axis=-1, keepdims=True))[0])
        return logits

    def take(self, token: int) -> ChosenToken:
        """The next token with its score, now that it is known which one came of its step."""
        step = np.array(self._steps.popleft())
        best = np.argpartition(-step, self._likeliest - 1)[: self._likeliest]
        best = best[np.argsort(-step[best])]
        likeliest = tuple(self._vocabulary.score(int(id), float(step[id])) for id in best)
        return ChosenToken(**vars(self._vocabulary.score(token, float(step[token]))), likeliest=likeliest)
