"""What lmms-eval reads at its start, to know that there is a model `avg_mlx`. It loads nothing else of this package."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

MODEL = "avg_mlx"


def manifest() -> "ModelManifest":
    """The entry point `lmms_eval.models`, which pyproject.toml names."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(MODEL, chat_class_path="avg_mlx.benchmark.plugin.AvgMlx")
