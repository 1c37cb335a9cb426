"""What both of OpenAI's APIs ask in the same words: how closely to look, and how to draw tokens."""

from dataclasses import dataclass, field, replace
from typing import Any

from ..config import Config
from ..inference.options import AUTO, MAX_TOKENS, Looking
from ..inference.sampling import Sampling
from .conversation import Conversation, Detail, NamedImage
from .fields import Fields
from .jobs import Job
from .problems import Problem, bad_field

MOST_STOPS = 16
LONGEST_STOP = 1000  # characters
LARGEST_BIAS = 100
LARGE = 2**31 - 1
SMALLEST_TOP_P = 1e-9  # keeps the likeliest token, as 0 means; to mlx-lm 0 means that it is off


@dataclass(frozen=True)
class Defaults:
    """What holds where a request says nothing: the options of `avg-mlx serve`."""

    looking: Looking = field(default_factory=Looking)
    max_tokens: int = MAX_TOKENS
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Asked:
    """A request that was read: a job without its images' crops, and how the answer is sent."""

    job: Job
    images: tuple[NamedImage, ...]
    stream: bool = False
    include_usage: bool = False
    echo: dict[str, Any] = field(default_factory=dict)  # what the answer repeats


def check_model(fields: Fields, served: str) -> None:
    """Raise Problem for the name of another model than the one that is served."""
    asked = fields.text("model")
    if asked is not None and asked != served:
        raise unknown_model(asked, served)


def unknown_model(asked: str, served: str) -> Problem:
    """What to raise for the name of another model."""
    return Problem(404, f"there is no model {asked!r} here; this server has {served!r}", "model", "model_not_found")


def read_job(
    fields: Fields, conversation: Conversation, defaults: Defaults, config: Config, max_tokens: int | None
) -> Job:
    """Read what both APIs share into a job. Raises Problem for a field that cannot be used."""
    return Job(
        messages=conversation.messages,
        looking=tuple(read_looking(fields, image.detail, defaults.looking, config) for image in conversation.images),
        max_tokens=defaults.max_tokens if max_tokens is None else max_tokens,
        sampling=_sampling(fields, defaults.sampling),
        presence_penalty=fields.number("presence_penalty", -2, 2) or 0.0,
        frequency_penalty=fields.number("frequency_penalty", -2, 2) or 0.0,
        logit_bias=_logit_bias(fields),
        stop=_stop(fields),
    )


def read_looking(fields: Fields, detail: Detail, defaults: Looking, config: Config) -> Looking:
    """Say how closely to look at an image: as its detail says, or else as the request does, or else the server.

    A default gives way to what the request says against it: a forced granularity to a budget or a cost, and those to a
    forced granularity. What the request says twice is left for `Looking.check` to refuse.
    """
    granularity = _granularity(fields)
    if detail != "auto":
        granularity = min(config.granularities) if detail == "low" else config.finest
    told = {
        "max_visual_tokens": fields.whole("max_visual_tokens", 1, LARGE),
        "token_cost": fields.number("token_cost", 0),
    }
    said: dict[str, Any] = {key: value for key, value in told.items() if value is not None}
    if granularity is None and not said:
        return defaults
    if granularity in (None, AUTO):
        return replace(defaults, granularity=AUTO, **said)
    return Looking(granularity, **said)


def _granularity(fields: Fields) -> Any:
    given = fields.get("granularity")
    if given is None or given == AUTO:
        return given
    if isinstance(given, str):
        raise fields.wrong("granularity", "auto, or a number of visual tokens per crop")
    return fields.whole("granularity", 1, LARGE)


def _sampling(fields: Fields, defaults: Sampling) -> Sampling:
    top_p = fields.number("top_p", 0, 1)
    given: dict[str, Any] = {
        "temp": fields.number("temperature", 0, 100),
        "top_p": None if top_p is None else max(top_p, SMALLEST_TOP_P),
        "top_k": fields.whole("top_k", 0, LARGE),
        "min_p": fields.number("min_p", 0, 1),
        "repetition_penalty": fields.number("repetition_penalty", 1e-3, 1e3),
        "seed": _seed(fields),
    }
    return replace(defaults, **{key: value for key, value in given.items() if value is not None})


def _seed(fields: Fields) -> int | None:
    """A seed; OpenAI's are signed."""
    seed = fields.whole("seed", -(2**63), 2**64 - 1)
    return None if seed is None else seed % 2**64


def _stop(fields: Fields) -> tuple[str, ...]:
    given = fields.get("stop")
    stops = [] if given is None else [given] if isinstance(given, str) else given
    texts = isinstance(stops, list) and all(isinstance(s, str) and 0 < len(s) <= LONGEST_STOP for s in stops)
    if not texts or len(stops) > MOST_STOPS:
        raise fields.wrong("stop", f"a text, or up to {MOST_STOPS}, of 1 to {LONGEST_STOP} characters each")
    return tuple(stops)


def _logit_bias(fields: Fields) -> dict[int, float]:
    given = fields.object("logit_bias")
    biases = {}
    for token in given.values if given else ():
        if not token.isascii() or not token.isdecimal() or len(token) > 9:
            raise bad_field("logit_bias", f"has the key {token[:20]!r}; expected the ids of tokens")
        bias = given.number(token, -LARGEST_BIAS, LARGEST_BIAS) if given else None
        if bias is not None:
            biases[int(token)] = bias
    return biases
