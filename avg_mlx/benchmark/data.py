"""Where the datasets of tasks are: a copy in a folder, laid out as the Hub lays it out, or the Hub."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import printable

MIRRORED = "lmms-lab"  # has lmms-eval's datasets too, under the same names
BUILDERS = ("parquet", "json", "csv", "arrow", "text", "imagefolder")  # what a task calls files that it names itself


class Unavailable(BaseException):
    """A dataset cannot be had. It is no Exception, after which lmms-eval would try again."""


def local_copy(root: Path, dataset: str) -> Path | None:
    """The folder of a dataset ("owner/name") in `root`: owner/name, lmms-lab/name or name. None if there is none."""
    name = dataset.rpartition("/")[2]
    places = (root / dataset, root / MIRRORED / name, root / name)
    return next((place for place in places if place.is_dir()), None)


def parquet_files(folder: Path, config: str | None) -> dict[str, list[str]]:
    """The Parquet files of each split, where a folder has no card that lists them: split-00000-of-00001.parquet.

    They stand in the folder itself, in one that is named as the config, or in `data`.
    """
    places = [folder / config] if config else []
    place = next((place for place in (*places, folder / "data") if place.is_dir()), folder)
    files = defaultdict(list)
    for file in sorted(place.glob("*.parquet")):
        split = re.sub(r"-\d+-of-\d+(-[0-9a-f]+)?$", "", file.stem)
        files[split].append(str(file))
    return dict(files)


def is_cached(dataset: str) -> bool:
    """Whether the cache of the datasets library has something of a dataset of the Hub."""
    import datasets
    from datasets.naming import camelcase_to_snakecase

    owner, _, name = dataset.rpartition("/")
    return Path(datasets.config.HF_DATASETS_CACHE, f"{owner}___{camelcase_to_snakecase(name)}").is_dir()


def needs_login(options: Mapping[str, Any]) -> bool:
    """Whether a task's options for `load_dataset` ask for a login, and nobody is logged in."""
    import datasets
    from huggingface_hub import get_token

    return bool(options.get("token")) and get_token() is None and not datasets.config.HF_HUB_OFFLINE


def reason(error: BaseException) -> str:
    """What lies behind an error, in a line: lmms-eval tries some things again, and then tells only that it did."""
    last = getattr(error, "last_attempt", None)
    cause = last.exception() if last is not None else error
    return printable(f"{type(cause).__name__}: {cause}", 200)


def download_command(dataset: str, root: Path | None) -> str:
    """How to have a copy of a dataset."""
    return f"hf download --repo-type dataset {dataset} --local-dir {root or 'DATA'}/{dataset}"


@contextmanager
def data_from(root: Path | None) -> Iterator[None]:
    """Within the block, have `datasets.load_dataset` read the copies in `root`, and only these; or the Hub without it.

    A dataset that cannot be had raises Unavailable. An image that is damaged is no error until it is used, since
    lmms-eval reads the first one for nothing.
    """
    import datasets

    load, decode = datasets.load_dataset, datasets.Image.decode_example

    def load_dataset(path: str, name: str | None = None, **options: Any) -> Any:
        try:
            return _load(load, root, path, name, options)
        except Exception as error:
            raise Unavailable(f"{path} cannot be read ({reason(error)})") from error

    def decode_example(*args: Any, **options: Any) -> Any:
        try:
            return decode(*args, **options)
        except Exception as error:
            return _Damaged(error)

    datasets.load_dataset, datasets.Image.decode_example = load_dataset, decode_example
    try:
        yield
    finally:
        datasets.load_dataset, datasets.Image.decode_example = load, decode


class _Damaged:
    """What cannot be decoded, until it is used."""

    def __init__(self, error: Exception):
        self._error = error

    def __getattr__(self, name: str) -> Any:
        raise self._error


def _load(load: Callable[..., Any], root: Path | None, path: str, name: str | None, options: dict[str, Any]) -> Any:
    folder = root and path not in BUILDERS and not Path(path).exists() and local_copy(root, path)
    if not folder:
        return load(path, name, **options)
    options.pop("token", None)
    card = folder / "README.md"
    listed = card.is_file() and f"config_name: {name or 'default'}" in card.read_text(
        encoding="utf-8", errors="replace"
    )
    files = parquet_files(folder, name)
    if listed or not files:
        return load(str(folder), name, **options)
    return load("parquet", data_files=files, **options)
