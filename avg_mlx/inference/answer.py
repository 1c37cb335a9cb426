"""An answer: its text, how closely each image was looked at, and what it cost."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

import mlx.core as mx

from .. import html
from .steps import Layout
from .view import View, ViewSource


@dataclass(frozen=True)
class Timings:
    """Seconds per stage, and tokens per second."""

    preprocess: float
    vision: float
    router: float
    prefill: float  # packing, and the prompt's way through the language model up to the first token
    prompt_tokens_per_second: float  # of the positions that were prefilled
    generation_tokens_per_second: float  # of the tokens after the first

    @property
    def time_to_first_token(self) -> float:
        """Seconds from the beginning to the first token."""
        return self.preprocess + self.vision + self.router + self.prefill


@dataclass(frozen=True)
class Counters:
    """How much work an answer took."""

    vision_calls: int  # images that went through the vision tower
    router_calls: int  # images that were routed
    prefilled: int  # positions that went through the language model before the first token
    reused: int  # positions before them, whose KV was there already


@dataclass(frozen=True)
class Answer:
    """A finished generation."""

    text: str
    token_ids: tuple[int, ...]  # including the end-of-sequence token where it was reached
    finish_reason: Literal["stop", "length"]
    views: tuple[View, ...]  # one for each image
    prompt_token_ids: tuple[int, ...]  # text, and -200 for each image
    prompt_tokens: int  # positions that entered the language model
    timings: Timings
    counters: Counters
    peak_memory_gb: float

    @classmethod
    def of(cls, text: str, tokens: list[int], stopped: bool, layout: Layout, reused: int) -> "Answer":
        """The answer to a prompt whose stages have all been timed."""
        prefilled, seconds = layout.positions - reused, layout.seconds
        return cls(
            text=text,
            token_ids=tuple(tokens),
            finish_reason="stop" if stopped else "length",
            views=layout.views,
            prompt_token_ids=layout.ids,
            prompt_tokens=layout.positions,
            timings=Timings(
                preprocess=seconds.preprocess,
                vision=seconds.vision,
                router=seconds.router,
                prefill=seconds.prefill,
                prompt_tokens_per_second=prefilled / seconds.prefill,
                generation_tokens_per_second=(len(tokens) - 1) / seconds.generation,
            ),
            counters=Counters(
                vision_calls=layout.vision_calls,
                router_calls=sum(view.routing is not None for view in layout.views),
                prefilled=prefilled,
                reused=reused,
            ),
            peak_memory_gb=mx.get_peak_memory() / 1e9,
        )

    def _repr_html_(self) -> str:
        seconds = html.paragraph(f"{self.timings.time_to_first_token:.3f} s to the first token")
        return html.paragraph("", self.text) + "".join(view._repr_html_() for view in self.views) + seconds


@dataclass(frozen=True)
class Segment:
    """A piece of the answer as it is decoded; the last one carries the whole answer."""

    text: str
    token_id: int
    answer: Answer | None = None


def report(answer: Answer, model: str, revision: str | None, load_seconds: float) -> dict[str, Any]:
    """The JSON object of an answer, as docs/api.md lists its keys.

    What belongs to an image is a list when there are several, and null when there is none.
    """
    views, timings = answer.views, answer.timings

    def each(values: list[Any]) -> Any:
        return values if len(values) > 1 else values[0] if values else None

    return {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "model": model,
        "revision": revision,
        "granularity": each([v.granularity for v in views]),
        "granularity_source": max((v.source for v in views), key=get_args(ViewSource).index, default=None),
        "router": each([v.routing and dataclasses.asdict(v.routing) for v in views]),
        "crops": each([v.crops for v in views]),
        "crop_grid": each([v.crop_grid for v in views]),
        "visual_tokens": each([v.visual_tokens for v in views]),
        "visual_tokens_finest": sum(v.visual_tokens_finest for v in views),
        "prompt_tokens": answer.prompt_tokens,
        "prompt_token_ids": answer.prompt_token_ids,
        "timings": {
            "load": load_seconds,
            "preprocess": timings.preprocess,
            "vision": timings.vision,
            "router": timings.router,
            "prefill": timings.prefill,
            "time_to_first_token": timings.time_to_first_token,
            "prompt_tokens_per_second": timings.prompt_tokens_per_second,
            "generation_tokens_per_second": timings.generation_tokens_per_second,
        },
        "peak_memory_gb": answer.peak_memory_gb,
    }
