"""Geometry against slow specifications, for any image and any pinpoints."""

import itertools
from dataclasses import replace
from fractions import Fraction

import mlx.core as mx
import numpy as np
import pytest
from conftest import CASES, GRANULARITIES
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from avg_mlx.geometry import (
    best_resolution,
    fill_square,
    fit_within,
    image_geometry,
    pooling_kernel,
    poolings,
    token_grid,
    unpad_bounds,
    visual_token_count,
)
from avg_mlx.inputs.image import make_crops
from avg_mlx.model.packing import pack

RELEASED = [(672, 336), (336, 672), (672, 672), (336, 1008), (1008, 336)]  # (height, width)

# Every granularity that pools each patch grid to exactly so many tokens.
POOLING = {
    (24, 24): (1, 4, 9, 16, 36, 64, 72, 144, 288, 576),
    (16, 16): (1, 4, 9, 16, 25, 32, 64, 128, 256),
    (4, 4): (1, 2, 4, 8, 16),
    (7, 7): (1, 4, 9, 49),
}

pairs = st.tuples(st.integers(1, 20_000), st.integers(1, 20_000))
image_sizes = pairs | st.sampled_from([(1, 1), (1, 20_000), (20_000, 1)])
few_pinpoints = st.tuples(st.integers(1, 4), st.integers(1, 4)).map(lambda grid: (336 * grid[0], 336 * grid[1]))
pinpoint_lists = st.lists(few_pinpoints | st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1)


def specified_resolution(image_size, pinpoints):
    """Section 2.2 of the reference, pinpoint after pinpoint, in its (width, height)."""
    height, width = image_size
    best = None
    for H, W in pinpoints:
        scale = min(W / width, H / height)
        downscaled_width, downscaled_height = int(width * scale), int(height * scale)
        effective = min(downscaled_width * downscaled_height, width * height)
        wasted = W * H - effective
        if best is None or effective > best[0] or (effective == best[0] and wasted < best[1]):
            best = (effective, wasted, (H, W))
    return best[2]


@given(image_sizes, pinpoint_lists)
@example((20_000, 1), RELEASED)
@example((1, 20_000), RELEASED)
@example((1, 1), RELEASED)
def test_best_resolution_is_the_specified_one_of_the_list(image_size, pinpoints):
    resolution = best_resolution(image_size, pinpoints)
    assert resolution in pinpoints
    assert resolution == specified_resolution(image_size, pinpoints)


@pytest.mark.parametrize("pinpoints", [[(336, 672), (672, 336)], [(672, 336), (336, 672)]])
def test_equally_good_resolutions_go_to_the_first(pinpoints):
    assert best_resolution((500, 500), pinpoints) == pinpoints[0]


def test_equally_filled_resolutions_go_to_the_least_empty():
    assert best_resolution((100, 100), [(1008, 1008), (672, 336), (672, 672)]) == (672, 336)


@given(image_sizes, pairs)
def test_fit_within_touches_a_side_and_keeps_the_aspect_to_a_pixel(image_size, resolution):
    fitted = fit_within(image_size, resolution)
    assert all(1 <= side <= limit for side, limit in zip(fitted, resolution, strict=True))
    assert any(side == limit for side, limit in zip(fitted, resolution, strict=True))
    scale = min(Fraction(limit, side) for side, limit in zip(image_size, resolution, strict=True))
    assert all(abs(new - side * scale) <= 1 for side, new in zip(image_size, fitted, strict=True))


@pytest.mark.parametrize("image_size", [(336, 672), (427, 640), (1, 20_000), (20_000, 1), (1, 1)])
def test_fit_within_turns_with_the_image(image_size):
    assert fit_within(image_size, (672, 336)) == fit_within(image_size[::-1], (336, 672))[::-1]


@pytest.mark.parametrize("patch_grid", POOLING)
def test_granularities_that_pool_a_crop(patch_grid):
    patches = patch_grid[0] * patch_grid[1]
    grids = {g: token_grid(g, patch_grid) for g in range(1, patches + 1)}
    assert tuple(g for g, (rows, columns) in grids.items() if rows * columns == g) == POOLING[patch_grid]


@given(st.tuples(st.integers(1, 40), st.integers(1, 40)), st.data())
def test_pooling_cells_lie_within_the_patch_grid(patch_grid, data):
    granularity = data.draw(st.integers(1, patch_grid[0] * patch_grid[1]))
    kernel, grid = pooling_kernel(granularity, patch_grid), token_grid(granularity, patch_grid)
    for cell, cells, side in zip(kernel, grid, patch_grid, strict=True):
        assert cell >= 1
        assert cell * cells <= side < cell * (cells + 1)


@pytest.mark.parametrize(
    ("granularity", "kernel", "grid"),
    [
        (36, (4, 4), (6, 6)),
        (72, (2, 4), (12, 6)),
        (144, (2, 2), (12, 12)),
        (288, (1, 2), (24, 12)),
        (576, (1, 1), (24, 24)),
    ],
)
def test_released_granularities(granularity, kernel, grid):
    assert pooling_kernel(granularity, (24, 24)) == kernel
    assert token_grid(granularity, (24, 24)) == grid


@given(st.tuples(st.integers(1, 100), st.integers(1, 100)), image_sizes)
def test_unpad_keeps_the_centred_band_that_the_image_fills(grid, image_size):
    kept = unpad_bounds(grid, image_size)
    (height, width), (rows, columns) = image_size, grid
    if Fraction(width, height) > Fraction(columns, rows):
        band = (int(height * (columns / width)), columns)
    else:
        band = (rows, int(width * (rows / height)))
    for bounds, side, filled in zip(kept, grid, band, strict=True):
        assert 0 <= bounds.start <= bounds.stop <= side
        assert bounds.start == side - bounds.stop
        assert bounds.stop - bounds.start - filled in (0, 1)
    assert any(bounds == slice(0, side) for bounds, side in zip(kept, grid, strict=True))


@pytest.mark.parametrize(
    ("granularity", "kept", "of"), [(36, 10, 12), (72, 10, 24), (144, 18, 24), (288, 18, 48), (576, 36, 48)]
)
def test_640x480_loses_real_rows_where_cells_are_not_square(granularity, kept, of):
    """As trained: three quarters of the rows show the image, but at 72 and 288 only half of them are kept."""
    rows, columns = (2 * side for side in token_grid(granularity, (24, 24)))
    bounds = unpad_bounds((rows, columns), (480, 640))
    assert rows == of
    assert bounds == (slice((of - kept) // 2, (of + kept) // 2), slice(0, columns))


@given(st.sampled_from(list(POOLING)), st.data())
def test_visual_token_count_is_the_length_of_what_is_packed(patch_grid, data):
    granularity = data.draw(st.sampled_from(POOLING[patch_grid]))
    crop_grid = data.draw(st.just((0, 0)) | st.tuples(st.integers(1, 4), st.integers(1, 4)))
    image_size = data.draw(image_sizes)
    features = mx.zeros((1 + crop_grid[0] * crop_grid[1], granularity, 1))
    packed = pack(features, token_grid(granularity, patch_grid), crop_grid, image_size, mx.ones(1))
    assert visual_token_count(granularity, patch_grid, crop_grid, image_size) == len(packed)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["image"])
def test_golden_crops_and_sequence_lengths(case):
    image_size = tuple(case["size"][::-1])
    height, width = best_resolution(image_size, RELEASED)
    crop_grid = (height // 336, width // 336)
    assert 1 + crop_grid[0] * crop_grid[1] == case["num_crops"]
    counts = [visual_token_count(g, (24, 24), crop_grid, image_size) for g in GRANULARITIES]
    assert [case["prompt_tokens"] + count for count in counts] == case["sequence_lengths"]


@given(image_sizes, st.tuples(st.integers(1, 100), st.integers(1, 100)))
@example((748, 352), (72, 48))
def test_rounding_keeps_a_row_or_column_only_where_truncation_loses_it_to_a_division(image_size, grid):
    """The authors' unpadding and transformers' agree but for sizes that are whole numbers, in exact arithmetic."""
    ours, theirs = unpad_bounds(grid, image_size), unpad_bounds(grid, image_size, rounds=True)
    (height, width), (rows, columns) = image_size, grid
    by_rows = width / height > columns / rows
    exact = Fraction(height * columns, width) if by_rows else Fraction(width * rows, height)
    if abs(exact - round(exact)) > 1e-6:
        assert ours == theirs
    for one, other, full in zip(ours, theirs, grid, strict=True):
        assert other.start <= one.start
        assert (other.stop, one.stop) == (full - other.start, full - one.start)
        assert one.start - other.start <= 1


def test_few_sizes_are_unpadded_in_another_way():
    """Of all sizes up to 840 pixels whose sides are multiples of 4, at LLaVA-NeXT's crops and 24×24 patches."""

    def bounds(size, rounds):
        height, width = best_resolution(size, RELEASED)
        return unpad_bounds((height // 14, width // 14), size, rounds)

    sizes = [(height, width) for height in range(4, 841, 4) for width in range(4, 841, 4)]
    others = [size for size in sizes if bounds(size, False) != bounds(size, True)]
    assert others == [(352, 748), (352, 836), (396, 704), (704, 396), (748, 352), (836, 352)]


@given(image_sizes, st.permutations(RELEASED))
def test_the_order_of_pinpoints_matters_for_ties_alone(image_size, others):
    one, other = best_resolution(image_size, RELEASED), best_resolution(image_size, others)

    def kept(resolution):
        height, width = fit_exactly(image_size, resolution)
        return min(height * width, image_size[0] * image_size[1]), resolution[0] * resolution[1]

    assert kept(one) == kept(other)


def fit_exactly(image_size, resolution):
    scale = min(resolution[1] / image_size[1], resolution[0] / image_size[0])
    return int(image_size[0] * scale), int(image_size[1] * scale)


@given(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), st.integers(1, 400))
def test_filling_a_square_keeps_the_aspect_to_a_pixel(image_size, side):
    height, width = fill_square(image_size, side)
    assert min(height, width) == side
    scale = Fraction(side, min(image_size))
    assert height <= image_size[0] * scale < height + 1
    assert width <= image_size[1] * scale < width + 1


@pytest.mark.parametrize("grid", POOLING)
def test_the_poolings_of_a_grid(grid):
    assert poolings(grid) == list(POOLING[grid])


# Crops and tokens over the image

aspects = st.sampled_from(["anyres", "pad", "crop"])


def placed(data, patch_grid, image_size, aspect="anyres", rounds=False):
    """Geometry at some granularity and crop grid."""
    granularity = data.draw(st.sampled_from(POOLING[patch_grid]))
    grids = st.tuples(st.integers(1, 4), st.integers(1, 4))
    crop_grid = data.draw(grids) if aspect == "anyres" else (0, 0)
    side = 14 * patch_grid[0]
    return image_geometry(granularity, patch_grid, side, crop_grid, image_size, aspect, rounds)


@given(st.sampled_from(list(POOLING)), image_sizes, aspects, st.booleans(), st.data())
def test_kept_tokens_and_newlines_are_the_visual_tokens(patch_grid, image_size, aspect, rounds, data):
    geometry = placed(data, patch_grid, image_size, aspect, rounds)
    count = visual_token_count(geometry.granularity, patch_grid, geometry.crop_grid, image_size, rounds)
    rows = {(crop.place[0], row) for crop in geometry.crops[1:] for row in range(*crop.kept_rows)}
    assert sum(crop.kept for crop in geometry.crops) + len(rows) == count == geometry.visual_tokens
    assert geometry.to_dict()["visual_tokens"] == count


@given(st.sampled_from(list(POOLING)), image_sizes, st.data())
def test_what_is_kept_of_each_crop_is_what_unpadding_keeps_of_them_all(patch_grid, image_size, data):
    geometry = placed(data, patch_grid, image_size)
    rows, columns = geometry.token_grid
    kept = {
        (crop.place[0] * rows + row, crop.place[1] * columns + column)
        for crop in geometry.crops[1:]
        for row in range(*crop.kept_rows)
        for column in range(*crop.kept_columns)
    }
    grid = geometry.crop_grid[0] * rows, geometry.crop_grid[1] * columns
    down, across = (range(side)[bounds] for side, bounds in zip(grid, unpad_bounds(grid, image_size), strict=True))
    assert kept == {(row, column) for row in down for column in across}
    assert geometry.crops[0].kept == geometry.granularity


@given(st.sampled_from(list(POOLING)), image_sizes, aspects, st.data())
def test_tokens_fill_their_crop_but_for_patches_that_no_token_averages(patch_grid, image_size, aspect, data):
    geometry = placed(data, patch_grid, image_size, aspect)
    kernel = pooling_kernel(geometry.granularity, patch_grid)
    for crop in geometry.crops:
        sides = zip((crop.row_edges, crop.column_edges), geometry.token_grid, kernel, patch_grid, (0, 1), strict=True)
        for edges, cells, step, patches, axis in sides:
            start, stop = crop.box[axis], crop.box[axis + 2]
            assert len(edges) == cells + 1
            assert edges[0] == start
            lengths = [(b - a) / (stop - start) for a, b in itertools.pairwise(edges)]
            assert lengths == pytest.approx([step / patches] * cells)


@given(image_sizes, st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_local_crops_lie_side_by_side_around_the_whole_image(image_size, crop_grid):
    geometry = image_geometry(16, (4, 4), 56, crop_grid, image_size)
    boxes = {crop.place: crop.box for crop in geometry.crops[1:]}
    rows, columns = crop_grid
    assert list(boxes) == [(r, c) for r in range(rows) for c in range(columns)]
    for (r, c), (_, _, bottom, right) in boxes.items():
        assert r + 1 == rows or boxes[r + 1, c][0] == bottom
        assert c + 1 == columns or boxes[r, c + 1][1] == right
    (top, left, _, _), (_, _, bottom, right) = boxes[0, 0], boxes[rows - 1, columns - 1]
    height, width = image_size
    assert max(top, left) <= 1e-9
    assert bottom >= height - 1e-9
    assert right >= width - 1e-9
    assert geometry.crops[0].box == (0, 0, height, width)


@pytest.mark.parametrize("size", [(112, 112), (90, 200), (224, 70), (300, 300)])
@pytest.mark.parametrize("aspect", ["anyres", "pad", "crop"])
def test_a_crop_shows_what_is_in_its_box(tiny, size, aspect):
    """In an image whose red tells the row and whose green the column: the pixels in the middle of each token."""
    pinpoints = ((56, 112), (112, 112), (112, 56)) if aspect == "anyres" else ()
    config = replace(tiny[0].config, image_aspect_ratio=aspect, grid_pinpoints=pinpoints)
    height, width = size
    y, x = np.mgrid[:height, :width]
    image = np.stack([255 * (y + 0.5) / height, 255 * (x + 0.5) / width, 0 * y], axis=-1).round().astype(np.uint8)
    crops, vision = make_crops(Image.fromarray(image), config), config.vision
    pixels = (crops.pixels * np.array(vision.image_std) + np.array(vision.image_mean)) * 255
    geometry = config.geometry(16, size)
    assert len(geometry.crops) == len(pixels)
    compared = 0
    for crop, shown in zip(geometry.crops, pixels, strict=True):
        for row, column in itertools.product(range(4), range(4)):
            tops, lefts = crop.row_edges[row : row + 2], crop.column_edges[column : column + 2]
            shares = sum(tops) / 2 / height, sum(lefts) / 2 / width
            if all(0.05 < share < 0.95 for share in shares):  # near the padding, bicubic blends with it
                middle = shown[row * 14 + 6 : row * 14 + 8, column * 14 + 6 : column * 14 + 8].mean(axis=(0, 1))
                assert middle[:2] == pytest.approx([255 * share for share in shares], abs=3)
                compared += 1
    assert compared >= 4
