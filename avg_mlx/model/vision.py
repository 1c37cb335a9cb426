"""CLIP vision tower and projector: crops → features."""

import functools
import itertools

import mlx.core as mx
import mlx.nn as nn

from ..config import Config, VisionConfig


@functools.partial(mx.compile, shapeless=True)  # fused into one kernel, like MLX's own activations
def quick_gelu(x: mx.array) -> mx.array:
    """OpenAI CLIP's activation, x · sigmoid(1.702 x)."""
    return x * mx.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": nn.gelu}


class EncoderLayer(nn.Module):
    """A pre-norm Transformer layer; (crops, tokens, D) keeps its shape."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        D, eps = config.hidden_size, config.layer_norm_eps
        self.attention = nn.MultiHeadAttention(D, config.num_attention_heads, bias=True)
        self.fc1 = nn.Linear(D, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, D)
        self.layer_norm1 = nn.LayerNorm(D, eps=eps)
        self.layer_norm2 = nn.LayerNorm(D, eps=eps)
        self.activation = ACTIVATIONS[config.hidden_act]

    def __call__(self, x: mx.array) -> mx.array:
        y = self.layer_norm1(x)
        x = x + self.attention(y, y, y)
        return x + self.fc2(self.activation(self.fc1(self.layer_norm2(x))))


class VisionTower(nn.Module):
    """CLIP's ViT up to the layer whose output LLaVA uses. Later layers are neither kept nor run.

    Ported from `CLIPVisionTransformer` of Hugging Face transformers.
    """

    def __init__(self, config: VisionConfig, num_layers: int):
        super().__init__()
        D, (rows, columns) = config.hidden_size, config.patch_grid
        self.patch_embedding = nn.Conv2d(3, D, config.patch_size, stride=config.patch_size, bias=False)
        self.class_embedding = mx.zeros(D)
        self.position_embedding = mx.zeros((rows * columns + 1, D))
        self.pre_layernorm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.layers = [EncoderLayer(config) for _ in range(num_layers)]

    def __call__(self, pixels: mx.array) -> mx.array:
        """Turn pixels, (crops, size, size, 3), into (crops, patches, D), row-major, without the class token."""
        x = self.patch_embedding(pixels.astype(self.patch_embedding.weight.dtype))
        crops, rows, columns, D = x.shape
        x = x.reshape(crops, rows * columns, D)
        class_token = mx.broadcast_to(self.class_embedding, (crops, 1, D))
        x = mx.concatenate([class_token, x], axis=1) + self.position_embedding
        x = self.pre_layernorm(x)
        for layer in self.layers:
            x = layer(x)
        return x[:, 1:]


class Projector(nn.Module):
    """Linear layers with exact GELUs between them, from the tower's width to the language model's."""

    def __init__(self, config: Config):
        super().__init__()
        widths = [config.vision.hidden_size] + [config.hidden_size] * config.projector_depth
        self.layers = [nn.Linear(i, o) for i, o in itertools.pairwise(widths)]

    def __call__(self, x: mx.array) -> mx.array:
        x = self.layers[0](x)
        for layer in self.layers[1:]:
            x = layer(nn.gelu(x))
        return x
