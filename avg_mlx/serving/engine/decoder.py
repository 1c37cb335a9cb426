"""mlx-lm's running batch, which answers join and leave between any two tokens."""

from collections.abc import Iterator
from typing import Any

from mlx_lm.generate import BatchGenerator

from ...inference.caches import Key
from ...inputs.tokenizer import Tokenizer
from ...model.avg_llava import Model
from .row import Row


class Decoder:
    """The answers that are decoded together, at most `slots`."""

    def __init__(self, model: Model, tokenizer: Tokenizer, slots: int):
        self._model, self._slots = model, slots
        self._stop_tokens = [[token] for token in tokenizer.eos_token_ids]
        self._rows: dict[int, Row] = {}
        self._generator = self._make()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> list[Row]:
        """The answers."""
        return list(self._rows.values())

    @property
    def nbytes(self) -> int:
        """Bytes held by KV."""
        return self._generator.prompt_cache_nbytes

    def insert(self, row: Row, layers: list[Any]) -> None:
        """Let an answer join. `layers` are mlx-lm's caches of its prompt without the last position."""
        [uid] = self._generator.insert(
            [row.ids[-1:]],
            max_tokens=[row.limit],
            caches=[layers],
            all_tokens=[row.ids[:-1]],
            samplers=[row.sampler],  # type: ignore[list-item]  # None, too, for the batch's own
            logits_processors=[row.processors],
        )
        self._rows[uid] = row

    def step(self) -> Iterator[tuple[Row, list[Key], list[Any]]]:
        """Decode one token of every answer. Yields those that have ended, with keys of positions and their KV."""
        _, responses = self._generator.next()
        for response in responses:
            row = self._rows[response.uid]
            row.tokens.append(response.token)  # whose KV there is now, whatever its text is
            try:
                row.take(response.token)
            except Exception as error:  # such as a detokenizer's: the other answers are sound
                row.error, row.finished = error, True
            if row.finished:
                yield row, *self._leave(response)

    def remove(self, row: Row) -> None:
        """Let an answer leave before it has ended."""
        uid = next(uid for uid, other in self._rows.items() if other is row)
        del self._rows[uid]
        self._generator.remove([uid])

    def reset(self) -> None:
        """Forget all answers and begin anew: after a fault, nothing in the batch can be relied on."""
        self.close()
        self._rows = {}
        self._generator = self._make()

    def close(self) -> None:
        """Give back what mlx-lm has set for the time it decodes."""
        self._generator.close()

    def _leave(self, response: Any) -> tuple[list[Key], list[Any]]:
        row, layers, ids = self._rows.pop(response.uid), response.prompt_cache, response.all_tokens
        if layers is None:  # it ended with a stop text, of which the generator knows nothing
            removed = self._generator.remove([response.uid], return_prompt_caches=True)
            layers, ids = removed[response.uid]
        return [*row.keys, *row.tokens][: len(ids)], layers

    def _make(self) -> BatchGenerator:
        return BatchGenerator(
            self._model.language_model,
            stop_tokens=self._stop_tokens,
            completion_batch_size=self._slots,
            prefill_batch_size=self._slots,
        )
