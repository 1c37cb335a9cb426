"""The authors' PyTorch layout: tensor names and shapes, and shards read one tensor at a time."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import mlx.core as mx

from .errors import AvgMlxError, InputError
from .files import read_json

Shape = tuple[int, ...]

TOWER = "model.vision_tower.vision_tower."

# From our names to theirs, all applied in this order. CLIP checkpoints do spell it "layrnorm".
RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^language_model\.", ""),
        (r"^image_newline$", "model.image_newline"),
        (r"^projector\.layers\.(\d+)", lambda match: f"model.mm_projector.{2 * int(match[1])}"),
        (r"^router\.crop_mixer\.attention\.(?:query|key|value)_proj\.", "model.router.merger.self_attn.in_proj_"),
        (r"^router\.crop_mixer\.attention\.", "model.router.merger.self_attn."),
        (r"^router\.crop_mixer\.", "model.router.merger."),
        (r"^router\.scorer\.linear1\.", "model.router.router.0."),
        (r"^router\.scorer\.linear2\.", "model.router.router.2."),
        (r"^router\.logit_norm\.", "model.router.norm."),
        (r"^router\.voter$", "model.router.voter"),
        (r"^vision_tower\.(class_embedding|patch_embedding)", r"vision_tower.embeddings.\1"),
        (r"^vision_tower\.position_embedding$", "vision_tower.embeddings.position_embedding.weight"),
        (r"^vision_tower\.pre_layernorm", "vision_tower.pre_layrnorm"),
        (r"^vision_tower\.layers\.(\d+)\.fc", r"vision_tower.layers.\1.mlp.fc"),
        (r"^vision_tower\.layers\.(\d+)\.attention\.", r"vision_tower.layers.\1.self_attn."),
        (r"^(vision_tower\..*)\b([qkv])(?:uery|ey|alue)_proj", r"\1\2_proj"),
        (r"^vision_tower\.layers\.", "vision_tower.encoder.layers."),
        (r"^vision_tower\.", f"{TOWER}vision_model."),
    )
)
STACKED = re.compile(r"^router\.crop_mixer\.attention\.(query|key|value)_proj\.")

# In the files but not in the model: buffers, and the tower's layers beyond the one LLaVA reads.
UNUSED = re.compile(
    r"\.position_ids$|\.rotary_emb\.inv_freq$"
    rf"|^{re.escape(TOWER)}(?:vision_model\.(?:post_layernorm|encoder\.layers\.\d+)\."
    r"|text_model\.|visual_projection|text_projection|logit_scale)"
)


@dataclass(frozen=True)
class Origin:
    """Where in the authors' layout one of our tensors comes from."""

    name: str
    part: int | None = None  # 0, 1, 2: query, key or value of a stacked tensor
    convolution: bool = False  # (out, in, rows, columns) there, (out, rows, columns, in) here

    def shape(self, ours: Shape) -> Shape:
        """The shape in the file, given our tensor's."""
        if self.convolution:
            return ours[0], ours[3], ours[1], ours[2]
        if self.part is not None:
            return 3 * ours[0], *ours[1:]
        return ours

    def take(self, there: mx.array) -> mx.array:
        """Our tensor, given the tensor in the file."""
        if self.convolution:
            return mx.contiguous(there.transpose(0, 2, 3, 1))
        if self.part is not None:
            return mx.contiguous(mx.split(there, 3)[self.part])
        return there

    def give(self, ours: mx.array) -> mx.array:
        """The tensor in the file, given ours; parts of a stacked one are yet to be stacked."""
        return mx.contiguous(ours.transpose(0, 3, 1, 2)) if self.convolution else ours


def origin(name: str) -> Origin:
    """The place of our tensor `name` in the authors' layout."""
    stacked = STACKED.match(name)
    part = ("query", "key", "value").index(stacked[1]) if stacked else None
    convolution = name == "vision_tower.patch_embedding.weight"
    for pattern, replacement in RENAMES:
        name = pattern.sub(replacement, name)
    return Origin(name, part, convolution)


class Shards(Protocol):
    """A checkpoint's tensors, read on demand."""

    shapes: dict[str, Shape]

    def read(self, name: str) -> mx.array: ...


def load_arrays(file: Path) -> dict[str, mx.array]:
    """The arrays of a safetensors file, lazily."""
    try:
        return cast(dict[str, mx.array], mx.load(str(file)))
    except RuntimeError as error:  # of a type that MLX has not
        raise InputError(f"{file} cannot be loaded ({error}); get it in float16, bfloat16 or float32") from error


class SafetensorsShards:
    """Safetensors files; headers are checked against file lengths when opened."""

    def __init__(self, files: Iterable[Path]):
        from safetensors import SafetensorError, safe_open

        self.files = list(files)
        self.shapes: dict[str, Shape] = {}
        self._file_of: dict[str, Path] = {}
        for file in self.files:
            try:
                with safe_open(file, framework="numpy") as shard:
                    for name in shard.keys():  # noqa: SIM118 - not a mapping
                        self.shapes[name] = tuple(shard.get_slice(name).get_shape())
                        self._file_of[name] = file
            except (SafetensorError, OSError) as error:
                raise InputError(f"{file} is truncated or damaged ({error}); download it again") from error

    def read(self, name: str) -> mx.array:
        # Loaded anew each time: arrays are lazy, and a kept one would hold its data once it is evaluated.
        return load_arrays(self._file_of[name])[name]


class PickledShards:
    """`pytorch_model*.bin`, mapped into memory; pickled code is never run."""

    def __init__(self, files: Iterable[Path]):
        try:
            import torch
        except ImportError:
            raise AvgMlxError(
                "pickled .bin shards need PyTorch to read them; pip install 'avg-mlx[torch]', then convert again"
            ) from None
        self.shapes: dict[str, Shape] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        for file in files:
            try:
                tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                self.shapes |= {name: tuple(tensor.shape) for name, tensor in tensors.items()}
                self._tensors |= tensors
            except Exception as error:  # UnpicklingError, RuntimeError, EOFError and more
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise InputError(
                    f"{file} cannot be read as plain tensors ({reason}); get it in safetensors form"
                ) from error

    def read(self, name: str) -> mx.array:
        import torch

        tensor = self._tensors[name].contiguous()
        if tensor.dtype == torch.bfloat16:  # NumPy has no such type
            return mx.array(tensor.view(torch.int16).numpy()).view(mx.bfloat16)
        return mx.array(tensor.numpy())


def open_shards(folder: Path) -> Shards:
    """The weights of a checkpoint folder, by index or by usual names; InputError if there are none."""
    for kind, index, pattern in (
        (SafetensorsShards, "model.safetensors.index.json", "*.safetensors"),
        (PickledShards, "pytorch_model.bin.index.json", "pytorch_model*.bin"),
    ):
        if (folder / index).is_file():
            return kind(_indexed_files(folder / index))
        if files := sorted(folder.glob(pattern)):
            return kind(files)
    raise InputError(f"{folder} has no weights; expected *.safetensors or pytorch_model*.bin")


class TowerShards:
    """A CLIP repository's tensors under the names they have inside an AVG-LLaVA checkpoint."""

    def __init__(self, shards: Shards):
        self._shards = shards
        self.shapes = {TOWER + name: shape for name, shape in shards.shapes.items()}

    def read(self, name: str) -> mx.array:
        return self._shards.read(name.removeprefix(TOWER))


def _indexed_files(index: Path) -> list[Path]:
    try:
        files = [index.parent / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    except (KeyError, AttributeError, TypeError) as error:
        raise InputError(
            f"{index} is not an index of shards: it has no weight_map of file names; get it again"
        ) from error
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise InputError(f"{index} names absent files: {', '.join(absent)}; download them into {index.parent}")
    return files
