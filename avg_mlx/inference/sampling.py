"""Sampling options by the names of mlx-lm's command line, and the functions that mlx-lm makes of them."""

from dataclasses import dataclass

import mlx.core as mx

from ..inputs.tokenizer import Tokenizer
from .options import LogitsProcessor, Sampler

COLDEST = 1e-4  # lower temperatures are greedy: their scaled log-probabilities overflow float16


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; greedily by default. The fields are mlx-lm's options."""

    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    min_tokens_to_keep: int = 1
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    repetition_penalty: float | None = None
    repetition_context_size: int = 20
    seed: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temp < COLDEST

    def sampler(self, tokenizer: Tokenizer) -> Sampler:
        """Seed MLX's random state if there is a seed, and return mlx-lm's sampler."""
        from mlx_lm.sample_utils import make_sampler

        if self.seed is not None:
            mx.random.seed(self.seed)
        return make_sampler(
            0.0 if self.greedy else self.temp,
            self.top_p,
            self.min_p,
            self.min_tokens_to_keep,
            self.top_k,
            self.xtc_probability,
            self.xtc_threshold,
            # As in mlx-lm, exclude line ends and ends of answers from what XTC may remove.
            xtc_special_tokens=[*tokenizer.encode("\n"), *tokenizer.eos_token_ids] if self.xtc_probability else [],
        )

    def logits_processors(self) -> list[LogitsProcessor]:
        """Return mlx-lm's logits processors."""
        from mlx_lm.sample_utils import make_logits_processors

        return make_logits_processors(
            repetition_penalty=self.repetition_penalty, repetition_context_size=self.repetition_context_size
        )
