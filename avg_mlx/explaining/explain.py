"""The way to an explanation: see, choose, and take the router's vote apart."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Unpack, cast

from ..inference.options import ExplainOptions, Looking, check_names, pick
from ..inference.steps import Seen, choose, listed, see
from ..inference.view import View
from ..inputs.image_io import ImageSource, read_image
from ..inputs.prompt import PLACEHOLDER_ID, Messages
from ..inputs.tokenizer import Tokenizer
from ..model.avg_llava import Model
from .evidence import take_apart
from .explanation import Explanation


def explain(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str | Messages,
    image: ImageSource | Sequence[ImageSource],
    **options: Unpack[ExplainOptions],
) -> tuple[Explanation, ...]:
    """Explain how closely each image is looked at, without generating.

    prompt, image: as for `stream_generate`. The options are the fields of `Looking`, which describes them. Raises
    OptionError or InputError as `stream_generate` does.
    """
    check_names(options, ExplainOptions)
    looking = pick(Looking, options)
    looking.check(model.config)
    images = [read_image(cast(ImageSource, source), looking.max_pixels) for source in listed(image)]
    seen = see(model, tokenizer, prompt, images, looking)
    explained = explain_views(model, tokenizer, seen, choose(model, seen, looking))
    return tuple(replace(each, image=picture) for each, picture in zip(explained, images, strict=True))


def explain_views(model: Model, tokenizer: Tokenizer, seen: Seen, views: Sequence[View]) -> tuple[Explanation, ...]:
    """Explain views that were chosen for what was seen, as `explain` does, but without the images for the pictures."""
    words = _words(tokenizer, seen.ids)
    explained = []
    for view, crops, features in zip(views, seen.crops, seen.features, strict=True):
        votes = None
        if view.routing is not None:
            votes = take_apart(model.config, model.router, model.router_scores(features, seen.text), words)
        patches = math.prod(model.config.vision.patch_grid)
        sizes = (view.granularity, patches, *model.config.granularities)
        chosen, finest, *levels = (model.config.geometry(g, crops.image_size) for g in sizes)
        explained.append(Explanation(view, chosen, finest, tuple(levels), votes))
    return tuple(explained)


def _words(tokenizer: Tokenizer, ids: Sequence[int]) -> list[tuple[int, int, str]]:
    """(position, id, text) of each text token: decoded by itself, or its name where that is no whole character."""
    backend, words = tokenizer.backend_tokenizer, []
    for position, id in enumerate(ids):
        if id != PLACEHOLDER_ID:
            text = backend.decode([id], skip_special_tokens=False)
            whole = text and "\N{REPLACEMENT CHARACTER}" not in text
            words.append((position, id, text if whole else (backend.id_to_token(id) or "").replace("▁", " ")))
    return words
