"""What the HTTP side and the engine tell each other: jobs go in, events come out."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from ..config import Config
from ..errors import AvgMlxError, InputError
from ..explaining.explanation import Explanation
from ..inference.answer import Answer
from ..inference.options import Looking, check_max_tokens
from ..inference.sampling import Sampling
from ..inference.steps import Seconds
from ..inference.view import View
from ..inputs.image import Crops
from ..inputs.prompt import Messages

MOST_LOGPROBS = 20  # likeliest tokens of a step, OpenAI's limit


@dataclass(frozen=True)
class Job:
    """What one request asks of the engine.

    messages: with one `<image>` for each image; a system message comes first if there is one. A user's text that spells
    `<image>` passes through `inputs.prompt.literal` before. looking: one for each image; their system_prompt and
    max_pixels are not read here. sampling: its seed makes the answer reproducible, whatever runs beside it.
    presence_penalty, frequency_penalty and logit_bias: as OpenAI defines them, over the answer's tokens.
    stop: texts that end the answer and do not belong to it. logprobs: None for none, or how many of each step's
    likeliest tokens are told beside the chosen one's. route_only: ends with `Routed`. explain: which then takes the
    router's vote apart.
    preprocess_seconds: what cutting the images took.
    """

    messages: Messages
    images: tuple[Crops, ...] = ()
    looking: tuple[Looking, ...] = ()
    max_tokens: int = -1
    sampling: Sampling = field(default_factory=Sampling)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id → what is added to its logit
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    route_only: bool = False
    explain: bool = False
    preprocess_seconds: float = 0.0

    def check(self, config: Config) -> None:
        """Raise InputError for what the model does not have, and for values that would fail in a running batch."""
        if len(self.looking) != len(self.images):
            raise InputError(f"{len(self.images)} images have {len(self.looking)} ways of looking; give one for each")
        for looking in self.looking:
            looking.check(config)
        check_max_tokens(self.max_tokens)
        sampling, vocabulary = self.sampling, config.vocab_size
        _check("temperature", sampling.temp, 0, math.inf)
        _check("top_p", sampling.top_p, 0, 1)
        _check("min_p", sampling.min_p, 0, 1)
        _check("top_k", sampling.top_k, 0, vocabulary - 1)
        _check("min_tokens_to_keep", sampling.min_tokens_to_keep, 1, vocabulary)
        _check("seed", sampling.seed or 0, 0, 2**64 - 1)
        _check("repetition_penalty", sampling.repetition_penalty or 1, 0, math.inf)
        _check("presence_penalty", self.presence_penalty, -math.inf, math.inf)
        _check("frequency_penalty", self.frequency_penalty, -math.inf, math.inf)
        _check("logprobs", self.logprobs or 0, 0, min(MOST_LOGPROBS, vocabulary))
        for token, bias in self.logit_bias.items():
            _check("a token of logit_bias", token, 0, vocabulary - 1)
            _check("a bias of logit_bias", bias, -math.inf, math.inf)
        if sampling.xtc_probability:
            raise InputError("XTC draws from a random state that all answers would share; set xtc_probability to 0")
        if not all(self.stop):
            raise InputError("a stop text is empty; leave it out")


def _check(name: str, value: float, least: float, most: float) -> None:
    if not (least <= value <= most and math.isfinite(value)):
        bounds = [f"from {least:,g}"] * math.isfinite(least) + [f"to {most:,g}"] * math.isfinite(most)
        raise InputError(f"{name} is {value}; expected {' '.join(['a number', *bounds])}")


@dataclass(frozen=True)
class Routed:
    """The first event: looking succeeded. Nothing that the client gave can fail the request from here on.

    seconds: the work done for it so far. waited: the other seconds since it was submitted.
    """

    views: tuple[View, ...]
    positions: int  # of the prompt in the language model: text and visual tokens
    under_load: bool  # whether the token cost of a full queue was added for it
    vision_calls: int  # images that went through the vision tower; the others' features were there
    seconds: Seconds
    waited: float
    explanations: tuple[Explanation, ...] = ()  # one for each view, if the job asked for them

    @property
    def image_positions(self) -> int:
        """The visual tokens among them."""
        return sum(view.visual_tokens for view in self.views)


@dataclass(frozen=True)
class TokenScore:
    """A token and its log-probability in the model's distribution, before penalties, biases and sampling."""

    id: int
    text: str  # "\N{REPLACEMENT CHARACTER}" stands for bytes that are no character by themselves
    data: bytes
    logprob: float


@dataclass(frozen=True)
class ChosenToken(TokenScore):
    """A token of the answer, and the likeliest ones of its step."""

    likeliest: tuple[TokenScore, ...] = ()


@dataclass(frozen=True)
class Piece:
    """The next piece of the answer's text: whole characters, and nothing that might turn out to be a stop text.

    tokens: what it was made of, if logprobs were asked for. The last piece may have tokens and no text.
    """

    text: str
    tokens: tuple[ChosenToken, ...] = ()


@dataclass(frozen=True)
class Done:
    """The last event of an answer. Its text is what the pieces had together; `waited` is as in `Routed`."""

    answer: Answer
    waited: float


@dataclass(frozen=True)
class Failed:
    """The last event of a request that cannot be answered.

    kind: "input", the client's fault, comes only in place of `Routed`; "stopping", the engine stops; "fault", ours.
    """

    error: AvgMlxError
    kind: Literal["input", "stopping", "fault"]


Event = Routed | Piece | Done | Failed
Deliver = Callable[[Event], None]  # called in the engine's thread; it must return at once


@dataclass(frozen=True)
class EngineOptions:
    """How much the engine takes on at a time; None leaves a size to the machine (`engine.sizing`).

    slots: answers that run together. queue: requests that wait for one. kv_bytes: KV of running answers. prefix_bytes:
    KV that is kept for prompts that begin alike. vision_bytes: features that are kept of images. prefill_step_size:
    positions that are prefilled between two tokens of the others. token_cost_under_load: is added to the token cost of
    images that "auto" chooses for, while more requests wait than there are slots.
    """

    slots: int = 8
    queue: int = 64
    kv_bytes: int | None = None
    prefix_bytes: int | None = None
    vision_bytes: int | None = None
    prefill_step_size: int = 512
    token_cost_under_load: float = 0.0

    def check(self) -> None:
        """Raise InputError for values that are out of bounds."""
        for name in ("slots", "queue", "prefill_step_size"):
            _check(name, getattr(self, name), 1, 2**31)
        for name in ("kv_bytes", "prefix_bytes", "vision_bytes"):
            _check(name, getattr(self, name) or 0, 0, 2**63)
        _check("token_cost_under_load", self.token_cost_under_load, 0, math.inf)


class Ticket(Protocol):
    """A request that was submitted."""

    def cancel(self) -> None:
        """Give the request up, from any thread: its place is free within one step, and no event comes any more."""


class Full(AvgMlxError):
    """The queue is full; `retry_after` says in how many seconds there may be room."""

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after


class Stopping(AvgMlxError):
    """The engine takes no more requests."""


@dataclass(frozen=True)
class Totals:
    """What the engine has done since it was started."""

    outcomes: Mapping[str, int]  # "done", "routed", "cancelled", "input", "stopping", "fault", "full" → requests
    granularities: Mapping[int, int]  # granularity → images looked at with it
    under_load: int  # requests that were looked at less closely, or might have been, because of a full queue
    text_positions: int  # of prompts
    image_positions: int
    image_positions_finest: int  # what the finest granularity would have taken
    reused_positions: int  # of prompts, whose KV was there already
    generated_tokens: int
    vision_calls: int  # images that went through the vision tower
    vision_hits: int  # images whose features were there already
    seconds: Seconds  # of the engine's work, by stage


@dataclass(frozen=True)
class Status:
    """What the engine is doing. `standing` is how long the step that runs has run; 0 where there is no work."""

    alive: bool
    stopping: bool
    standing: float  # seconds
    waiting: int  # requests in the queue
    preparing: int  # requests that are looked at or prefilled
    decoding: int  # requests whose answers run
    slots: int  # answers that may run together
    kv_bytes: int  # of running answers
    kv_limit: int
    prefix_bytes: int  # of KV that is kept for prompts that begin alike
    vision_bytes: int  # of image features that are kept
    totals: Totals


class Engine(Protocol):
    """One thread that owns MLX and the model, as the HTTP side sees it; `engine.thread.Engine` is the one there is."""

    config: Config  # of the model, once it is started

    def start(self) -> None:
        """Load the model in the engine's thread and return when it serves; raises what loading raises."""

    def submit(self, job: Job, deliver: Deliver) -> Ticket:
        """Queue a job, from any thread. Raises InputError for one that `Job.check` refuses, Full or Stopping."""

    def stop(self, grace_seconds: float) -> None:
        """Take no more requests, fail those that wait, finish what runs within the grace, and return when all ended."""

    def snapshot(self) -> Status:
        """What the engine is doing, from any thread."""
