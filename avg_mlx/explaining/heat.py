"""Maps of tokens, spread over finer grids: sums stay what they are."""

from collections.abc import Sequence

import numpy as np

from ..geometry import ImageGeometry, Pair, pooling_kernel


def overlaps(edges: Sequence[float], size: int, scale: float = 1.0) -> np.ndarray:
    """Tell which share of each cell lies in each of `size` pixels: (size, cells).

    edges: where each cell begins and the last one ends, in units of which a pixel takes `scale`. The shares of a cell
    sum to 1, or less where a part of it lies outside of all pixels.
    """
    bounds = np.asarray(edges)
    start, stop = bounds[:-1], bounds[1:]
    pixel = np.arange(size)[:, None] * scale
    shared = np.minimum(stop, pixel + scale) - np.maximum(start, pixel)
    return np.maximum(shared, 0) / (stop - start)


def spread_over_patches(level: np.ndarray, patch_grid: Pair) -> np.ndarray:
    """Give each token's number to the patches that it averages, in equal parts.

    level: (crops, rows, columns). Returns (crops, patch rows, patch columns).
    """
    _, rows, columns = level.shape
    kernel = pooling_kernel(rows * columns, patch_grid)
    edges = ([side * n for n in range(cells + 1)] for side, cells in zip(kernel, (rows, columns), strict=True))
    down, across = (overlaps(each, side) for each, side in zip(edges, patch_grid, strict=True))
    return down @ level @ across.T


def spread_over_image(crops: np.ndarray, geometry: ImageGeometry, size: Pair) -> np.ndarray:
    """Lay the crops' maps over the image and add them up, evenly within each cell.

    crops: (crops, rows, columns) as `geometry` places them. size: (rows, columns) of the result, whose pixels share
    the image evenly. What lies on padding is left out, so the result's sum is that of the maps on the image alone.
    """
    height, width = geometry.image_size
    heat = np.zeros(size)
    for numbers, crop in zip(crops, geometry.crops, strict=True):
        down = overlaps(crop.row_edges, size[0], height / size[0])
        across = overlaps(crop.column_edges, size[1], width / size[1])
        heat += down @ numbers @ across.T
    return heat


def fit(image_size: Pair, longest: int) -> Pair:
    """Return a size of the image's aspect ratio whose longer side is `longest`."""
    return tuple(max(1, round(side * longest / max(image_size))) for side in image_size)  # type: ignore[return-value]
