"""A conversation in which nothing is computed twice."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

from ..inputs.image import Crops
from ..inputs.image_io import MAX_PIXELS
from ..inputs.prompt import PLACEHOLDER, build_messages
from ..model.avg_llava import Model
from .caches import VISION_CACHE_BYTES, PrefixCache, VisionCache
from .generation import MAX_TOKENS, Segment, check_decoding, stream_answer
from .view import AUTO, Images, Stopwatch, listed, look


class ChatSession:
    """A conversation: questions, answers, and images that may come with any question.

    An image is seen once. The router runs for every question, since it reads all the text; as long as its choice stays
    the same, only what is new is prefilled. Answers are those of `stream_generate` on the same messages and images.
    """

    def __init__(
        self,
        model: Model,
        tokenizer,
        *,
        system_prompt: str | None = None,
        max_pixels: int = MAX_PIXELS,
        vision_cache_bytes: int = VISION_CACHE_BYTES,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.system_prompt, self.max_pixels = system_prompt, max_pixels
        self.messages: list[dict[str, str]] = []  # without the system prompt
        self.images: list[Crops] = []  # in the order of the messages' placeholders
        self._vision = VisionCache(model, vision_cache_bytes)
        self._kv = PrefixCache()

    @property
    def bytes_held(self) -> int:
        """By image features and the KV cache."""
        return self._vision.nbytes + self._kv.nbytes

    def ask(
        self,
        prompt: str,
        image: Images = None,
        *,
        granularity: int | str = AUTO,
        max_visual_tokens: int | None = None,
        max_tokens: int = MAX_TOKENS,
        max_kv_size: int | None = None,
        **step_options: Any,
    ) -> Iterator[Segment]:
        """Answer the next question, segment by segment; parameters as for `stream_generate`.

        The question and its images join the conversation together with the answer: not if it is abandoned or has no
        text. With a rotating or quantized KV cache (max_kv_size, kv_bits) the whole conversation is prefilled.
        """
        check_decoding(self.model, max_tokens, max_kv_size, step_options)
        stopwatch = Stopwatch()
        [question] = build_messages(prompt, len(listed(image)))
        views = look(
            self.model,
            self.tokenizer,
            [*self.messages, question],
            [*self.images, *listed(image)],
            granularity=granularity,
            max_visual_tokens=max_visual_tokens,
            system_prompt=self.system_prompt,
            max_pixels=self.max_pixels,
            vision=self._vision,
            stopwatch=stopwatch,
        )
        images = list(views.crops)
        segments = stream_answer(
            self.model,
            self.tokenizer,
            views,
            stopwatch,
            max_tokens=max_tokens,
            max_kv_size=max_kv_size,
            kv=self._kv,
            **step_options,
        )
        del views  # its features are for the cache to keep or to drop
        with closing(segments):
            for segment in segments:
                if segment.answer is not None:
                    self._join(question, images, segment.answer.text)
                yield segment

    def clear(self) -> None:
        """Forget the conversation; what was computed for it is still reused where it fits."""
        self.messages, self.images = [], []

    def _join(self, question: dict[str, str], images: list[Crops], text: str) -> None:
        text = text.replace(PLACEHOLDER, "")  # spelled out by the model, it would stand for an image
        if text.strip():
            self.messages = [*self.messages, question, {"role": "assistant", "content": text}]
            self.images = images
