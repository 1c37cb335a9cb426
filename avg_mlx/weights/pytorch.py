"""The authors' PyTorch layout: the names and shapes that their checkpoints give to our tensors."""

import re
from dataclasses import dataclass

import mlx.core as mx

from .shards import Shape

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

# Tensors in the files that the model does not use: buffers, and the tower's layers beyond the one that LLaVA reads.
UNUSED = re.compile(
    r"\.position_ids$|\.rotary_emb\.inv_freq$"
    rf"|^{re.escape(TOWER)}(?:vision_model\.(?:post_layernorm|encoder\.layers\.\d+)\."
    r"|text_model\.|visual_projection|text_projection|logit_scale)"
)


@dataclass(frozen=True)
class Origin:
    """The place in the authors' layout where one of our tensors comes from."""

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


def origin(name: str) -> Origin:
    """Return the place of our tensor `name` in the authors' layout."""
    stacked = STACKED.match(name)
    part = ("query", "key", "value").index(stacked[1]) if stacked else None
    convolution = name == "vision_tower.patch_embedding.weight"
    for pattern, replacement in RENAMES:
        name = pattern.sub(replacement, name)
    return Origin(name, part, convolution)
