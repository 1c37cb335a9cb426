"""lmms-eval's own scores of answers that are there."""

import argparse
import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AvgMlxError
from .data import reason
from .intervals import Interval, interval_of
from .paper import BY_TASK

if TYPE_CHECKING:
    from lmms_eval.api.task import ConfigurableTask

THINKING = '[["<think>", "</think>"], ["<analysis>", "</analysis>"]]'  # lmms-eval's default of what to take away


@dataclass(frozen=True)
class Score:
    """A metric's value, in lmms-eval's scale."""

    value: float
    interval: Interval | None


def score(task: "ConfigurableTask", answers: Mapping[int, str], limit: int | None, folder: Path) -> dict[str, Score]:
    """Have lmms-eval score a task, by metric.

    answers: by the documents' numbers. limit: as many documents were asked. folder: some tasks write files there for
    evaluation servers.

    Raises AvgMlxError if lmms-eval fails.
    """
    from lmms_eval.evaluator import evaluate

    options = argparse.Namespace(process_with_media=False, output_path=str(folder), reasoning_tags=THINKING)
    name, noise = task.config.task, io.StringIO()
    try:
        with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
            found = evaluate(
                _replay(answers),
                {name: task},
                limit=limit,
                bootstrap_iters=0,
                cli_args=options,
                distributed_executor_backend="torchrun",  # the other one would look for accelerators
            )
    except Exception as error:
        raise AvgMlxError(f"lmms-eval cannot score {name} ({reason(error)})") from error
    samples: Sequence[Mapping[str, Any]] = found["samples"][name]
    scores = {}
    for key, value in found["results"][name].items():
        metric, _, _ = key.partition(",")
        if metric in task.aggregation() and isinstance(value, int | float) and metric not in scores:
            items = [sample[metric] for sample in samples if metric in sample]
            scores[metric] = Score(float(value), interval_of(metric, float(value), items, name in BY_TASK))
    return scores


def _replay(answers: Mapping[int, str]) -> Any:
    """A model that gives these answers."""
    from lmms_eval.api.model import lmms

    class Replay(lmms):
        is_simple = False

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            return [answers[request.doc_id] for request in requests]

        loglikelihood = generate_until_multi_round = generate_until

    return Replay()
