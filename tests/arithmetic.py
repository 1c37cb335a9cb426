"""Layers written out in NumPy, to compare with."""

import math

import mlx.nn as nn
import numpy as np


def erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf)(x)


def layer_norm(x: np.ndarray, norm: nn.LayerNorm) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(variance + 1e-5) * np.array(norm.weight) + np.array(norm.bias)


def linear(x: np.ndarray, layer: nn.Linear) -> np.ndarray:
    return x @ np.array(layer.weight).T + np.array(layer.bias)
