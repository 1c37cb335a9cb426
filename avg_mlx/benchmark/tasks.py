"""Tasks of lmms-eval: found by name, told where their data comes from, and loaded."""

import contextlib
import importlib.util
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AvgMlxError, InputError, nearest, printable
from .data import BUILDERS, Unavailable, data_from, download_command, is_cached, local_copy, needs_login, reason
from .manifest import MODEL
from .paper import PAPER

if TYPE_CHECKING:
    from lmms_eval.api.task import ConfigurableTask

EXTRA = "benchmarks are run through lmms-eval, which is not installed; pip install 'avg-mlx[lmms]'"
ALL = "paper"  # stands for the paper's eleven


@dataclass(frozen=True)
class Source:
    """Where the questions of a task come from."""

    task: str
    dataset: str  # as the Hub names it, or a kind of file
    local: Path | None = None  # the copy in the data folder
    cached: bool = False  # in the cache of the datasets library
    login: bool = False  # the Hub has to know who asks, and does not

    @property
    def is_file(self) -> bool:
        """Whether the task names files itself."""
        return self.dataset in BUILDERS or Path(self.dataset).exists()

    def __str__(self) -> str:
        if self.is_file:
            return f"{self.task}: local files"
        if self.local:
            return f"{self.task}: {self.dataset}, from {self.local}"
        where = "from the cache" if self.cached else "to be downloaded from the Hub"
        return f"{self.task}: {self.dataset}, {where}{', which asks for a login: hf auth login' if self.login else ''}"


def require_lmms_eval() -> None:
    """Raise AvgMlxError unless lmms-eval is installed."""
    if importlib.util.find_spec("lmms_eval") is None:
        raise AvgMlxError(EXTRA)
    from loguru import logger

    logger.disable("lmms_eval")  # it logs what it loads
    try:
        with contextlib.redirect_stdout(sys.stderr):
            import lmms_eval.evaluator  # noqa: F401
    except ImportError as error:
        raise AvgMlxError(f"lmms-eval cannot be imported ({error}); pip install 'avg-mlx[lmms]'") from error


class Tasks:
    """The tasks that lmms-eval has, and those in `include_path`."""

    def __init__(self, include_path: Path | None = None):
        require_lmms_eval()
        from lmms_eval.tasks import TaskManager

        self._manager: TaskManager = TaskManager(
            include_path=str(include_path) if include_path else None, model_name=MODEL
        )

    def named(self, names: Sequence[str]) -> list[str]:
        """The tasks that names stand for, each once: `paper`, tasks, and groups. InputError for an unknown one."""
        tasks: dict[str, None] = {}
        for name in names:
            tasks |= dict.fromkeys([one.task for one in PAPER] if name == ALL else self._members(name))
        return list(tasks)

    def _members(self, name: str) -> list[str]:
        known = self._manager.all_tasks
        if name not in known:
            near = nearest(name, known) or f"; {ALL} and `lmms-eval tasks list` name them"
            raise InputError(f"{printable(name)} is not a task of lmms-eval{near}")
        if name in self._manager.all_subtasks:
            return [name]
        entry = self._manager.task_index[name]
        members = entry["task"] if entry.get("task", -1) != -1 else self._manager._get_config(name)["task"]
        if not all(isinstance(member, str) for member in members):
            raise InputError(f"the group {name} describes its tasks itself; name tasks")
        return [task for member in members for task in self._members(member)]

    def source(self, name: str, root: Path | None) -> Source:
        """Where a task's data comes from."""
        config = self._manager._get_config(name)
        dataset, options = str(config.get("dataset_path")), config.get("dataset_kwargs") or {}
        local = local_copy(root, dataset) if root else None
        return Source(name, dataset, local, is_cached(dataset), needs_login(options))

    def load(self, source: Source, root: Path | None) -> "ConfigurableTask":
        """Load a task with its data. Raises InputError that says how to have data that cannot be had."""
        remedy = f"{download_command(source.dataset, root)}, then --data-root {root or 'DATA'}"
        if root and not source.local and not source.is_file:
            raise InputError(f"{source.task} is left out: {source.dataset} is not in {root}; {remedy}")
        if source.login and not source.local:
            raise InputError(
                f"{source.task} is left out: {source.dataset} asks for a login; hf auth login, or {remedy}"
            )
        try:
            with data_from(root), contextlib.redirect_stdout(sys.stderr), contextlib.ExitStack() as stack:
                if source.local or source.is_file:  # otherwise, bars show how far a download has come
                    stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
                loaded: Mapping[str, Any] = self._manager.load_task_or_group(source.task, "chat")
        except Unavailable as error:
            raise InputError(f"{source.task} is left out: {error}; {remedy}") from None
        except Exception as error:
            raise InputError(f"{source.task} is left out: it cannot be loaded ({reason(error)})") from error
        task = loaded[source.task]
        if task.OUTPUT_TYPE != "generate_until":
            raise InputError(
                f"{source.task} is left out: it is of type {task.OUTPUT_TYPE}, which is not generate_until"
            )
        return task
