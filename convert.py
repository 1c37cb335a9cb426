"""Convert a PyTorch AVG-LLaVA checkpoint to an MLX folder: the same as `avg-mlx convert`."""

import sys

from avg_mlx.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
