"""PyTorch's layouts: the names and shapes that the authors' checkpoints and the Hub's give to our tensors."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

import mlx.core as mx

from .shards import Shape

TOWER = "model.vision_tower.vision_tower."  # in the authors' layout

Rename = tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]


def _renames(*rules: tuple[str, str | Callable[[re.Match[str]], str]]) -> tuple[Rename, ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in rules)


# From our names to theirs, all applied in this order. CLIP checkpoints do spell it "layrnorm".
TOWER_AND_ROUTER = _renames(
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
)
AUTHORS = _renames(
    (r"^language_model\.", ""),
    (r"^image_newline$", "model.image_newline"),
    (r"^projector\.layers\.(\d+)", lambda match: f"model.mm_projector.{2 * int(match[1])}"),
    (r"^vision_tower\.", f"{TOWER}vision_model."),
)
HUB = _renames((r"^projector\.layers\.(\d+)", lambda match: f"multi_modal_projector.linear_{int(match[1]) + 1}"))
HUB_TOWER = _renames((r"^vision_tower\.", "vision_tower.vision_model."))  # until transformers 5 left it out
HUB_IN_MEMORY = _renames(  # as transformers 5 calls the tensors that it has loaded
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "language_model."),
    (r"^(?=language_model\.|vision_tower\.|multi_modal_projector\.|image_newline$)", "model."),
)
STACKED = re.compile(r"^router\.crop_mixer\.attention\.(query|key|value)_proj\.")

# Tensors in the files that the model does not use: buffers, and the tower's layers beyond the one that LLaVA reads.
UNUSED = re.compile(
    r"\.position_ids$|\.rotary_emb\.inv_freq$"
    rf"|^(?:{re.escape(TOWER)}|(?:model\.)?vision_tower\.)(?:(?:vision_model\.)?(?:post_layernorm|encoder\.layers\.\d+)\."
    r"|text_model\.|visual_projection|text_projection|logit_scale)"
)


@dataclass(frozen=True)
class Origin:
    """The place in a checkpoint where one of our tensors comes from."""

    name: str
    part: int | None = None  # 0, 1, 2: query, key or value of a stacked tensor
    convolution: bool = False  # (out, in, rows, columns) there, (out, rows, columns, in) here

    def shape(self, ours: Shape) -> Shape:
        """Return the shape in the file for our tensor's shape."""
        if self.convolution:
            return ours[0], ours[3], ours[1], ours[2]
        if self.part is not None:
            return 3 * ours[0], *ours[1:]
        return ours

    def take(self, there: mx.array) -> mx.array:
        """Return our tensor for the tensor in the file."""
        if self.convolution:
            return mx.contiguous(there.transpose(0, 2, 3, 1))
        if self.part is not None:
            return mx.contiguous(mx.split(there, 3)[self.part])
        return there

    def give(self, ours: mx.array) -> mx.array:
        """Return the tensor in the file for ours; the parts of a stacked one remain to be stacked."""
        return mx.contiguous(ours.transpose(0, 3, 1, 2)) if self.convolution else ours


@dataclass(frozen=True)
class Layout:
    """Where a checkpoint has our tensors."""

    renames: tuple[Rename, ...]

    def origin(self, name: str) -> Origin:
        """Return the place of our tensor `name`."""
        stacked = STACKED.match(name)
        part = ("query", "key", "value").index(stacked[1]) if stacked else None
        convolution = name == "vision_tower.patch_embedding.weight"
        for pattern, replacement in self.renames:
            name = pattern.sub(replacement, name)
        return Origin(name, part, convolution)


AUTHORS_LAYOUT = Layout(TOWER_AND_ROUTER + AUTHORS)
HUB_LAYOUT = Layout(TOWER_AND_ROUTER + HUB + HUB_TOWER)  # as every release of transformers reads it


def hub_layout(names: Collection[str]) -> Layout:
    """Return the Hub's layout in the spelling of tensors' `names`, which has changed from release to release."""
    in_memory = any(name.startswith("model.language_model.") for name in names)
    tower = any(".vision_model." in name for name in names)
    return Layout(TOWER_AND_ROUTER + HUB + HUB_TOWER * tower + HUB_IN_MEMORY * in_memory)
