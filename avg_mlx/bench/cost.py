"""Counted work: the operations and bytes of every stage, from its shapes. Nothing here imports MLX.

Products are counted (linear layers, the patch convolution, attention), with a multiplication and its addition as two
operations. Element-wise work is not counted. A product reads its operands and writes its result once, and a call reads
its weights once. Attention is counted as a fused kernel computes it: scores are never written, and those above the
diagonal of causal attention are never computed.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from ..config import Config

PREFILL_STEP = 2048  # positions of a prefill call, mlx-lm's default
PARTS = ("vision_tower", "projector", "router", "language_model")


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes that memory has to move for them."""

    flop: float = 0
    bytes: float = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flop + other.flop, self.bytes + other.bytes)

    def __rmul__(self, times: float) -> "Work":
        return Work(times * self.flop, times * self.bytes)

    def seconds(self, flop_per_second: float, bytes_per_second: float) -> float:
        """The least time that a device with these peaks needs."""
        return max(self.flop / flop_per_second, self.bytes / bytes_per_second)


@dataclass(frozen=True)
class Cost:
    """Counts the work of a model's stages.

    bits: bits per weight of each of PARTS. activation_bits: bits per number of activations and the KV cache.
    """

    config: Config
    bits: Mapping[str, float]
    activation_bits: float = 16

    def vision(self, crops: int) -> Work:
        """Work of the vision tower, up to the last layer that is run, and of the projector."""
        vision, tower = self.config.vision, "vision_tower"
        D, hidden = vision.hidden_size, vision.intermediate_size
        patches = vision.patch_grid[0] * vision.patch_grid[1]
        tokens = patches + 1  # the class token
        layer = (
            4 * self._linear(tower, crops * tokens, D, D)
            + crops * self._attention(tokens, tokens, tokens**2, D, D)
            + self._linear(tower, crops * tokens, D, hidden)
            + self._linear(tower, crops * tokens, hidden, D)
        )
        work = self._linear(tower, crops * patches, 3 * vision.patch_size**2, D) + self.config.vision_layers * layer
        widths = [D] + [self.config.hidden_size] * self.config.projector_depth
        for inner, outer in itertools.pairwise(widths):
            work += self._linear("projector", crops * patches, inner, outer)
        return work

    def router(self, crops: int, text_tokens: int) -> Work:
        """Work of the router as it runs here: it projects before pooling and reads the text once for all crops."""
        patches = self.config.vision.patch_grid[0] * self.config.vision.patch_grid[1]
        visual = self._mixed(crops, patches, sum(self.config.granularities))
        kept = self.config.filtered_text_num
        return self._text_filter(text_tokens) + visual + self._mixed(1, kept, kept)

    def reference_router(self, crops: int, text_tokens: int) -> Work:
        """Work of the router as the reference runs it: every crop's pyramid and text pass all layers."""
        rows = self.config.voter_size
        return self._text_filter(text_tokens) + self._mixed(crops, rows, rows)

    def prefill(self, positions: int) -> Work:
        """Work from a prompt to its first token, as mlx-lm runs it: the last position passes by itself."""
        return self.fill(positions - 1) + self.decode(positions)

    def fill(self, positions: int) -> Work:
        """Work of positions that only fill the cache: in the last layer they need just their keys and values."""
        work = Work()
        for start in range(0, positions, PREFILL_STEP):
            rows = min(PREFILL_STEP, positions - start)
            work += (self._layers - 1) * self._layer(rows, start) + self._keys_and_values(rows)
        return work

    def reference_prefill(self, positions: int) -> Work:
        """Work from a prompt to its first token if all positions pass all layers."""
        return self._layers * self._layer(positions, 0) + self._head()

    def decode(self, context: int) -> Work:
        """Work of one more token, which becomes the last of `context` positions."""
        return self._layers * self._layer(1, context - 1) + self._head()

    @property
    def _layers(self) -> int:
        return self.config.text["num_hidden_layers"]

    @property
    def _attention_widths(self) -> tuple[int, int]:
        """The widths of queries, and of keys or values."""
        text, size = self.config.text, self.config.head_size
        heads: int = text["num_attention_heads"]
        return heads * size, (text.get("num_key_value_heads") or heads) * size

    def _layer(self, rows: int, cached: int) -> Work:
        """Work of a layer of the language model for `rows` new positions after `cached` ones."""
        llm, D, hidden = "language_model", self.config.hidden_size, self.config.text["intermediate_size"]
        queries, keys = self._attention_widths
        return (
            self._linear(llm, rows, D, queries)
            + self._keys_and_values(rows)
            + self._attention(rows, cached + rows, rows * cached + rows * (rows + 1) // 2, queries, keys)
            + self._linear(llm, rows, queries, D)
            + 2 * self._linear(llm, rows, D, hidden)
            + self._linear(llm, rows, hidden, D)
        )

    def _keys_and_values(self, rows: int) -> Work:
        return 2 * self._linear("language_model", rows, self.config.hidden_size, self._attention_widths[1])

    def _head(self) -> Work:
        return self._linear("language_model", 1, self.config.hidden_size, self.config.vocab_size)

    def _mixed(self, crops: int, projected: int, positions: int) -> Work:
        """Work of crop mixer and scorer, where `projected` rows of a crop become the q, k and v of `positions`."""
        D, rows = self.config.hidden_size, crops * positions
        return (
            3 * self._linear("router", crops * projected, D, D)
            + positions * self._attention(crops, crops, crops**2, D, D)
            + 4 * self._linear("router", rows, D, D)  # out_proj, linear1, linear2; the scorer's first
            + self._linear("router", rows, D, len(self.config.granularities))
        )

    def _text_filter(self, text_tokens: int) -> Work:
        D, activation = self.config.hidden_size, self.activation_bits / 8
        return Work(2 * text_tokens * D, activation * text_tokens * D)

    def _linear(self, part: str, rows: int, inner: int, outer: int) -> Work:
        weights = self.bits[part] / 8 * inner * outer
        return Work(2 * rows * inner * outer, weights + self.activation_bits / 8 * rows * (inner + outer))

    def _attention(self, queries: int, keys: int, pairs: int, query_width: int, key_width: int) -> Work:
        """Work of `pairs` scores, where queries and results are `query_width` wide, keys and values `key_width`."""
        numbers = 2 * queries * query_width + 2 * keys * key_width
        return Work(4 * pairs * query_width, self.activation_bits / 8 * numbers)
