"""A fast BLAS for MLX on Linux CPUs, where one is installed.

MLX's CPU wheel for Linux carries a plain reference BLAS. Its symbols are looked up when MLX is imported, so a library
that was loaded before, and whose symbols are global, takes their place: as with LD_PRELOAD, but without it. Products of
float32 matrices then run about thirty times faster; 16-bit and quantized ones stay as they are.
"""

import ctypes
import os
import sys

LIBRARY = "libopenblas.so.0"  # Debian's libopenblas0-pthread has it, Fedora's openblas-threads too
SWITCH = "AVG_MLX_OPENBLAS"  # 0: do not look for it
HINT = f"MLX's own BLAS is slow on this CPU; with {LIBRARY} (Debian's libopenblas0-pthread), float32 is far faster"


def load_openblas() -> str:
    """Load OpenBLAS before MLX where that helps, and say in a few words what came of it."""
    if sys.platform != "linux":
        return "the system's"
    if os.environ.get(SWITCH) == "0":
        return f"MLX's own ({SWITCH}=0)"
    if "mlx.core" in sys.modules:
        return "as it was when MLX was imported"
    try:
        ctypes.CDLL(LIBRARY, ctypes.RTLD_GLOBAL)
    except OSError:
        return MISSING
    return "OpenBLAS"


MISSING = f"MLX's own, since there is no {LIBRARY}"
BLAS = load_openblas()
