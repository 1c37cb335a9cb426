"""The tiny golden checkpoint, converted once a session, and the reference's numbers for it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINT = GOLDEN / "checkpoint"
PHOTO = Path(__file__).parent / "photos" / "chelsea.jpg"
ROOT = Path(__file__).parent.parent

CASES = json.loads((GOLDEN / "cases.json").read_text())["cases"]
GRANULARITIES = (36, 72, 144, 288, 576)


class Reference:
    """The reference's arrays of one case: `reference("router_logits")`."""

    arrays = np.load(GOLDEN / "reference.npz")

    def __init__(self, case: int):
        self.case = case

    def __call__(self, name: str) -> np.ndarray:
        return self.arrays[f"case{self.case}_{name}"]


@pytest.fixture(scope="session")
def converted(tmp_path_factory) -> Path:
    """The golden checkpoint as a converted folder, in float32."""
    from avg_mlx import convert

    folder = tmp_path_factory.mktemp("converted") / "model"
    convert(CHECKPOINT, folder)
    return folder


@pytest.fixture(scope="session")
def loaded(converted):
    """(model, tokenizer) of the converted folder."""
    from avg_mlx import load

    return load(converted)


@pytest.fixture(scope="session")
def model(loaded):
    return loaded[0]


@pytest.fixture(scope="session")
def tokenizer(loaded):
    return loaded[1]


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A copy of the golden checkpoint, to be spoiled."""
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "checkpoint"))


@pytest.fixture
def model_folder(tmp_path, converted) -> Path:
    """A copy of the converted folder, to be spoiled."""
    return Path(shutil.copytree(converted, tmp_path / "model"))
