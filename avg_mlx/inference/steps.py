"""From image and question to the language model's input: see, choose, compose.

Everything that answers, routes, evaluates or collects feedback takes these steps.
"""

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import mlx.core as mx

from ..config import Config
from ..inputs.image import Crops, make_crops
from ..inputs.image_io import MAX_PIXELS, ImageSource, read_image
from ..inputs.prompt import PLACEHOLDER_ID, Messages, TooLong, build_messages, encode_messages
from ..inputs.tokenizer import Tokenizer
from ..model.avg_llava import Model
from .caches import Key, VisionCache, encode_images
from .options import AUTO, Looking
from .view import Routing, View, view_image

Images = ImageSource | Crops | Sequence[ImageSource | Crops] | None
Filler = TypeVar("Filler")


@dataclass
class Seconds:
    """Seconds per stage, filled in as each stage ends."""

    preprocess: float = 0.0
    vision: float = 0.0
    router: float = 0.0
    prefill: float = 0.0
    generation: float = 0.0


class Stopwatch:
    """Tells how long the stages take, one after another."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self, *arrays: mx.array) -> float:
        """Seconds since the last lap, once the arrays that this stage computes are evaluated."""
        mx.eval(arrays)
        last, self._last = self._last, time.perf_counter()
        return self._last - last


@dataclass(frozen=True)
class Seen:
    """A prompt whose images have passed the vision tower: all that router and language model read."""

    ids: tuple[int, ...]  # text, and PLACEHOLDER_ID for each image
    text: mx.array  # (text tokens, D)
    crops: tuple[Crops, ...]
    features: tuple[mx.array, ...]  # for each image (crops, patches, D)
    vision_calls: int = 0  # images that went through the vision tower for this
    seconds: Seconds = field(default_factory=Seconds)

    def embeddings(self, model: Model, granularities: Iterable[int]) -> mx.array:
        """The language model's input, each image packed at its granularity: (positions, D)."""
        images = zip(self.features, granularities, self.crops, strict=True)
        return model.splice(self.ids, self.text, [model.pack(*image) for image in images])


@dataclass(frozen=True)
class Layout:
    """Where a prompt's text and images stand in the language model's input."""

    ids: tuple[int, ...]  # text, and PLACEHOLDER_ID for each image
    crops: tuple[Crops, ...]
    views: tuple[View, ...]
    vision_calls: int
    seconds: Seconds

    @property
    def positions(self) -> int:
        """The length of the language model's input."""
        return len(self.ids) - len(self.views) + sum(view.visual_tokens for view in self.views)

    def position_ids(self, filler: int) -> list[int]:
        """One token id for each position, `filler` for visual tokens."""
        return list(self._spread([filler] * len(self.views)))

    def position_keys(self) -> list[Key]:
        """Keys that tell positions apart: prompts that begin with the same keys begin with the same embeddings."""
        images = zip(self.crops, self.views, strict=True)
        return list(self._spread([(crops.digest, view.granularity) for crops, view in images]))

    def _spread(self, fillers: Iterable[Filler]) -> Iterator[int | Filler]:
        """The ids of text, and each image's filler as often as it has visual tokens."""
        images = zip(fillers, self.views, strict=True)
        for id in self.ids:
            if id == PLACEHOLDER_ID:
                filler, view = next(images)
                yield from itertools.repeat(filler, view.visual_tokens)
            else:
                yield id


@dataclass(frozen=True)
class PreparedPrompt:
    """A prompt as the language model reads it."""

    layout: Layout
    embeddings: mx.array  # (positions, D)


def prepare(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str | Messages,
    images: Images,
    looking: Looking,
    cache: VisionCache | None = None,
) -> PreparedPrompt:
    """Turn image and question into the language model's input. The features are gone when this returns."""
    seen = see(model, tokenizer, prompt, images, looking, cache)
    views = choose(model, seen, looking)
    return compose(model, seen, views)


def see(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str | Messages,
    images: Images,
    looking: Looking,
    cache: VisionCache | None = None,
) -> Seen:
    """Read the question and cut the images, then run the vision tower; `cache` keeps what it makes of an image.

    Raises InputError for a prompt or an image that cannot be used.
    """
    clock, sources = Stopwatch(), listed(images)
    messages = build_messages(prompt, len(sources), looking.system_prompt)
    ids = encode_messages(tokenizer, messages, limit=model.config.context_length)
    crops = read_crops(sources, model.config, looking.max_pixels)
    preprocess = clock.lap()
    missed = cache.misses if cache else 0
    features = cache.features(crops) if cache else encode_images(model, crops)
    calls = cache.misses - missed if cache else len(crops)
    text = model.embed_text(ids)
    vision = clock.lap(text, *features)
    return Seen(tuple(ids), text, tuple(crops), tuple(features), calls, Seconds(preprocess, vision))


def ask_again(model: Model, tokenizer: Tokenizer, seen: Seen, prompt: str | Messages) -> Seen:
    """Put another question to images that were seen. The seconds of seeing them are those of the first time."""
    ids = encode_messages(tokenizer, build_messages(prompt, len(seen.crops)), limit=model.config.context_length)
    text = model.embed_text(ids)
    mx.eval(text)
    seconds = Seconds(seen.seconds.preprocess, seen.seconds.vision)
    return replace(seen, ids=tuple(ids), text=text, vision_calls=0, seconds=seconds)


def score(model: Model, seen: Seen, images: Sequence[int] | None = None) -> list[Routing]:
    """Let the router score every granularity for each image, or for those with the numbers `images`."""
    clock = Stopwatch()
    features = seen.features if images is None else [seen.features[n] for n in images]
    logits = [model.route(each, seen.text) for each in features]
    seen.seconds.router = clock.lap(*logits)
    return [Routing.of(model.config, row) for row in logits]


def choose(
    model: Model, seen: Seen, looking: Looking | Sequence[Looking], routings: Sequence[Routing] | None = None
) -> tuple[View, ...]:
    """Choose a granularity for each image; the router, where there is one, runs unless one is forced.

    looking: how to look at all images, or at each of them. routings: what `score` returned for all of them, if the
    router has run already. Raises InputError if no granularity fits the budget, and TooLong if the prompt does not fit
    the model's context.
    """
    ways = [looking] * len(seen.crops) if isinstance(looking, Looking) else looking
    routed = [n for n, way in enumerate(ways) if way.granularity == AUTO and model.config.has_router]
    if routings is not None:
        scores = {n: routings[n] for n in routed}
    else:
        scores = dict(zip(routed, score(model, seen, routed), strict=True)) if routed else {}
    images = enumerate(zip(seen.crops, ways, strict=True))
    views = tuple(view_image(model.config, crops, scores.get(n), way) for n, (crops, way) in images)
    positions, context = len(seen.text) + sum(view.visual_tokens for view in views), model.config.context_length
    if positions > context:
        raise TooLong(
            f"the prompt takes {positions} positions ({len(seen.text)} for text, the rest for images) but the model "
            f"has {context}; shorten it, or look less closely with granularity or max_visual_tokens"
        )
    return views


def compose(model: Model, seen: Seen, views: tuple[View, ...]) -> PreparedPrompt:
    """Pack each image at its chosen granularity and splice it into the text."""
    clock = Stopwatch()
    embeddings = seen.embeddings(model, [view.granularity for view in views])
    seconds = replace(seen.seconds, prefill=clock.lap(embeddings))
    return PreparedPrompt(Layout(seen.ids, seen.crops, views, seen.vision_calls, seconds), embeddings)


def listed(images: Images) -> list[ImageSource | Crops]:
    """Any number of images as a list."""
    return [] if images is None else [images] if isinstance(images, ImageSource | Crops) else list(images)


def read_crops(images: Images, config: Config, max_pixels: int = MAX_PIXELS) -> list[Crops]:
    """Read and cut any number of images; InputError for one that cannot be used."""
    return [s if isinstance(s, Crops) else make_crops(read_image(s, max_pixels), config) for s in listed(images)]
