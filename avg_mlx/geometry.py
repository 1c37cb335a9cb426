"""Where crops and tokens lie: sizes, grids and bounds, as plain numbers.

Every pair is (height, width) or (rows, columns). The rules, including their float divisions and truncations, are
LLaVA-NeXT's (`select_best_resolution`, `resize_and_pad_image`, `unpad_image` in its `mm_utils.py` and
`llava_arch.py`) and AVG-LLaVA's granularity scaler. transformers has the same rules, but for the rounding that
`unpad_bounds` tells of.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

Pair = tuple[int, int]
Box = tuple[float, float, float, float]  # top, left, bottom, right


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


@dataclass(frozen=True)
class CropGeometry:
    """Where one crop and its tokens lie, in pixels of the image. What lies outside of the image is padding."""

    place: Pair | None  # (row, column) among the local crops; None for the base crop
    box: Box
    row_edges: tuple[float, ...]  # where each row of tokens begins, and where the last one ends
    column_edges: tuple[float, ...]
    kept_rows: Pair  # the first row of tokens that packing keeps, and the one after the last
    kept_columns: Pair

    @property
    def kept(self) -> int:
        """How many of the crop's tokens packing keeps."""
        rows, columns = (stop - start for start, stop in (self.kept_rows, self.kept_columns))
        return rows * columns


@dataclass(frozen=True)
class ImageGeometry:
    """Where an image's crops and their tokens lie at one granularity."""

    image_size: Pair
    granularity: int
    token_grid: Pair  # (rows, columns) of tokens in a crop
    crop_grid: Pair  # (rows, columns) of local crops
    crops: tuple[CropGeometry, ...]  # the base crop first
    newlines: int  # rows of local tokens that are kept, each of which ends with the newline token

    @property
    def visual_tokens(self) -> int:
        """The number of visual tokens: those that are kept, and the newlines."""
        return sum(crop.kept for crop in self.crops) + self.newlines

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return asdict(self) | {"visual_tokens": self.visual_tokens}


def image_geometry(
    granularity: int,
    patch_grid: Pair,
    crop_size: int,
    crop_grid: Pair,
    image_size: Pair,
    aspect: str = "anyres",
    rounds: bool = False,
) -> ImageGeometry:
    """Place an image's crops and tokens over the image.

    crop_size: pixels of a crop's side. crop_grid: (rows, columns) of local crops, or (0, 0). aspect: the config's
    `image_aspect_ratio`. rounds: see `unpad_bounds`.
    """
    rows, columns = token_grid(granularity, patch_grid)
    kernel = pooling_kernel(granularity, patch_grid)

    def placed(place: Pair | None, box: Box, kept_rows: Pair, kept_columns: Pair) -> CropGeometry:
        top, left, bottom, right = box
        row_edges = _edges(top, bottom, rows, kernel[0] / patch_grid[0])
        column_edges = _edges(left, right, columns, kernel[1] / patch_grid[1])
        return CropGeometry(place, box, row_edges, column_edges, kept_rows, kept_columns)

    base = placed(None, _base_box(image_size, crop_size, aspect), (0, rows), (0, columns))
    if crop_grid == (0, 0):
        return ImageGeometry(image_size, granularity, (rows, columns), crop_grid, (base,), 0)
    kept = unpad_bounds((crop_grid[0] * rows, crop_grid[1] * columns), image_size, rounds)
    local = [
        placed((r, c), box, _within(kept[0], r, rows), _within(kept[1], c, columns))
        for (r, c), box in _local_boxes(image_size, crop_size, crop_grid)
    ]
    return ImageGeometry(
        image_size, granularity, (rows, columns), crop_grid, (base, *local), kept[0].stop - kept[0].start
    )


def _edges(start: float, stop: float, cells: int, share: float) -> tuple[float, ...]:
    """Where cells begin, and the last one ends; each takes a `share` of the way from `start` to `stop`."""
    return tuple(start + (stop - start) * share * n for n in range(cells + 1))


def _within(kept: slice, crop: int, cells: int) -> Pair:
    """Which of a crop's rows or columns are among those of the whole grid that are kept."""
    start, stop = (min(max(bound - crop * cells, 0), cells) for bound in (kept.start, kept.stop))
    return start, stop


def _base_box(image_size: Pair, crop_size: int, aspect: str) -> Box:
    """What the base crop shows: the whole image (anyres), a square around it (pad), or its middle (crop)."""
    height, width = image_size
    if aspect == "anyres":
        return 0.0, 0.0, float(height), float(width)
    if aspect == "pad":
        side = max(image_size)
        top, left = (side - height) // 2, (side - width) // 2
        return float(-top), float(-left), float(side - top), float(side - left)
    resized = fill_square(image_size, crop_size)
    margins = [(side - crop_size) // 2 for side in resized]
    scales = [side / new for side, new in zip(image_size, resized, strict=True)]
    (first, last), (start, stop) = (
        (margin * scale, (margin + crop_size) * scale) for margin, scale in zip(margins, scales, strict=True)
    )
    return first, start, last, stop


def _local_boxes(image_size: Pair, crop_size: int, crop_grid: Pair) -> list[tuple[Pair, Box]]:
    """What each local crop shows of the image, which is resized and stands in the middle of them all."""
    canvas = crop_grid[0] * crop_size, crop_grid[1] * crop_size
    resized = fit_within(image_size, canvas)

    def edge(axis: int, crop: int) -> float:
        margin = (canvas[axis] - resized[axis]) // 2
        return (crop * crop_size - margin) * image_size[axis] / resized[axis]

    places = [(row, column) for row in range(crop_grid[0]) for column in range(crop_grid[1])]
    return [((r, c), (edge(0, r), edge(1, c), edge(0, r + 1), edge(1, c + 1))) for r, c in places]
