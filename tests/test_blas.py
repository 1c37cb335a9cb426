"""OpenBLAS takes the place of MLX's own BLAS, wherever it is installed and not switched off."""

import ctypes
import subprocess
import sys

import pytest

from avg_mlx import blas

USED = """
import {first}, {second}
from avg_mlx.blas import BLAS
import mlx.core as mx
a = mx.ones((8, 8)) @ mx.ones((8, 8))
assert (a == 8).all()
print(BLAS, any("libopenblas" in line for line in open("/proc/self/maps")), sep="|")
"""


def has_openblas() -> bool:
    try:
        ctypes.CDLL(blas.LIBRARY)
    except OSError:
        return False
    return True


def used(first: str, second: str, **environment: str) -> list[str]:
    code = USED.format(first=first, second=second)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return done.stdout.strip().split("|")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems bring a fast BLAS")
def test_openblas_is_loaded_where_it_is():
    assert used("avg_mlx", "mlx.core") == (["OpenBLAS", "True"] if has_openblas() else [blas.MISSING, "False"])


@pytest.mark.skipif(sys.platform != "linux", reason="other systems bring a fast BLAS")
def test_it_can_be_switched_off():
    assert used("avg_mlx", "mlx.core", AVG_MLX_OPENBLAS="0") == ["MLX's own (AVG_MLX_OPENBLAS=0)", "False"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems bring a fast BLAS")
def test_after_mlx_it_is_too_late():
    assert used("mlx.core", "avg_mlx") == ["as it was when MLX was imported", "False"]


def test_a_missing_library_is_no_error(monkeypatch):
    monkeypatch.setattr(blas, "LIBRARY", "libnosuchblas.so.0")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
    assert blas.load_openblas() == blas.MISSING
