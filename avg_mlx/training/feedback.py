"""RGLF's feedback: the frozen language model's loss for every sample and granularity, kept in a file."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import AvgMlxError, InputError
from ..model.avg_llava import Model
from ..model.inventory import fingerprint
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
    model: str  # fingerprint of the model

    @property
    def regret(self) -> float | None:
        """How much more the router's choice loses than the best one."""
        if self.router_logits is None:
            return None
        return self.losses[int(np.argmax(self.router_logits))] - min(self.losses)


def routable(samples: Sequence[Sample]) -> list[Sample]:
    """Those with one image: the only ones with something to choose, by the reference's definition."""
    return [sample for sample in samples if len(sample.images) == 1]


def collect_feedback(
    model: Model,
    samples: Sequence[Sample],
    file: Path,
    report: Callable[[int], None] = lambda done: None,
    cache: FeatureCache | None = None,
) -> list[Feedback]:
    """The feedback of `samples`; what `file` lacks is computed and written line by line, so that it can be resumed.

    In a group of processes (mlx.launch) each computes its share and the first one writes. `report` gets the number
    of samples done; `cache` keeps their features. Raises InputError if the file is another model's or other data's.
    """
    cache = cache or FeatureCache(model)
    group = mx.distributed.init()
    first = group.rank() == 0
    model.eval()
    author = fingerprint(model)
    known = read_feedback(file, author) if first and file.exists() else {}
    strangers = known.keys() - {sample.key for sample in samples}
    if strangers:
        example = known[min(strangers)].id
        raise InputError(
            f"{file} holds feedback of {len(strangers)} samples that are not in this data or have changed since "
            f"(such as {example!r}); give the data it was made of, or another file"
        )
    if first:
        _rewrite(file, known.values())

    levels = len(model.config.granularities)
    numbers = np.zeros((len(samples), 1 + 2 * levels), np.float32)  # whether known; losses; router logits
    for i, sample in enumerate(samples):
        if (row := known.get(sample.key)) is not None:
            numbers[i] = [1, *row.losses, *(row.router_logits or [0] * levels)]
    numbers = np.array(mx.distributed.all_sum(mx.array(numbers), group=group))  # only the first process can read

    todo = np.flatnonzero(numbers[:, 0] == 0)
    report(len(samples) - len(todo))
    for start in range(0, len(todo), group.size()):
        round_ = todo[start : start + group.size()]
        mine = _measure(cache, samples[round_[group.rank()]]) if group.rank() < len(round_) else numbers[0]
        gathered = np.array(mx.distributed.all_gather(mx.array(mine)[None], group=group))
        numbers[round_] = gathered[: len(round_)]
        if first:
            _append(file, [_row(model, samples[i], numbers[i], author) for i in round_])
        report(len(samples) - len(todo) + start + len(round_))
    return [_row(model, sample, row, author) for sample, row in zip(samples, numbers, strict=True)]


def read_feedback(file: Path, author: str) -> dict[str, Feedback]:
    """{sample's hash: feedback} of the model with fingerprint `author`; a last line that was cut off is left out.

    Raises InputError for anything else that is not feedback, or is another model's.
    """
    rows = {}
    for n, line in enumerate(file.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            row = Feedback(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise InputError(f"{file}, line {n}: not feedback ({error}); choose another file") from error
        if row.model != author:
            raise InputError(
                f"{file} is the feedback of another model ({row.model}, this one is {author}); choose another file"
            )
        rows[row.sample] = row
    return rows


def _measure(cache: FeatureCache, sample: Sample) -> np.ndarray:
    model, features = cache.model, cache.features(sample)
    losses = feedback_losses(model, sample, [features], load_crops(model, sample))
    if model.config.has_router:
        logits = np.array(model.route(features, instruction_embeddings(model, sample)).astype(mx.float32))
    else:
        logits = np.zeros(len(losses))
    return np.array([1, *losses, *logits], np.float32)


def _row(model: Model, sample: Sample, numbers: np.ndarray, author: str) -> Feedback:
    granularities = list(model.config.granularities)
    losses, logits = (part.tolist() for part in np.split(numbers[1:], 2))
    return Feedback(
        id=sample.id,
        granularities=granularities,
        losses=losses,
        best=granularities[int(np.argmin(losses))],
        answer_tokens=sample.answer_tokens,
        router_logits=logits if model.config.has_router else None,
        sample=sample.key,
        model=author,
    )


def _append(file: Path, rows: Iterable[Feedback]) -> None:
    try:
        with file.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(asdict(row)) + "\n" for row in rows)
    except OSError as error:
        raise AvgMlxError(
            f"cannot write {file} ({error.strerror}); make room, then run it again: it goes on"
        ) from error


def _rewrite(file: Path, rows: Iterable[Feedback]) -> None:
    """The whole file again, without a line that was cut off."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".partial-{file.name}")
    partial.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")
    partial.replace(file)


def summarize(rows: Sequence[Feedback]) -> str:
    """How often each granularity wins, how often the router agrees, and what its choices give away."""
    wins = Counter(row.best for row in rows)
    granularities = rows[0].granularities
    means = np.mean([row.losses for row in rows], axis=0)
    lines = [f"{'granularity':>11} {'wins':>7} {'mean loss':>10}"]
    lines += [f"{g:11} {wins[g] / len(rows):7.1%} {mean:10.4f}" for g, mean in zip(granularities, means, strict=True)]
    lines.append(f"{'best':>11} {'':7} {np.mean([min(row.losses) for row in rows]):10.4f}  each sample at its own")
    regrets = [row.regret for row in rows if row.regret is not None]
    if regrets:
        agree = np.mean([regret == 0 for regret in regrets])
        lines.append(
            f"The router picks the best granularity {agree:.1%} of the time; mean regret {np.mean(regrets):.4f}"
        )
    return "\n".join(lines)
