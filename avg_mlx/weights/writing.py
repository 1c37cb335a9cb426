"""Model folders are written one tensor at a time, and appear when they are complete."""

import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from ..errors import AvgMlxError, InputError
from ..files import write_json

SHARD_BYTES = 1 << 30  # one shard is held in memory while a model is written

SIDE_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "generation_config.json",
)

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)
Tensors = Iterable[tuple[str, mx.array]]


def refuse_existing(destination: Path) -> None:
    if destination.exists() or destination.is_symlink():
        raise InputError(f"{destination} exists already; choose another path, or remove it yourself")


@contextmanager
def appearing(destination: Path, size: int) -> Iterator[Path]:
    """A hidden folder that becomes `destination` when all went well, and otherwise goes away."""
    home = next(parent for parent in destination.parents if parent.exists())
    folder = home / f".{destination.name}.{secrets.token_hex(4)}.partial"
    try:
        folder.mkdir()
        free = shutil.disk_usage(folder).free
        if free < size:
            raise AvgMlxError(
                f"{destination} needs {size / 1e9:.2f} GB but its disk has {free / 1e9:.2f} GB free; make room"
            )
        yield folder
        refuse_existing(destination)
        destination.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(destination)
    except OSError as error:
        raise AvgMlxError(f"cannot write {destination} ({error.strerror or error}); nothing was left there") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def copy_side_files(source: Path, folder: Path, names: Iterable[str] = SIDE_FILES) -> None:
    """Copy what a converted folder holds beside weights and config, as far as it is there."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def write_shards(
    folder: Path,
    tensors: Tensors,
    total: int,
    progress: Progress,
    shard_bytes: int = SHARD_BYTES,
    framework: str = "mlx",
) -> None:
    """Evaluate and write tensors one after another, in shards with an index; memory holds one shard.

    total: bytes that are to come, for `progress`; framework: the files' "format". Raises AvgMlxError when the disk
    refuses.
    """
    files: list[Path] = []
    file_of: dict[str, int] = {}
    size = 0
    for shard in _shards(_evaluated(tensors, total, progress), shard_bytes):
        files.append(folder / f"{len(files)}.safetensors")
        file_of |= dict.fromkeys(shard, len(files) - 1)
        size += sum(array.nbytes for array in shard.values())
        try:
            mx.save_safetensors(str(files[-1]), shard, metadata={"format": framework})
        except RuntimeError as error:
            raise AvgMlxError(f"cannot write into {folder.parent} ({error}); is the disk full?") from error
    names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    names = ["model.safetensors"] if len(files) == 1 else names
    for file, name in zip(files, names, strict=True):
        file.rename(folder / name)
    weight_map = {name: names[i] for name, i in sorted(file_of.items())}
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})


def _evaluated(tensors: Tensors, total: int, progress: Progress) -> Iterator[tuple[str, mx.array]]:
    done = 0
    for name, array in tensors:
        mx.eval(array)
        done += array.nbytes
        progress(done, total)
        yield name, array


def _shards(tensors: Tensors, limit: int) -> Iterator[dict[str, mx.array]]:
    """Groups of at most `limit` bytes, or of one tensor; the last is emptied when the next is asked for."""
    shard: dict[str, mx.array] = {}
    for name, array in tensors:
        if shard and sum(a.nbytes for a in shard.values()) + array.nbytes > limit:
            yield shard
            shard.clear()
        shard[name] = array
    yield shard
