"""AVG-LLaVA on MLX: a vision-language model that decides for itself how closely to look.

    from avg_mlx import load, generate

    model, tokenizer = load("mlx_model")
    print(generate(model, tokenizer, "What is in this image?", "photo.jpg").text)

The public names are listed in `__init__.pyi`. Each is imported when it is first used, so that `--help` need not wait
for MLX.
"""

import lazy_loader

from . import blas, version  # noqa: F401  # blas comes before anything imports MLX

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = version.VERSION
