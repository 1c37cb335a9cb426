"""The model `avg_mlx` of lmms-eval. Only lmms-eval imports this file, so that it may import lmms-eval at once."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms

from ..errors import InputError
from ..inference.options import AUTO, Granularity, Looking, check_max_tokens
from ..weights.checkpoint import load
from .answering import Answerer
from .asking import ask, open_journal
from .modes import name_of
from .questions import MAX_NEW_TOKENS, question_of
from .results import Result


@dataclass
class Counts(TokenCounts):
    """What an answer took, as the logged samples tell it."""

    result: Result | None = None
    mode: str = ""

    def to_dict(self) -> dict[str, Any]:
        """lmms-eval's own counts, and beside them visual tokens, granularity and seconds."""
        assert self.result is not None
        attempt, result = self.result.attempts[self.mode], self.result
        seconds = result.seconds | {"prefill": attempt.prefill, "generation": attempt.generation}
        return {
            **super().to_dict(),
            "visual_tokens": attempt.visual_tokens,
            "visual_tokens_finest": result.visual_tokens_finest,
            "granularity": attempt.granularities,
            "granularity_source": attempt.source,
            "seconds": seconds,
            "problem": attempt.problem,
        }


def generation(result: Result, mode: str) -> GenerationResult:
    """What lmms-eval is given of a result."""
    attempt = result.attempts[mode]
    positions = result.text_tokens + attempt.visual_tokens
    return GenerationResult(attempt.answer, Counts(positions, attempt.new_tokens, result=result, mode=mode))


class AvgMlx(lmms):
    """A converted model, which answers one question at a time.

    pretrained: a converted folder, a repository of the Hub, or demo. granularity, max_visual_tokens, token_cost: how
    closely it looks, as for `generate`. max_new_tokens: for tasks that set no limit. journal: a folder that keeps the
    answers, from which the same command resumes. skip_bad: questions that fail have empty answers. batch_size: 1.
    lmms-eval gives max_batch_size and device, which mean nothing here.

    Raises InputError for options that the model does not have.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        granularity: Granularity = AUTO,
        max_visual_tokens: int | None = None,
        token_cost: float = 0.0,
        max_new_tokens: int = MAX_NEW_TOKENS,
        journal: str | None = None,
        skip_bad: bool = False,
        adapter_path: str | None = None,
        revision: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        if str(batch_size) != "1":
            raise InputError(f"batch_size is {batch_size}; give 1, so that every answer has its own seconds")
        check_max_tokens(max_new_tokens)
        looking = Looking(granularity, max_visual_tokens, float(token_cost))
        model, tokenizer = load(str(pretrained), revision=revision, adapter_path=adapter_path)
        model.eval()
        looking.check(model.config)
        self.mode = name_of(looking)
        self.answerer = Answerer(model, tokenizer, {self.mode: looking})
        self.max_new_tokens, self.skip_bad = max_new_tokens, skip_bad
        self.journal = None if journal is None else Path(journal)

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer requests, in their order."""
        from tqdm import tqdm

        questions = [question_of(request, self.task_dict, self.max_new_tokens) for request in requests]
        journal = open_journal(self.journal, self.answerer) if self.journal else nullcontext()
        with journal as held, tqdm(desc="Model Responding") as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            results = ask(self.answerer, questions, held, self.skip_bad, show)
        return [generation(results[question.key], self.mode) for question in questions]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Raise InputError: this model answers, and does not weigh the answers of others."""
        raise InputError("avg_mlx gives no log-likelihoods; choose a task of output_type generate_until")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Raise InputError: questions have one round."""
        raise InputError("avg_mlx answers questions of one round; choose a task of output_type generate_until")
