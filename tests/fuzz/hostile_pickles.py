"""Pickled checkpoints of strangers: some run code where they are trusted, some are no weights, some are damaged."""

import io
import os
import pickle
import zipfile
from random import Random
from typing import Any

import torch
from mutation import damaged_bytes


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def hostile_pickle(random: Random) -> bytes:
    """The content of a pytorch_model.bin."""
    match random.randrange(4):
        case 0:
            return pickle.dumps(random.choice(_programs()), protocol=random.choice([2, 4]))
        case 1:
            return _rewritten(_saved({"a": torch.zeros(3)}), random)
        case 2:
            return _saved({_some_name(random): random.choice(_oddities())})
        case _:
            return damaged_bytes(_saved({"model.norm.weight": torch.zeros(64)}), random)


def _programs() -> list[Any]:
    write = "open('EXECUTED', 'w').write('x')"
    return [
        Call(os.system, "touch EXECUTED"), Call(exec, write), Call(eval, write), Call(open, "EXECUTED", "w"),
        {"model.norm.weight": Call(os.system, "touch EXECUTED")}, [Call(os.mkdir, "EXECUTED")], {}, [], None, 3,
        {"state_dict": {}}, {1: torch.zeros(2)}, {"model.norm.weight": "text"}, {"model.norm.weight": [1.0]},
    ]  # fmt: skip


def _oddities() -> list[Any]:
    """What is saved in the place of a dense tensor of floats."""
    a = torch.ones(64)
    return [
        a.to_sparse(), torch.quantize_per_tensor(a, 0.1, 0, torch.qint8), a.to(torch.float8_e4m3fn), a.to("meta"),
        torch.nn.Parameter(a), a.to(torch.complex64), a.to(torch.int64), a.bool(), a[::2], torch.nn.Linear(2, 2).weight,
        torch.zeros(()), torch.zeros(0), a.expand(64, 64), a.to(torch.float64), a.as_strided((64, 64), (0, 1)),
    ]  # fmt: skip


def _some_name(random: Random) -> str:
    return random.choice(
        ["model.norm.weight", "lm_head.weight", "x", "", "../x", "model.layers.0.input_layernorm.weight"]
    )


def _saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def _rewritten(archive: bytes, random: Random) -> bytes:
    """The same archive with another program for its pickle, or with an entry changed, doubled or left out."""
    file = io.BytesIO()
    program = pickle.dumps(random.choice(_programs()[:6]), protocol=2)
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(file, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("data.pkl") and random.random() < 0.7:
                content = program
            elif random.random() < 0.2:
                content = damaged_bytes(content, random)
            if random.random() < 0.9:
                new.writestr(entry.filename if random.random() < 0.9 else f"../{entry.filename}", content)
    return file.getvalue()
