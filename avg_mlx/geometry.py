"""Where crops and tokens lie: sizes, grids and bounds, as plain numbers.

Every pair is (height, width) or (rows, columns). The rules, including their float divisions and truncations, are
LLaVA-NeXT's (`select_best_resolution`, `resize_and_pad_image`, `unpad_image` in its `mm_utils.py` and
`llava_arch.py`) and AVG-LLaVA's granularity scaler. transformers has the same rules, but for the rounding that
`unpad_bounds` tells of.
"""

import math
from collections.abc import Sequence

Pair = tuple[int, int]


def best_resolution(image_size: Pair, grid_pinpoints: Sequence[Pair]) -> Pair:
    """Return the pinpoint that keeps most of the image's pixels. Ties go to the least empty area, then to the first."""
    height, width = image_size

    def fit(resolution: Pair) -> Pair:
        scale = min(resolution[1] / width, resolution[0] / height)
        downscaled = int(width * scale) * int(height * scale)
        effective = min(downscaled, width * height)
        return effective, effective - resolution[0] * resolution[1]

    return max(grid_pinpoints, key=fit)


def fit_within(image_size: Pair, resolution: Pair) -> Pair:
    """Return the largest size that fits inside `resolution` with the image's aspect ratio."""
    (height, width), (max_height, max_width) = image_size, resolution
    scale_h, scale_w = max_height / height, max_width / width
    if scale_w < scale_h:
        return min(math.ceil(height * scale_w), max_height), max_width
    return max_height, min(math.ceil(width * scale_h), max_width)


def fill_square(image_size: Pair, side: int) -> Pair:
    """Return the size at which an image's shorter side is `side`, as CLIP's image processor truncates it."""
    height, width = image_size
    return (int(side * height / width), side) if width <= height else (side, int(side * width / height))


def pooling_kernel(granularity: int, patch_grid: Pair) -> Pair:
    """Return the average-pooling kernel, and stride, that leaves `granularity` tokens of a crop's patch grid."""
    patches = patch_grid[0] * patch_grid[1]
    if granularity * 2 == patches:
        return 1, 2
    if granularity * 8 == patches:
        return 2, 4
    side = int(math.sqrt(patches / granularity))
    return side, side


def token_grid(granularity: int, patch_grid: Pair) -> Pair:
    """Return a crop's (rows, columns) of tokens at `granularity`."""
    kernel = pooling_kernel(granularity, patch_grid)
    return patch_grid[0] // kernel[0], patch_grid[1] // kernel[1]


def poolings(patch_grid: Pair) -> list[int]:
    """Return all granularities that a patch grid can be pooled to, the coarsest first."""
    patches = patch_grid[0] * patch_grid[1]
    return [g for g in range(1, patches + 1) if math.prod(token_grid(g, patch_grid)) == g]


def unpad_bounds(grid: Pair, image_size: Pair, rounds: bool = False) -> tuple[slice, slice]:
    """Return the rows and columns of `grid` that show the image and not the black bars around it.

    rounds: sizes are rounded to seven digits before they are truncated, as in transformers' `unpad_image`: the image's
    28.999999999 rows are 29 there, and 28 in the authors' code.

    As trained, `grid` is compared with the image as if its cells were square. At granularities N/2 and N/8 they are
    not, and rows of real content are cut away too.
    """
    (rows, columns), (height, width) = grid, image_size

    def whole(size: float) -> int:
        return int(round(size, 7) if rounds else size)

    if width / height > columns / rows:
        margin = (rows - whole(height * (columns / width))) // 2
        return slice(margin, rows - margin), slice(0, columns)
    margin = (columns - whole(width * (rows / height))) // 2
    return slice(0, rows), slice(margin, columns - margin)


def visual_token_count(
    granularity: int, patch_grid: Pair, crop_grid: Pair, image_size: Pair, rounds: bool = False
) -> int:
    """Count the tokens that packing gives: the base crop's, then the local crops' unpadded rows with newlines."""
    rows, columns = token_grid(granularity, patch_grid)
    if crop_grid == (0, 0):
        return rows * columns
    kept_rows, kept_columns = unpad_bounds((crop_grid[0] * rows, crop_grid[1] * columns), image_size, rounds)
    width = kept_columns.stop - kept_columns.start + 1  # the newline token
    return rows * columns + (kept_rows.stop - kept_rows.start) * width
