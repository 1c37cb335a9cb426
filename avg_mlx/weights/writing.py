"""Model folders are written one tensor at a time, and appear when they are complete."""

import fcntl
import os
import re
import secrets
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
from huggingface_hub import split_state_dict_into_shards_factory

from ..errors import AvgMlxError, InputError
from ..files import write_json, write_text
from ..progress import Progress, silent

SHARD_BYTES = 1 << 30  # one shard is held in memory while a model is written

Content = Path | str | Mapping[str, Any]  # of a file: another file to copy, a text, or an object for a JSON file
Tensors = Iterable[tuple[str, mx.array]]


def free_path(path: str | Path) -> Path:
    """Return a path, its `~` expanded, where nothing exists yet. Raises InputError if something does."""
    path = Path(path).expanduser()
    if path.exists() or path.is_symlink():
        raise InputError(f"{path} exists already; choose another path, or remove it yourself")
    return path


def write_folder(
    destination: Path,
    files: Mapping[str, Content],
    tensors: Tensors,
    sizes: Mapping[str, int],
    *,
    progress: Progress = silent,
    shard_bytes: int = SHARD_BYTES,
    framework: str = "mlx",
    check: Callable[[Path], object] = lambda folder: None,
) -> None:
    """Write a model folder that appears at `destination` as a whole, or not at all.

    files: what lies beside the weights, by name. sizes: {name: bytes} of all tensors, in the order in which `tensors`
    gives them. framework: the "format" in the weight files. check: gets the folder while it has no weights yet,
    and raises what is wrong. Memory holds one shard. Raises AvgMlxError if the disk lacks room or cannot be written,
    InputError if something else has appeared at `destination`.
    """
    with _appearing(destination, sum(sizes.values())) as folder:
        for name, content in files.items():
            _write_file(folder / name, content)
        check(folder)
        _write_shards(folder, tensors, sizes, progress, shard_bytes, framework)


@contextmanager
def _appearing(destination: Path, size: int) -> Iterator[Path]:
    """Give a hidden folder that becomes `destination` at the end, or goes away after an error."""
    home = next(parent for parent in destination.parents if parent.exists())
    folder = home / f".{destination.name}.{secrets.token_hex(4)}.partial"
    try:
        _remove_abandoned(home, destination.name)
        folder.mkdir()
        with _lock(folder):
            free = shutil.disk_usage(folder).free
            if free < size:
                raise AvgMlxError(
                    f"{destination} needs {size / 1e9:.2f} GB but its disk has {free / 1e9:.2f} GB free; make room"
                )
            yield folder
            free_path(destination)  # something else may have appeared there meanwhile
            destination.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(destination)
    except OSError as error:
        raise AvgMlxError(f"cannot write {destination} ({error.strerror or error}); nothing was left there") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(home: Path, name: str) -> None:
    """Remove the hidden folders of processes that were killed while they wrote `name`; living ones hold a lock."""
    for folder in home.iterdir():
        if re.fullmatch(rf"\.{re.escape(name)}\.[0-9a-f]{{8}}\.partial", folder.name):
            with suppress(OSError), _lock(folder) as locked:
                if locked:
                    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Lock a folder for the block, and tell whether that succeeded; the system releases it when the process ends."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked = True
    except OSError:  # another process has it, or the file system has no locks
        locked = False
    try:
        yield locked
    finally:
        os.close(descriptor)


def _write_file(file: Path, content: Content) -> None:
    file.parent.mkdir(exist_ok=True)
    if isinstance(content, Path):
        shutil.copyfile(content, file)
    elif isinstance(content, str):
        write_text(file, content)
    else:
        write_json(file, content)


def _write_shards(
    folder: Path, tensors: Tensors, sizes: Mapping[str, int], progress: Progress, shard_bytes: int, framework: str
) -> None:
    """Evaluate tensors one after another, and write and forget each shard as soon as it is complete."""
    plan = split_state_dict_into_shards_factory(
        dict(sizes), get_storage_size=int, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_bytes
    )
    total, done = sum(sizes.values()), 0
    shards: defaultdict[str, dict[str, mx.array]] = defaultdict(dict)
    for name, array in tensors:
        mx.eval(array)
        done += array.nbytes
        progress(done, total)
        file = plan.tensor_to_filename[name]
        shards[file][name] = array
        if len(shards[file]) == len(plan.filename_to_tensors[file]):
            try:
                mx.save_safetensors(str(folder / file), shards.pop(file), metadata={"format": framework})
            except RuntimeError as error:
                raise AvgMlxError(f"cannot write into {folder.parent} ({error}); is the disk full?") from error
    index = {"metadata": plan.metadata, "weight_map": dict(sorted(plan.tensor_to_filename.items()))}
    write_json(folder / "model.safetensors.index.json", index)
