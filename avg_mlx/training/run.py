"""A training run's folder: adapters, checkpoints to resume from, and the log."""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import AvgMlxError, InputError, Interrupted
from ..files import read_json, settle, write_json
from ..journal import SETTINGS, Journal, Row
from ..model.avg_llava import Model
from ..weights.adapters import AdapterConfig, save_adapters, trained_tensors
from .interrupts import deferred_interrupts

logger = logging.getLogger(__name__)

KEPT = 2  # checkpoints: the last, and one before it
KINDS = ("checkpoint", "interrupted")
PENDING = "record.json"
NOT_BEGUN = "interrupted before a step was taken; --resume goes on from where the run stood"


@dataclass
class Run:
    """One run's folder. What is written appears whole or not at all; resuming needs the same `settings`.

    Checkpoints of two kinds lie there: `checkpoint-N` every so many steps, and `interrupted-N`, which the next
    checkpoint replaces, so that a run which was interrupted leaves the same files as one which was not.
    """

    folder: Path
    settings: Mapping[str, Any]
    adapter_config: AdapterConfig
    inherited: Mapping[str, mx.array] = field(default_factory=dict)  # adapters below what is trained, saved along
    _journal: Journal | None = field(default=None, init=False)

    def open(self, resume: bool) -> "Run":
        """Begin in a new folder or resume the run that is there, and keep other processes out until the run is closed.

        In a group of processes the first one alone opens and writes. Raises InputError if the folder cannot be used.
        """
        if mx.distributed.init().rank() == 0:
            check_folder(self.folder, resume)
            try:
                with deferred_interrupts():
                    self._journal = Journal(self.folder / "log.jsonl", self.settings)
                    shutil.rmtree(self._partial, ignore_errors=True)  # of a process that was killed
            except KeyboardInterrupt as stop:
                raise Interrupted(NOT_BEGUN) from stop
        return self

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._journal is not None:
            self._journal.close()
        if isinstance(error, KeyboardInterrupt) and not isinstance(error, Interrupted):
            raise Interrupted(NOT_BEGUN) from error

    @property
    def _partial(self) -> Path:
        """A checkpoint that is being written or removed."""
        return self.folder / ".partial-checkpoint"

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes."""
        return self._journal is not None

    @property
    def log(self) -> list[Row]:
        """The record of every step so far, in the process that writes."""
        return [] if self._journal is None else self._journal.rows

    def add(self, record: Row) -> None:
        """Log a step."""
        if self._journal is not None:
            self._journal.append(record)

    def save(
        self,
        step: int,
        model: Model,
        optimizer: optim.Optimizer,
        *,
        interrupted: bool = False,
        pending: Row | None = None,
    ) -> None:
        """Write the adapters, and a checkpoint after `step` steps from which training is resumed bit for bit.

        pending: the step's record, if it is not logged yet.
        """
        if not self.writes or (interrupted and step in (0, *map(_step_of, self._checkpoints()))):
            return
        partial, tensors = self._partial, trained_tensors(model)
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            mx.save_safetensors(str(partial / "model.safetensors"), tensors)
            mx.save_safetensors(str(partial / "optimizer.safetensors"), _flat(optimizer.state))
            if pending is not None:
                write_json(partial / PENDING, pending)
            save_adapters(self.folder, self.adapter_config, {**self.inherited, **tensors})
            for file in partial.iterdir():
                settle(file)
            partial.rename(self.folder / f"{KINDS[interrupted]}-{step:07d}")
        except (OSError, RuntimeError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise AvgMlxError(
                f"cannot save step {step} into {self.folder} ({error}); make room, then resume with --resume"
            ) from error
        regular, passing = (self._checkpoints(kind) for kind in KINDS)
        for old in [*regular[:-KEPT], *passing[: -1 if interrupted else None]]:
            shutil.rmtree(old.rename(partial))  # one that is half removed must not look like a checkpoint

    def restore(self, model: Model, optimizer: optim.Optimizer) -> tuple[int, Row | None]:
        """Load the last checkpoint, if there is one, and drop from the log what came after it.

        Returns how many steps it has made, and the record of the last of them if that is not logged yet.
        """
        step, pending = 0, None
        for checkpoint in reversed(self._checkpoints()):
            try:
                pending = _restore(checkpoint, model, optimizer)
                step = _step_of(checkpoint)
                break
            except (AvgMlxError, OSError, RuntimeError, ValueError) as error:  # as after a power loss
                logger.warning("%s cannot be resumed from (%s), so the one before it is", checkpoint, error)
                if self.writes:
                    shutil.rmtree(checkpoint.rename(self._partial))
        if self._journal is not None:
            logged = step - (pending is not None)
            self._journal.keep(lambda record: record["step"] <= logged)
        return step, pending

    def _checkpoints(self, *kinds: str) -> list[Path]:
        """List the checkpoints of some kinds, or of all, in the order of their steps."""
        return sorted((file for kind in kinds or KINDS for file in self.folder.glob(f"{kind}-*")), key=_step_of)


def check_folder(folder: Path, resume: bool) -> None:
    """Raise InputError if a folder holds a run that is not to be resumed."""
    if (folder / SETTINGS).exists() and not resume:
        raise InputError(f"{folder} holds a run already; resume it with --resume, or choose another folder")


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _flat(tree: Any) -> dict[str, mx.array]:
    """Flatten a tree in one order, so that a resumed run's files are the same to the byte."""
    return dict(sorted(cast(list[tuple[str, mx.array]], tree_flatten(tree))))


def _restore(checkpoint: Path, model: Model, optimizer: optim.Optimizer) -> Row | None:
    """Load a checkpoint, and return the record that it has of its step. Raises an error if anything is missing."""
    weights, state = (_load(checkpoint / name) for name in ("model.safetensors", "optimizer.safetensors"))
    mx.eval(weights, state)
    if weights.keys() != trained_tensors(model).keys():
        raise InputError("it lacks tensors")
    pending = read_json(checkpoint / PENDING, own=True) if (checkpoint / PENDING).exists() else None
    model.load_weights(list(weights.items()), strict=False)
    optimizer.state = tree_unflatten(list(state.items()))
    return pending


def _load(file: Path) -> dict[str, mx.array]:
    return cast(dict[str, mx.array], mx.load(str(file)))
