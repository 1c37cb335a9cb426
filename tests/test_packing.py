"""Packing against the layout written as loops over rows and columns of tokens."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from avg_mlx.model.packing import pack

NEWLINE = -1.0


def naive_pack(features, grid, crop_grid, image_size) -> list[float]:
    """Section 7 of the reference; a token is a number."""
    (rows, columns), (crop_rows, crop_columns), (height, width) = grid, crop_grid, image_size
    packed = list(features[0])
    H, W = crop_rows * rows, crop_columns * columns
    top = left = 0
    if width / height > W / H:
        top = (H - int(height * (W / width))) // 2
    else:
        left = (W - int(width * (H / height))) // 2
    for row in range(top, H - top):
        for column in range(left, W - left):
            crop = 1 + (row // rows) * crop_columns + column // columns
            packed.append(features[crop][(row % rows) * columns + column % columns])
        packed.append(NEWLINE)
    return packed


def numbered(crops: int, tokens: int) -> np.ndarray:
    return np.arange(crops * tokens, dtype=np.float32).reshape(crops, tokens)


def packed(features: np.ndarray, grid, crop_grid, image_size) -> list[float]:
    visual_tokens = pack(mx.array(features)[..., None], grid, crop_grid, image_size, mx.array([NEWLINE]))
    assert visual_tokens.shape[1:] == (1,)
    return visual_tokens[:, 0].tolist()


@given(
    grid=st.sampled_from([(6, 6), (12, 6), (2, 1), (1, 1), (3, 4)]),
    crop_grid=st.sampled_from([(1, 2), (2, 1), (2, 2), (1, 3), (3, 1)]),
    image_size=st.tuples(st.integers(1, 2000), st.integers(1, 2000)) | st.sampled_from([(1, 20_000), (20_000, 1)]),
)
def test_any_image_is_packed_row_by_row(grid, crop_grid, image_size):
    features = numbered(1 + crop_grid[0] * crop_grid[1], grid[0] * grid[1])
    assert packed(features, grid, crop_grid, image_size) == naive_pack(features, grid, crop_grid, image_size)


def test_a_worked_example():
    """Two crops side by side, 2×2 tokens each, of an image that fills them."""
    features = numbered(3, 4)
    base = [0, 1, 2, 3]
    assert packed(features, (2, 2), (1, 2), (100, 200)) == [*base, 4, 5, 8, 9, NEWLINE, 6, 7, 10, 11, NEWLINE]


@pytest.mark.parametrize(
    ("image_size", "rows"),
    [((100, 100), [[1, 4], [3, 6]]), ((100, 49), [[], []])],
    ids=["half the columns", "all the columns"],
)
def test_columns_are_cut_alike_on_both_sides(image_size, rows):
    """4 columns of tokens, cut to the 2 in the middle, and to none: every row keeps its newline."""
    features = np.array([[0, 0, 0, 0], [0, 1, 2, 3], [4, 5, 6, 7]], np.float32)
    expected = [0, 0, 0, 0]
    for row in rows:
        expected += [*row, NEWLINE]
    assert packed(features, (2, 2), (1, 2), image_size) == expected


def test_rows_all_cut_away_leave_the_base_crop():
    features = numbered(2 + 1, 36)
    assert packed(features, (6, 6), (1, 2), (1, 20_000)) == features[0].tolist()


def test_a_lone_base_crop_has_no_newline():
    features = numbered(1, 36)
    assert packed(features, (6, 6), (0, 0), (300, 200)) == features[0].tolist()


def test_whole_vectors_are_moved():
    features = mx.random.normal((5, 4, 8))
    newline = mx.random.normal((8,))
    visual_tokens = pack(features, (2, 2), (2, 2), (64, 64), newline)
    assert visual_tokens.shape == (4 + 4 * 5, 8)
    assert mx.array_equal(visual_tokens[:4], features[0])
    assert mx.array_equal(visual_tokens[4:8], mx.concatenate([features[1, :2], features[2, :2]]))
    assert all(mx.array_equal(visual_tokens[4 + 5 * row + 4], newline) for row in range(4))
