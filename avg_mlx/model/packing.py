"""From chosen features to visual tokens: crops are laid out, padding is cut away, rows end with the newline token."""

import mlx.core as mx

from ..geometry import Pair, unpad_bounds


def pack(
    features: mx.array, grid: Pair, crop_grid: Pair, image_size: Pair, newline: mx.array, rounds: bool = False
) -> mx.array:
    """Turn one image's features, (crops, tokens, D) with the base crop first, into (visual tokens, D).

    grid: a crop's (rows, columns) of tokens. crop_grid: (rows, columns) of local crops; with (0, 0) there is only the
    base crop, whose tokens are returned as they are. image_size: (height, width) of the original. newline: (D,).
    rounds: see `unpad_bounds`.
    """
    base, local = features[0], features[1:]
    if crop_grid == (0, 0):
        return base
    (rows, columns), (crop_rows, crop_columns) = grid, crop_grid
    D = features.shape[-1]
    x = local.reshape(crop_rows, crop_columns, rows, columns, D).swapaxes(1, 2)
    grid = crop_rows * rows, crop_columns * columns
    x = x.reshape(*grid, D)[unpad_bounds(grid, image_size, rounds)]  # reading order
    newlines = mx.broadcast_to(newline, (x.shape[0], 1, D))
    x = mx.concatenate([x, newlines], axis=1)
    return mx.concatenate([base, x.reshape(-1, D)])
