"""A conversation in which nothing is computed twice."""

from collections.abc import Iterator
from contextlib import closing
from typing import Unpack

from ..errors import InputError
from ..inputs.image import Crops
from ..inputs.image_io import MAX_PIXELS
from ..inputs.prompt import PLACEHOLDER, Message, Messages, build_messages
from ..inputs.tokenizer import Tokenizer
from ..model.avg_llava import Model
from .answer import Segment
from .caches import VISION_CACHE_BYTES, PrefixCache, VisionCache
from .generation import decode
from .options import AskOptions, Decoding, Looking, check_names, pick
from .steps import Images, listed, prepare, read_crops


class ChatSession:
    """A conversation: questions, answers, and images that may come with any question.

    Each image is seen once. The router runs for every question, since it reads all the text; as long as it makes the
    same choice, only new positions are prefilled. Answers equal those of `stream_generate` on the same messages and
    images.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        system_prompt: str | None = None,
        max_pixels: int = MAX_PIXELS,
        vision_cache_bytes: int = VISION_CACHE_BYTES,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.system_prompt, self.max_pixels = system_prompt, max_pixels
        self.messages: list[Message] = []  # without the system prompt
        self.images: list[Crops] = []  # in the order of the messages' placeholders
        self._vision = VisionCache(model, vision_cache_bytes)
        self._kv = PrefixCache()

    @property
    def bytes_held(self) -> int:
        """Bytes held by cached features and KV."""
        return self._vision.nbytes + self._kv.nbytes

    def ask(self, prompt: str, image: Images = None, **options: Unpack[AskOptions]) -> Iterator[Segment]:
        """Answer the next question, segment by segment; parameters and errors as for `stream_generate`.

        The question and its images join the conversation with the answer, unless the answer is abandoned or has no
        text. With a rotating or quantized KV cache (max_kv_size, kv_bits) the whole conversation is prefilled.
        """
        check_names(options, AskOptions)
        looking = pick(Looking, {**options, "system_prompt": self.system_prompt, "max_pixels": self.max_pixels})
        decoding = pick(Decoding, options)
        looking.check(self.model.config)
        decoding.check(self.model.config)
        return self._answer(prompt, image, looking, decoding)

    def restore(self, messages: Messages, image: Images = None) -> None:
        """Go on with a saved conversation: messages with a placeholder for every image, and the images.

        A system message in front becomes the system prompt. Raises InputError if this is not a conversation that
        ends with an answer, or if an image cannot be used.
        """
        restored = build_messages(messages, len(listed(image)))
        system = restored.pop(0)["content"] if restored[0]["role"] == "system" else None
        roles = [message["role"] for message in restored]
        if roles != ["user", "assistant"] * (len(roles) // 2):
            raise InputError(f"the messages are by {', '.join(roles)}; expected user and assistant in turn")
        self.images = list(read_crops(image, self.model.config, self.max_pixels))
        self.messages, self.system_prompt = restored, system

    def clear(self) -> None:
        """Forget the conversation. What was computed for it is still reused where it fits."""
        self.messages, self.images = [], []

    def _answer(self, prompt: str, image: Images, looking: Looking, decoding: Decoding) -> Iterator[Segment]:
        [question] = build_messages(prompt, len(listed(image)))
        messages, images = [*self.messages, question], [*self.images, *listed(image)]
        prepared = prepare(self.model, self.tokenizer, messages, images, looking, self._vision)
        segments = decode(self.model, self.tokenizer, prepared, decoding, self._kv)
        with closing(segments):
            for segment in segments:
                if segment.answer is not None:
                    text = segment.answer.text.replace(PLACEHOLDER, "")  # spelled out, it would stand for an image
                    if text.strip():
                        self.messages = [*messages, {"role": "assistant", "content": text}]
                        self.images = list(prepared.layout.crops)
                yield segment
