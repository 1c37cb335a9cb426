"""Ask AVG-LLaVA about an image: the same as `avg-mlx generate`."""

import sys

from avg_mlx.cli.generate import main

if __name__ == "__main__":
    sys.exit(main())
