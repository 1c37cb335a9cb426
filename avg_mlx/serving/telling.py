"""What answers tell besides their text: tokens used, and under the key `avg` how closely the images were looked at."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

from ..inference.view import View
from .jobs import ChosenToken, Done, Piece, Routed, TokenScore

LOOKING = ("preprocess", "vision", "router")  # the stages before decoding
LEAST_LOGPROB = -9999.0  # OpenAI's number for what is impossible; JSON has no infinity


def sse(content: dict[str, Any], event: str | None = None) -> str:
    """A server-sent event, in ASCII: some clients take a Unicode line separator for the end of a line."""
    named = f"event: {event}\n" if event else ""
    return f"{named}data: {json.dumps(content, separators=(',', ':'), allow_nan=False)}\n\n"


def usage(routed: Routed, done: Done) -> dict[str, int]:
    """Count tokens: of the prompt, of these the visual ones and those whose KV was there already; of the answer."""
    return {
        "prompt": routed.positions,
        "image": routed.image_positions,
        "text": routed.positions - routed.image_positions,
        "cached": done.answer.counters.reused,
        "completion": len(done.answer.token_ids),
        "total": routed.positions + len(done.answer.token_ids),
    }


def routing(routed: Routed) -> dict[str, Any]:
    """How closely the images are looked at, and what else is known before the answer."""
    routed_images = sum(view.routing is not None for view in routed.views)
    return {
        "images": [view_of(view) for view in routed.views],
        "visual_tokens": routed.image_positions,
        "visual_tokens_finest": sum(view.visual_tokens_finest for view in routed.views),
        "under_load": routed.under_load,
        "timings": {"waited": routed.waited, **{name: getattr(routed.seconds, name) for name in LOOKING}},
        "counters": {"vision_calls": routed.vision_calls, "router_calls": routed_images},
    }


def complete(routed: Routed, done: Done) -> dict[str, Any]:
    """The same for a whole answer, with its timings and counters."""
    timings = done.answer.timings
    first = {"waited": done.waited, "time_to_first_token": done.waited + timings.time_to_first_token}
    counters = dataclasses.asdict(done.answer.counters)
    return routing(routed) | {"timings": dataclasses.asdict(timings) | first, "counters": counters}


def ending(done: Done) -> dict[str, Any]:
    """What the access log tells of an answer."""
    return {"completion_tokens": len(done.answer.token_ids), "finish_reason": done.answer.finish_reason}


def view_of(view: View) -> dict[str, Any]:
    """One image's choice, and the router's probabilities where it ran."""
    routing = view.routing
    pairs = zip(routing.granularities, routing.probabilities, strict=True) if routing else ()
    return {
        "granularity": view.granularity,
        "source": view.source,
        "probabilities": {str(granularity): probability for granularity, probability in pairs} if routing else None,
        "crops": view.crops,
        "crop_grid": view.crop_grid,
        "visual_tokens": view.visual_tokens,
        "visual_tokens_finest": view.visual_tokens_finest,
    }


def logprobs(tokens: Sequence[ChosenToken]) -> list[dict[str, Any]]:
    """Tokens with their log-probabilities, and the likeliest ones beside each."""
    return [{**_score(token), "top_logprobs": [_score(other) for other in token.likeliest]} for token in tokens]


def tokens_of(pieces: Iterable[Piece]) -> list[ChosenToken]:
    """The tokens of all pieces."""
    return [token for piece in pieces for token in piece.tokens]


def _score(token: TokenScore) -> dict[str, Any]:
    return {"token": token.text, "logprob": max(token.logprob, LEAST_LOGPROB), "bytes": list(token.data)}
