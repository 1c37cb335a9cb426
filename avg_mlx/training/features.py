"""Image features, computed once and kept on disk if wanted."""

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..errors import AvgMlxError
from ..files import replacing
from ..model.avg_llava import Model
from ..weights.shards import load_arrays
from .data import Sample
from .forward import load_crops


@dataclass(frozen=True)
class FeatureCache:
    """Image features of samples, kept in a folder if there is one."""

    model: Model
    folder: Path | None = None

    def features(self, sample: Sample) -> mx.array:
        """(crops, patches, D) of the sample's image."""
        file = self.folder / f"{sample.key}.safetensors" if self.folder else None
        if file and file.exists():
            return load_arrays(file)["features"]
        features = self.model.encode(load_crops(self.model, sample)[0])
        mx.eval(features)
        if file:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                with replacing(file, f"{mx.distributed.init().rank()}-") as partial:  # all processes validate
                    mx.save_safetensors(str(partial), {"features": features})
            except (OSError, RuntimeError) as error:
                raise AvgMlxError(f"cannot write {file} ({error}); make room, then resume with --resume") from error
        return features
