"""Image features, computed once and kept on disk if wanted."""

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..errors import AvgMlxError
from ..model.avg_llava import Model
from ..weights.shards import load_arrays
from .data import Sample
from .forward import load_crops


@dataclass(frozen=True)
class FeatureCache:
    """Image features: of the samples seen so far, in files of a folder if there is one."""

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
            partial = file.with_name(f".partial-{mx.distributed.init().rank()}-{file.name}")  # all processes validate
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                mx.save_safetensors(str(partial), {"features": features})
                partial.replace(file)
            except (OSError, RuntimeError) as error:
                raise AvgMlxError(f"cannot write {file} ({error}); make room, then go on with --resume") from error
        return features
