"""RGLF's feedback: the frozen language model's loss for every sample and granularity, kept in a file."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import InputError, Interrupted, shown
from ..journal import Journal
from ..markdown import table
from ..model.avg_llava import Model
from ..model.inventory import fingerprint
from ..progress import Progress, silent
from .data import Sample
from .features import FeatureCache
from .forward import feedback_losses, instruction_embeddings, load_crops


@dataclass(frozen=True)
class Feedback:
    """A line of a feedback file."""

    id: str
    granularities: list[int]
    losses: list[float]  # mean over the answer's tokens, in the order of granularities
    best: int  # the granularity of least loss
    answer_tokens: int
    router_logits: list[float] | None
    sample: str  # hash of the sample
    model: str  # fingerprint of the model without its router
    router: str | None = None  # fingerprint with the router that gave the logits

    @property
    def regret(self) -> float | None:
        """How much more the router's choice loses than the best one."""
        if self.router_logits is None:
            return None
        return self.losses[int(np.argmax(self.router_logits))] - min(self.losses)


def collect_feedback(
    model: Model,
    samples: Sequence[Sample],
    file: Path,
    progress: Progress = silent,
    cache: FeatureCache | None = None,
    to_resume: str = "the same command resumes from there",
    scored: bool = True,
) -> list[Feedback]:
    """Return the feedback of `samples`; what `file` lacks is computed and written line by line.

    Identical samples are measured once and share a line. In a group of processes (mlx.launch) each computes its share,
    and the first one writes. `cache` keeps features. Without `scored` the router is not run; logits that the file has
    of another router are computed anew, or left out. Raises InputError if the file is another model's or other data's,
    or if another process is writing it. Ctrl-C and SIGTERM raise Interrupted, which says `to_resume`.
    """
    cache = cache or FeatureCache(model)
    model.eval()
    author, scored = _author(model), scored and model.config.has_router
    group = mx.distributed.init()
    distinct = list({sample.key: sample for sample in samples}.values())
    with contextlib.ExitStack() as stack:
        journal = stack.enter_context(Journal(file)) if group.rank() == 0 else None
        numbers = _known_numbers(model, distinct, known_feedback(journal, author, distinct) if journal else {})
        todo = np.flatnonzero((numbers[:, 0] == 0) | (scored & np.isnan(numbers[:, -1])))
        done = len(distinct) - len(todo)
        try:
            progress(done, len(distinct))
            for measured, rows in _rounds(cache, distinct, numbers, todo, scored, group):
                numbers[measured] = rows
                if journal:
                    journal.append(*(asdict(_row(model, distinct[i], numbers[i], author)) for i in measured))
                done += len(measured)
                progress(done, len(distinct))
        except KeyboardInterrupt as stop:
            told = f"interrupted; feedback on {done} of {len(distinct)} samples is in {file}, and {to_resume}"
            raise Interrupted(told) from stop
    rows_of = {s.key: _row(model, s, row, author) for s, row in zip(distinct, numbers, strict=True)}
    return [rows_of[sample.key] for sample in samples]


@dataclass(frozen=True)
class _Author:
    """Fingerprints of what measures: the model without its router, and with it."""

    model: str
    router: str | None


def _author(model: Model) -> _Author:
    return _Author(fingerprint(model), fingerprint(model, router=True) if model.config.has_router else None)


def known_feedback(journal: Journal, author: _Author, samples: Sequence[Sample]) -> dict[str, Feedback]:
    """{sample's hash: feedback} that a file holds already; without logits where another router gave them.

    Raises InputError for rows that are not feedback, or not of `author` and of `samples`.
    """
    rows = {}
    for n, keys in enumerate(journal.rows, 1):
        try:
            row = Feedback(**keys)
            np.array([row.losses, row.router_logits or row.losses], np.float32)  # fails at what is not a number
            if not isinstance(row.sample, str):
                raise TypeError(f"its sample is {shown(row.sample)}")
        except (TypeError, ValueError) as error:
            raise InputError(f"{journal.file}, line {n}: not feedback ({error}); choose another file") from error
        if row.model != author.model:
            raise InputError(
                f"{journal.file} is the feedback of another model ({row.model}, this one is {author.model}); "
                "choose another file"
            )
        rows[row.sample] = row if row.router == author.router else replace(row, router_logits=None)
    strangers = rows.keys() - {sample.key for sample in samples}
    if strangers:
        raise InputError(
            f"{journal.file} holds feedback of {len(strangers)} samples that are not in this data or have changed "
            f"since (such as {rows[min(strangers)].id!r}); give the data it was made of, or another file"
        )
    return rows


def _known_numbers(model: Model, samples: Sequence[Sample], known: Mapping[str, Feedback]) -> np.ndarray:
    """(samples, 1 + 2 · granularities): whether known; losses; router logits, or NaN. Only the first process reads."""
    levels = len(model.config.granularities)
    numbers = np.zeros((len(samples), 1 + 2 * levels), np.float32)
    for i, sample in enumerate(samples):
        if (row := known.get(sample.key)) is not None:
            numbers[i] = [1, *row.losses, *(row.router_logits or [np.nan] * levels)]
    return np.array(mx.distributed.all_sum(mx.array(numbers)))


def _rounds(
    cache: FeatureCache,
    samples: Sequence[Sample],
    numbers: np.ndarray,
    todo: np.ndarray,
    scored: bool,
    group: mx.distributed.Group,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Measure as many samples at a time as there are processes: (their numbers among all samples, their rows)."""
    for start in range(0, len(todo), group.size()):
        measured = todo[start : start + group.size()]
        mine = np.zeros_like(numbers[0])
        if group.rank() < len(measured):
            n = measured[group.rank()]
            mine = _measure(cache, samples[n], numbers[n], scored)
        gathered = np.array(mx.distributed.all_gather(mx.array(mine)[None], group=group))
        yield measured, gathered[: len(measured)]


def _measure(cache: FeatureCache, sample: Sample, known: np.ndarray, scored: bool) -> np.ndarray:
    """Compute a sample's row of numbers. Losses that are known are not computed again."""
    model, features = cache.model, cache.features(sample)
    losses, logits = np.split(known[1:], 2)
    if not known[0]:
        losses = np.array(feedback_losses(model, sample, [features], load_crops(model, sample)), np.float32)
    if scored:
        logits = np.array(model.route(features, instruction_embeddings(model, sample)).astype(mx.float32))
    else:
        logits = np.full_like(logits, np.nan)
    return np.concatenate([[1], losses, logits]).astype(np.float32)


def _row(model: Model, sample: Sample, numbers: np.ndarray, author: _Author) -> Feedback:
    granularities = list(model.config.granularities)
    losses, logits = np.split(numbers[1:], 2)
    has_logits = not np.isnan(logits).any()
    return Feedback(
        id=sample.id,
        granularities=granularities,
        losses=losses.tolist(),
        best=granularities[int(np.argmin(losses))],
        answer_tokens=sample.answer_tokens,
        router_logits=logits.tolist() if has_logits else None,
        sample=sample.key,
        model=author.model,
        router=author.router if has_logits else None,
    )


def summarize(rows: Sequence[Feedback]) -> str:
    """Tell how often each granularity wins, how often the router agrees, and how much its choices give away."""
    wins = Counter(row.best for row in rows)
    means = np.mean([row.losses for row in rows], axis=0)
    cells = [
        (str(granularity), f"{wins[granularity] / len(rows):.1%}", f"{mean:.4f}")
        for granularity, mean in zip(rows[0].granularities, means, strict=True)
    ]
    cells.append(("each sample's best", "", f"{np.mean([min(row.losses) for row in rows]):.4f}"))
    told = table(("granularity", "wins", "mean loss"), cells)
    regrets = [row.regret for row in rows if row.regret is not None]
    if regrets:
        agree = np.mean([regret == 0 for regret in regrets])
        told += f"\n\nThe router picks the best granularity {agree:.1%} of the time; mean regret {np.mean(regrets):.4f}"
    return told
