"""The commands of avg-mlx with NumPy's exponentials: on a CPU, a small model trains in half the time.

    python examples/demo/quick.py train instruct …

MLX's CPU backend takes 15 to 30 ns for every exp or erf, which is most of a small model's training; NumPy's vector
instructions take one. The results differ by rounding only. What is trained is an ordinary model: nothing of this is
needed to run it, and a GPU has no use for it.
"""

import sys
from collections.abc import Callable

import avg_mlx  # noqa: F401  # it loads the system's BLAS before MLX is there

# isort: split

import mlx.core as mx
import numpy as np

BLOCK = 2**15  # elements that are worked on together, so that they stay in the processor's cache
ERF = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)  # Abramowitz and Stegun 7.1.26: to 1.5e-7

Kernel = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # x → (function, slope)


def quick_gelu_and_slope(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x · sigmoid(1.702 x)."""
    return _gated(x, 1.702)


def silu_and_slope(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x · sigmoid(x)."""
    return _gated(x, 1.0)


def _gated(x: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    s = np.multiply(x, np.float32(-scale))
    np.minimum(s, 80, out=s)
    np.exp(s, out=s)
    s += 1
    np.reciprocal(s, out=s)
    y = x * s
    slope = 1 - s
    slope *= y
    slope *= np.float32(scale)
    slope += s
    return y, slope


def gelu_and_slope(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x · Φ(x), with erf by an approximation."""
    bell = np.exp(-0.5 * x * x)
    t = 1 / (1 + np.float32(0.3275911 / 2**0.5) * np.abs(x))
    tail = t * np.polyval(np.array(ERF[::-1], np.float32), t) * bell  # 1 - erf(|x| / √2)
    phi = np.where(x < 0, 0.5 * tail, 1 - 0.5 * tail)
    return x * phi, phi + x * bell * np.float32((2 * np.pi) ** -0.5)


def elementwise(kernel: Kernel) -> Callable[[mx.array], mx.array]:
    """An MLX function with a gradient, computed by `kernel`."""

    @mx.custom_function
    def with_slope(x: mx.array):
        flat = np.array(x, copy=False).reshape(-1)
        y, slope = np.empty_like(flat), np.empty_like(flat)
        for start in range(0, len(flat), BLOCK):
            part = slice(start, start + BLOCK)
            y[part], slope[part] = kernel(flat[part])
        return mx.array(y.reshape(x.shape)), mx.array(slope.reshape(x.shape))

    @with_slope.vjp
    def change(x, cotangents, outputs):
        return cotangents[0] * outputs[1]

    return lambda x: with_slope(x)[0]


quick_gelu, silu, gelu = map(elementwise, (quick_gelu_and_slope, silu_and_slope, gelu_and_slope))


@mx.custom_function
def softmax(x: mx.array) -> mx.array:
    """Over the last axis."""
    scores = np.array(x, copy=False)
    rows = scores.reshape(-1, scores.shape[-1])
    y = np.empty_like(rows)
    step = max(1, BLOCK // rows.shape[1])
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        e = part - part.max(axis=1, keepdims=True)
        np.maximum(e, -80, out=e)
        np.exp(e, out=e)
        np.multiply(e, 1 / e.sum(axis=1, keepdims=True), out=y[start : start + step])
    return mx.array(y.reshape(x.shape))


@softmax.vjp
def _softmax_change(x, cotangent, output):
    return output * (cotangent - (cotangent * output) @ mx.ones((output.shape[-1], 1)))


@mx.custom_function
def _cross_entropy(scores: mx.array, shares: mx.array):
    x = np.array(scores, copy=False)
    x = x - x.max(axis=-1, keepdims=True)
    e = np.exp(x)
    total = e.sum(axis=-1, keepdims=True)
    y = np.array(shares, copy=False)
    return mx.array(-(y * (x - np.log(total))).sum(axis=-1)), mx.array(e / total)


@_cross_entropy.vjp
def _cross_entropy_change(primals, cotangents, outputs):
    shares = primals[1]
    return cotangents[0][..., None] * (outputs[1] - shares), mx.zeros_like(shares)


def cross_entropy(scores: mx.array, shares: mx.array) -> mx.array:
    """Of each row with shares that sum to 1: (…, classes) → (…)."""
    return _cross_entropy(scores, shares)[0]


def attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask=None, **ignored) -> mx.array:
    """Scaled dot-product attention of as many keys' heads as queries'."""
    scores = (q * scale) @ k.swapaxes(-1, -2)
    if isinstance(mask, str):  # causal
        length, total = scores.shape[-2:]
        mask = mx.arange(total) <= mx.arange(total - length, total)[:, None]
    if mask is not None:
        scores = scores + (mx.where(mask, 0.0, -1e4) if mask.dtype == mx.bool_ else mask)
    return softmax(scores) @ v


def patch_products(x: mx.array, weight: mx.array, stride: int | tuple[int, int], *ignored) -> mx.array:
    """The convolution of a patch embedding, whose kernel is its stride, as a matrix product."""
    B, height, width, channels = x.shape
    D, side = weight.shape[:2]
    x = x.reshape(B, height // side, side, width // side, side, channels).swapaxes(2, 3)
    return x.flatten(3) @ weight.reshape(D, -1).T


def install() -> None:
    """Put these in the places of MLX's own."""
    import mlx.nn as nn
    import mlx_lm.models.llama as llama

    from avg_mlx.model import vision

    mx.fast.scaled_dot_product_attention = attention
    llama.swiglu = lambda gate, x: silu(gate) * x
    vision.ACTIVATIONS["quick_gelu"] = quick_gelu
    nn.gelu, mx.conv2d = gelu, patch_products


if __name__ == "__main__":
    from avg_mlx.__main__ import main

    install()
    sys.exit(main())
