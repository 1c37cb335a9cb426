"""The granularity scaler: features → pyramid."""

from collections.abc import Iterable

import mlx.core as mx

from ..geometry import Pair, pooling_kernel


def pool(features: mx.array, granularity: int, patch_grid: Pair) -> mx.array:
    """Average the patches of each cell: (crops, patches, D) → (crops, granularity, D), row-major."""
    crops, _, D = features.shape
    kernel_rows, kernel_columns = pooling_kernel(granularity, patch_grid)
    rows, columns = patch_grid[0] // kernel_rows, patch_grid[1] // kernel_columns
    x = features.reshape(crops, *patch_grid, D)[:, : rows * kernel_rows, : columns * kernel_columns]
    x = x.reshape(crops, rows, kernel_rows, columns, kernel_columns, D)
    return x.mean(axis=(2, 4)).reshape(crops, granularity, D)


def pyramid(features: mx.array, granularities: Iterable[int], patch_grid: Pair) -> mx.array:
    """Pool to each granularity in the order given: (crops, patches, D) → (crops, sum of granularities, D)."""
    return mx.concatenate([pool(features, g, patch_grid) for g in granularities], axis=1)
