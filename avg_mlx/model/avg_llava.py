"""AVG-LLaVA: an image and a question travel one way.

1. crops → features                      vision tower, projector
2. features → pyramid                    granularity scaler
3. pyramid + instruction → logits        router; the largest picks one granularity for the image
4. chosen features → visual tokens       packing
5. visual tokens → prompt embeddings     in the placeholders' places
6. embeddings → next-token logits        mlx-lm's language model
"""

import importlib
import inspect
import itertools
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..config import Config
from ..errors import InputError
from ..geometry import token_grid
from ..inputs.image import Crops
from ..inputs.prompt import PLACEHOLDER_ID
from .packing import pack
from .router import Router, Scores
from .scaler import pool, pyramid
from .vision import Projector, VisionTower

TEXT_MODELS = ("llama", "mistral", "qwen2", "qwen3")


class Model(nn.Module):
    """The whole model; its sizes and parts are those that `config` describes."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config.vision, config.vision_layers)
        self.projector = Projector(config)
        if config.has_newline:
            self.image_newline = mx.zeros(config.hidden_size)
        if config.has_router:
            self.router = Router(config)
        self.language_model = language_model(config.text)

    @property
    def dtype(self) -> mx.Dtype:
        """The type of all weights that are not quantized."""
        return self.projector.layers[0].bias.dtype

    def encode(self, crops: Crops) -> mx.array:
        """Compute the features of one image: (crops, patches, D)."""
        return self.projector(self.run_tower(crops))

    def run_tower(self, crops: Crops) -> mx.array:
        """Run the vision tower alone, without the projector: (crops, patches, D of the tower)."""
        return self.vision_tower(mx.array(crops.pixels))

    def embed_text(self, ids: Sequence[int]) -> mx.array:
        """Look up the input embeddings of all tokens except the placeholders: (tokens, D).

        Raises InputError for an id outside the vocabulary, since MLX would read beyond the embeddings.
        """
        text = [i for i in ids if i != PLACEHOLDER_ID]
        outside = [i for i in text if not 0 <= i < self.config.vocab_size]
        if outside:
            size = self.config.vocab_size
            raise InputError(f"token id {outside[0]} is not in the vocabulary of {size}; give the model's own ids")
        return self.language_model.model.embed_tokens(mx.array(text))

    def route(self, features: mx.array, text: mx.array) -> mx.array:
        """Compute the router's logits, (granularities,), from one image's features and the prompt's text embeddings."""
        return self.router(features, text, self._pyramid)

    def router_scores(self, features: mx.array, text: mx.array) -> Scores:
        """Compute what the router's logits are made of, from the same."""
        return self.router.score(features, text, self._pyramid)

    def _pyramid(self, x: mx.array) -> mx.array:
        return pyramid(x, self.config.granularities, self.config.vision.patch_grid)

    def pack(self, features: mx.array, granularity: int, crops: Crops) -> mx.array:
        """Turn one image's features into its visual tokens at `granularity`: (visual tokens, D)."""
        patch_grid = self.config.vision.patch_grid
        chosen = pool(features, granularity, patch_grid)
        grid = token_grid(granularity, patch_grid)
        if not self.config.has_newline:
            return chosen[0]
        return pack(chosen, grid, crops.crop_grid, crops.image_size, self.image_newline, self.config.rounds)

    def splice(self, ids: Sequence[int], text: mx.array, visual_tokens: Sequence[mx.array]) -> mx.array:
        """Put each image's visual tokens in its placeholder's place among the text embeddings: (positions, D)."""
        cuts = [k - n for n, k in enumerate(k for k, i in enumerate(ids) if i == PLACEHOLDER_ID)]
        parts = []
        for stretch, image in itertools.zip_longest(mx.split(text, cuts), visual_tokens):
            parts += [stretch] if image is None else [stretch, image.astype(text.dtype)]
        return mx.concatenate(parts)

    def hidden(self, embeddings: mx.array, cache: list[Any] | None = None) -> mx.array:
        """Run the language model without its head: (batch, positions, D) → the same shape, normalized."""
        ids = mx.zeros(embeddings.shape[:2], mx.int32)
        return self.language_model.model(ids, cache=cache, input_embeddings=embeddings)

    def head(self, hidden: mx.array) -> mx.array:
        """Turn hidden states into logits: (…, D) → (…, vocabulary)."""
        if self.config.text["tie_word_embeddings"]:
            return self.language_model.model.embed_tokens.as_linear(hidden)
        return self.language_model.lm_head(hidden)

    def __call__(self, embeddings: mx.array, cache: list[Any] | None = None) -> mx.array:
        """Compute next-token logits: (batch, positions, D) → (batch, positions, vocabulary)."""
        return self.head(self.hidden(embeddings, cache))


def language_model(keys: Mapping[str, Any]) -> nn.Module:
    """Make mlx-lm's model of the type that `keys` name. Raises InputError if it takes no embeddings."""
    from mlx_lm.utils import MODEL_REMAPPING

    name = keys["model_type"]
    module = MODEL_REMAPPING.get(name, name)
    if find_spec(f"mlx_lm.models.{module}") is None:
        raise InputError(f"mlx-lm has no model of type {name!r}; a newer release may have")
    llm = importlib.import_module(f"mlx_lm.models.{module}")
    model = llm.Model(llm.ModelArgs.from_dict(keys))
    if "input_embeddings" not in inspect.signature(type(model.model).__call__).parameters:
        raise InputError(f"mlx-lm's model of type {name!r} reads text only; tested are {', '.join(TEXT_MODELS)}")
    return model
