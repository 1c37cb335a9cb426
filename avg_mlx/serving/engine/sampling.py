"""How a row of a running batch draws its tokens, whatever stands beside it."""

import secrets
from collections.abc import Sequence

import mlx.core as mx

from ...inference.options import LogitsProcessor, Sampler
from ...inference.sampling import Sampling
from ..jobs import Job


def sampler(sampling: Sampling) -> Sampler | None:
    """mlx-lm's sampler with a random state of its own; None where the likeliest token is taken.

    With the same seed it draws what mlx-lm's does in `generate`.
    """
    if sampling.greedy:
        return None
    from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

    state = mx.random.key(secrets.randbits(63) if sampling.seed is None else sampling.seed)

    def draw(logprobs: mx.array) -> mx.array:
        nonlocal state
        if 0 < sampling.top_p < 1:
            logprobs = apply_top_p(logprobs, sampling.top_p)
        if sampling.min_p:
            logprobs = apply_min_p(logprobs, sampling.min_p, sampling.min_tokens_to_keep)
        if sampling.top_k:
            logprobs = apply_top_k(logprobs, sampling.top_k)
        state, key = mx.random.split(state)
        return mx.random.categorical(logprobs * (1 / sampling.temp), key=key)

    return draw


def processors(job: Job, prompt: int, limit: int) -> list[LogitsProcessor]:
    """mlx-lm's logits processors for an answer of at most `limit` tokens to a prompt of `prompt` positions.

    The repetition penalty reads the prompt too, as in `generate`; presence and frequency are those of the answer.
    """
    from mlx_lm.sample_utils import make_logits_processors

    answered = make_logits_processors(
        presence_penalty=job.presence_penalty,
        presence_context_size=limit,
        frequency_penalty=job.frequency_penalty,
        frequency_context_size=limit,
    )
    return [
        *make_logits_processors(logit_bias=dict(job.logit_bias)),
        *job.sampling.logits_processors(),
        *_after(prompt, answered),
    ]


def _after(prompt: int, processors: Sequence[LogitsProcessor]) -> list[LogitsProcessor]:
    """Processors that do not see the prompt."""

    def after(processor: LogitsProcessor) -> LogitsProcessor:
        return lambda tokens, logits: processor(tokens[prompt:], logits)

    return [after(processor) for processor in processors]
