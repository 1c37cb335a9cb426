"""The granularity scaler against average pooling written as loops."""

import mlx.core as mx
import numpy as np
import pytest

from avg_mlx.model.scaler import pool, pyramid

KERNELS = {36: (4, 4), 72: (2, 4), 144: (2, 2), 288: (1, 2), 576: (1, 1)}  # section 4 of the reference, at 24×24


def naive_pool(features: np.ndarray, patch_grid: tuple[int, int], kernel: tuple[int, int]) -> np.ndarray:
    """Average pooling with stride = kernel: what is left over at the right and at the bottom is dropped."""
    (height, width), (kernel_rows, kernel_columns) = patch_grid, kernel
    crops = []
    for crop in features:
        cells = []
        for top in range(0, height - kernel_rows + 1, kernel_rows):
            for left in range(0, width - kernel_columns + 1, kernel_columns):
                patches = [
                    crop[row * width + column]
                    for row in range(top, top + kernel_rows)
                    for column in range(left, left + kernel_columns)
                ]
                cells.append(sum(patches) / len(patches))
        crops.append(cells)
    return np.array(crops)


def random(crops: int, patch_grid: tuple[int, int], D: int = 3) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(crops, patch_grid[0] * patch_grid[1], D)).astype(np.float32)


@pytest.mark.parametrize(
    ("granularity", "patch_grid", "kernel"),
    [
        *((g, (24, 24), kernel) for g, kernel in KERNELS.items()),
        (64, (24, 24), (3, 3)),
        (1, (24, 24), (24, 24)),
        (128, (16, 16), (1, 2)),
        (32, (16, 16), (2, 4)),
        (25, (16, 16), (3, 3)),  # a column and a row are left over
        (9, (7, 7), (2, 2)),
    ],
)
def test_cells_are_averages(granularity, patch_grid, kernel):
    features = random(2, patch_grid)
    pooled = np.array(pool(mx.array(features), granularity, patch_grid))
    expected = naive_pool(features, patch_grid, kernel)
    assert pooled.shape == expected.shape == (2, granularity, 3)
    assert np.allclose(pooled, expected, atol=1e-6)


def test_the_finest_granularity_is_the_features():
    features = mx.array(random(2, (24, 24)))
    assert mx.array_equal(pool(features, 576, (24, 24)), features)


@pytest.mark.parametrize("order", [(36, 72, 144, 288, 576), (576, 36, 144)])
def test_a_pyramid_keeps_the_order_given(order):
    features = mx.array(random(1, (24, 24)))
    levels = mx.split(pyramid(features, order, (24, 24)), np.cumsum(order)[:-1].tolist(), axis=1)
    assert all(mx.array_equal(level, pool(features, g, (24, 24))) for g, level in zip(order, levels, strict=True))
