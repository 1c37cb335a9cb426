"""How closely each image is looked at: everything between a prompt and the language model's input."""

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import mlx.core as mx

from ..config import Config
from ..errors import InputError
from ..geometry import Pair
from ..inputs.image import Crops, make_crops
from ..inputs.image_io import MAX_PIXELS, ImageSource, read_image
from ..inputs.prompt import PLACEHOLDER_ID, Messages, build_messages, encode_messages
from ..model.avg_llava import Model
from .caches import Key, VisionCache, encode_images

AUTO = "auto"

Images = ImageSource | Crops | Sequence[ImageSource | Crops] | None


@dataclass(frozen=True)
class Routing:
    """The router's scores for one image, in the config's order of granularities."""

    granularities: tuple[int, ...]
    logits: tuple[float, ...]
    probabilities: tuple[float, ...]

    def best_of(self, allowed: Sequence[int]) -> int:
        """The best-scored granularity among `allowed`."""
        return max(allowed, key=lambda g: self.logits[self.granularities.index(g)])

    @property
    def choice(self) -> int:
        """The best-scored granularity of all."""
        return self.best_of(self.granularities)


@dataclass(frozen=True)
class View:
    """How closely one image is looked at, and why."""

    granularity: int
    source: str  # "router"; "forced" by the caller; "budget" where the router's choice did not fit it
    routing: Routing | None  # None when forced
    crops: int
    crop_grid: Pair  # (rows, columns) of local crops
    visual_tokens: int
    visual_tokens_finest: int  # what the finest granularity would take


@dataclass
class Stopwatch:
    """Seconds per stage. A stage's arrays are evaluated before it is clocked off."""

    seconds: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.perf_counter)

    def clock(self, stage: str, *arrays: mx.array) -> None:
        mx.eval(arrays)
        now = time.perf_counter()
        self.seconds[stage] = now - self._last
        self._last = now


@dataclass(frozen=True)
class Layout:
    """Where a prompt's text and images stand, when the images have been looked at."""

    ids: tuple[int, ...]  # text, and PLACEHOLDER_ID for each image
    crops: tuple[Crops, ...]
    views: tuple[View, ...]
    vision_calls: int  # images that went through the vision tower

    @property
    def positions(self) -> int:
        """The length of the language model's input."""
        return len(self.ids) - len(self.views) + sum(view.visual_tokens for view in self.views)

    def position_ids(self, filler: int) -> list[int]:
        """One token id for each position, `filler` for visual tokens."""
        return list(self._spread([filler] * len(self.views)))

    def position_keys(self) -> list[Key]:
        """What tells positions apart: prompts that begin with the same keys begin with the same embeddings."""
        return list(self._spread([(c.digest, v.granularity) for c, v in zip(self.crops, self.views, strict=True)]))

    def _spread(self, fillers: Iterable[Any]) -> Iterator[Any]:
        """The ids of text, and each image's filler as often as it has visual tokens."""
        images = zip(fillers, self.views, strict=True)
        for id in self.ids:
            if id == PLACEHOLDER_ID:
                filler, view = next(images)
                yield from itertools.repeat(filler, view.visual_tokens)
            else:
                yield id


@dataclass(frozen=True)
class Views(Layout):
    """A prompt whose images have been looked at, with what was seen."""

    text: mx.array  # (text tokens, D)
    features: tuple[mx.array, ...]  # for each image (crops, patches, D)

    def embeddings(self, model: Model) -> mx.array:
        """The language model's input: (positions, D)."""
        images = zip(self.features, self.views, self.crops, strict=True)
        visual_tokens = [model.pack(features, view.granularity, crops) for features, view, crops in images]
        return model.splice(self.ids, self.text, visual_tokens)

    def layout(self) -> Layout:
        """Without what was seen, so that its memory can go."""
        return Layout(self.ids, self.crops, self.views, self.vision_calls)


def listed(image: Images) -> list[ImageSource | Crops]:
    """Any number of images as a list."""
    return [] if image is None else [image] if isinstance(image, ImageSource | Crops) else list(image)


def read_crops(image: Images, config: Config, max_pixels: int = MAX_PIXELS) -> list[Crops]:
    """Any number of images, cut; InputError for one that cannot be used."""
    return [s if isinstance(s, Crops) else make_crops(read_image(s, max_pixels), config) for s in listed(image)]


def look(
    model: Model,
    tokenizer,
    prompt: str | Messages,
    image: Images = None,
    *,
    granularity: int | str = AUTO,
    max_visual_tokens: int | None = None,
    system_prompt: str | None = None,
    max_pixels: int = MAX_PIXELS,
    vision: VisionCache | None = None,
    stopwatch: Stopwatch | None = None,
) -> Views:
    """Look at the prompt's images: as closely as the router says, or as forced, or within a budget for each image.

    The parameters are those of `stream_generate`; images may also come as Crops, and `vision` keeps their features.
    Raises InputError for what cannot be used.
    """
    stopwatch = stopwatch or Stopwatch()
    config = model.config
    sources = listed(image)
    check_looking(config, bool(sources), granularity, max_visual_tokens)

    ids = encode_messages(tokenizer, build_messages(prompt, len(sources), system_prompt))
    crops = read_crops(sources, config, max_pixels)
    stopwatch.clock("preprocess")

    seen_before = vision.misses if vision else 0
    features = vision.features(crops) if vision else encode_images(model, crops)
    vision_calls = vision.misses - seen_before if vision else len(crops)
    text = model.embed_text(ids)
    stopwatch.clock("vision", text, *features)

    logits = [model.route(f, text) for f in features] if granularity == AUTO else []
    stopwatch.clock("router", *logits)

    routings: Sequence[Routing | None] = [_routing(config, row) for row in logits] or [None] * len(crops)
    views = [_view(config, c, r, granularity, max_visual_tokens) for c, r in zip(crops, routings, strict=True)]
    looked = Views(tuple(ids), tuple(crops), tuple(views), vision_calls, text, tuple(features))
    if looked.positions > config.context_length:
        raise InputError(
            f"the prompt takes {looked.positions} positions ({len(text)} for text, the rest for images) but the model "
            f"has {config.context_length}; shorten it, or look less closely (--granularity, --max-visual-tokens)"
        )
    return looked


def check_looking(config: Config, images: bool, granularity: int | str, max_visual_tokens: int | None) -> None:
    """Raise InputError for options of looking that cannot be used."""
    choices = ", ".join(map(str, sorted(config.granularities)))
    if granularity != AUTO and granularity not in config.granularities:
        raise InputError(f"granularity is {granularity!r}, but this model has {AUTO} and {choices}")
    if granularity != AUTO and max_visual_tokens is not None:
        raise InputError("--max-visual-tokens lets the router choose within a budget; leave --granularity out")
    if granularity == AUTO and images and not config.has_router:
        raise InputError(f"this model has no router (a Stage-3 checkpoint); choose --granularity {choices}")


def _routing(config: Config, logits: mx.array) -> Routing:
    logits = logits.astype(mx.float32)
    return Routing(config.granularities, _floats(logits), _floats(mx.softmax(logits)))


def _floats(x: mx.array) -> tuple[float, ...]:
    return tuple(cast(list[float], x.tolist()))


def _view(config: Config, crops: Crops, routing: Routing | None, granularity: int | str, budget: int | None) -> View:
    counts = {g: config.visual_tokens(g, crops.image_size) for g in config.granularities}
    if routing is None:
        chosen, source = int(granularity), "forced"
    else:
        fitting = [g for g in counts if budget is None or counts[g] <= budget]
        if not fitting:
            raise InputError(
                f"no granularity fits into {budget} visual tokens; this image takes at least {min(counts.values())}"
            )
        chosen = routing.best_of(fitting)
        source = "router" if chosen == routing.choice else "budget"
    return View(chosen, source, routing, len(crops), crops.crop_grid, counts[chosen], counts[config.finest])
