"""A training run's folder: adapters, checkpoints to resume from, and the log."""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import AvgMlxError, InputError
from ..files import read_json, write_json
from ..model.avg_llava import Model
from ..weights.adapters import AdapterConfig, save_adapters, trained_tensors

KEPT = 2  # checkpoints: the last, and one before it


@dataclass
class Run:
    """One run's folder. What is written appears whole or not at all; resuming needs the same `settings`."""

    folder: Path
    settings: Mapping[str, Any]
    adapter_config: AdapterConfig
    inherited: Mapping[str, mx.array] = field(default_factory=dict)  # adapters below what is trained, saved along

    def open(self, resume: bool) -> None:
        """Begin in a new folder, or go on in this run's."""
        file = self.folder / "run.json"
        if not file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / ".partial-run.json", self.settings)
            (self.folder / ".partial-run.json").replace(file)
            return
        if not resume:
            raise InputError(f"{self.folder} holds a run already; go on with --resume, or choose another folder")
        before, now = read_json(file), json.loads(json.dumps(self.settings))
        changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        if changed:
            told = "; ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in changed)
            raise InputError(f"{self.folder} cannot be resumed: {told}. Set it back, or choose another folder")

    def save(self, step: int, model: Model, optimizer: optim.Optimizer) -> None:
        """Write the adapters, and a checkpoint after `step` steps from which training goes on bit for bit."""
        partial = self.folder / ".partial-checkpoint"
        tensors = trained_tensors(model)
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            mx.save_safetensors(str(partial / "model.safetensors"), tensors)
            mx.save_safetensors(str(partial / "optimizer.safetensors"), _flat(optimizer.state))
            save_adapters(self.folder, self.adapter_config, {**self.inherited, **tensors})
            partial.rename(self.folder / f"checkpoint-{step:07d}")
        except (OSError, RuntimeError) as error:
            raise AvgMlxError(
                f"cannot save step {step} into {self.folder} ({error}); make room, then go on with --resume"
            ) from error
        for old in self._checkpoints()[:-KEPT]:
            shutil.rmtree(old.rename(partial))  # one that is half removed is no checkpoint

    def restore(self, model: Model, optimizer: optim.Optimizer) -> int:
        """Load the last checkpoint, if there is one; returns how many steps it has made."""
        checkpoints = self._checkpoints()
        if not checkpoints:
            return 0
        last = checkpoints[-1]
        model.load_weights(str(last / "model.safetensors"), strict=False)
        optimizer.state = tree_unflatten(list(_load(last / "optimizer.safetensors").items()))
        return int(last.name.rpartition("-")[2])

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a line to log.jsonl."""
        try:
            with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise AvgMlxError(
                f"cannot write the log in {self.folder} ({error.strerror}); make room and --resume"
            ) from error

    def read_log(self) -> Iterator[dict[str, Any]]:
        """The log's lines; one that was cut off is left out."""
        file = self.folder / "log.jsonl"
        for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []:
            if line.endswith("\n"):
                yield json.loads(line)

    def cut_log(self, step: int) -> None:
        """Drop what was logged after `step`: it comes again."""
        kept = [json.dumps(record) + "\n" for record in self.read_log() if record["step"] <= step]
        partial = self.folder / ".partial-log.jsonl"
        partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(self.folder / "log.jsonl")

    def _checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob("checkpoint-*"))


def _flat(tree: Any) -> dict[str, mx.array]:
    """In one order, so that a resumed run's files are the same to the byte."""
    return dict(sorted(cast(list[tuple[str, mx.array]], tree_flatten(tree))))


def _load(file: Path) -> dict[str, mx.array]:
    return cast(dict[str, mx.array], mx.load(str(file)))
