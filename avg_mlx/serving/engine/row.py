"""An answer that is decoded beside others: its tokens become text, and the text pieces."""

import time
from dataclasses import replace

from ...inference.answer import Answer
from ...inference.caches import Key
from ...inference.options import LogitsProcessor, Sampler
from ...inference.steps import Layout
from ...inputs.tokenizer import Tokenizer
from ..jobs import ChosenToken, Done, Piece
from .sampling import processors, sampler
from .scores import Scores, Vocabulary
from .stop_text import StopText
from .work import Work


class Row:
    """A request whose prompt is in its KV, but for the last position."""

    def __init__(
        self, work: Work, layout: Layout, limit: int, reused: int, tokenizer: Tokenizer, vocabulary: Vocabulary
    ):
        job = work.job
        self.work, self.limit, self.reused = work, limit, reused
        self.ids = layout.position_ids(tokenizer.bos_token_id or 0)
        self.keys: list[Key] = layout.position_keys()
        self.layout = replace(layout, crops=())  # which hold pixels
        self.sampler: Sampler | None = sampler(job.sampling)
        self.scores = None if job.logprobs is None else Scores(vocabulary, job.logprobs)
        self.processors: list[LogitsProcessor] = [
            *([self.scores] if self.scores else []),
            *processors(job, layout.positions, limit),
        ]
        self.tokens: list[int] = []
        self.text = ""
        self.finished = False
        self.error: Exception | None = None  # which ended it
        self._stop = StopText(job.stop)
        self._eos = tokenizer.eos_token_ids
        self._detokenizer = tokenizer.detokenizer
        self._begun = time.perf_counter()
        self._waited = 0.0
        self._scored: list[tuple[int, ChosenToken]] = []  # where a token's text begins in the answer's, and the token
        self._decoded = 0  # characters of text, those held back included

    def take(self, token: int) -> None:
        """Take the next of `tokens`, and deliver what text is certain now."""
        if len(self.tokens) == 1:
            seconds = self.layout.seconds
            self._waited = self.work.waited(seconds.vision + seconds.router + seconds.prefill)
        score = self.scores.take(token) if self.scores else None
        ended = token in self._eos
        if not ended:
            self._detokenizer.add_token(token)
            self._scored += [(self._decoded, score)] if score else []
        self.finished = ended or len(self.tokens) == self.limit
        if self.finished:
            self._detokenizer.finalize()
        self._push(self._detokenizer.last_segment)
        if self.finished:
            self._finish(ended)

    def _push(self, segment: str) -> None:
        """Deliver a segment of text up to a stop text, or to what might be the beginning of one."""
        self._decoded += len(segment)
        text = self._stop.push(segment)
        if self.finished:
            text += self._stop.finish()
        self.finished |= self._stop.stopped
        self.text += text
        whole = self.finished and not self._stop.stopped
        tokens = tuple(score for begin, score in self._scored if begin < len(self.text) or whole)
        self._scored = self._scored[len(tokens) :]
        if text or tokens:
            self.work.tell(Piece(text, tokens))

    def _finish(self, ended: bool) -> None:
        self.layout.seconds.generation = time.perf_counter() - self._begun
        answer = Answer.of(self.text, self.tokens, ended or self._stop.stopped, self.layout, self.reused)
        self.work.tell(Done(answer, self._waited))
