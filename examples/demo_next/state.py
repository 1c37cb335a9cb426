"""A model's weights in 16 bits, small enough to be committed, so that another machine goes on from them.

    python state.py save START FOLDER state/sighted.safetensors
    python state.py load START state/sighted.safetensors FOLDER

What is saved is a model's folder or that of a training run; what is loaded is a model's folder again, from which
`make -C examples/demo_next` goes on. Rounding to 16 bits is the only difference.
"""

import shutil
import sys
from pathlib import Path

import mlx.core as mx

NAMES = ("model.safetensors", "adapters.safetensors")  # in a model's folder, in a run's


def save(start: Path, source: Path, file: Path) -> None:
    """Write what differs from the start."""
    before = mx.load(str(start / NAMES[0]))
    weights = mx.load(str(next(source / name for name in NAMES if (source / name).is_file())))
    changed = {
        name: array.astype(mx.float16)
        for name, array in weights.items()
        if name in before and not mx.array_equal(array, before[name])
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".partial-{file.name}")
    mx.save_safetensors(str(partial), changed)
    partial.replace(file)


def load(start: Path, file: Path, folder: Path) -> None:
    """Write a model's folder: the start with what was saved."""
    weights = mx.load(str(start / NAMES[0]))
    weights |= {name: array.astype(weights[name].dtype) for name, array in mx.load(str(file)).items()}
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.copytree(start, partial, dirs_exist_ok=True)
    mx.save_safetensors(str(partial / NAMES[0]), weights, metadata={"format": "mlx"})
    partial.rename(folder)


if __name__ == "__main__":
    {"save": save, "load": load}[sys.argv[1]](*map(Path, sys.argv[2:]))
