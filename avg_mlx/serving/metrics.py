"""Prometheus' text format, of what the engine has done and is doing."""

import dataclasses
from collections.abc import Iterator, Mapping

from .jobs import Status

Samples = Mapping[str, float]  # labels as Prometheus writes them → value


def exposition(status: Status, answered: Mapping[tuple[str, int], int], in_flight: int) -> str:
    """Return the page that Prometheus scrapes. answered: (path, HTTP status) → responses."""
    return "".join(line + "\n" for line in _lines(status, answered, in_flight))


def _lines(status: Status, answered: Mapping[tuple[str, int], int], in_flight: int) -> Iterator[str]:
    totals = status.totals
    responses = {f'{{path="{path}",status="{code}"}}': count for (path, code), count in sorted(answered.items())}
    yield from _metric("http_responses_total", "counter", "Responses by path and HTTP status.", responses)
    yield from _metric("http_requests_in_flight", "gauge", "Requests that hold a place.", {"": in_flight})
    outcomes = _labelled("outcome", totals.outcomes)
    yield from _metric("requests_total", "counter", "Requests to the engine, by how they ended.", outcomes)
    about = "Images looked at, by granularity in visual tokens per crop."
    yield from _metric("images_total", "counter", about, _labelled("granularity", totals.granularities))
    yield from _metric("tokens_total", "counter", "Positions of prompts and tokens of answers.", _tokens(status))
    about = "Visual tokens that the finest granularity would have taken."
    yield from _metric("finest_image_tokens_total", "counter", about, {"": totals.image_positions_finest})
    about = "Requests looked at with the token cost of a full queue."
    yield from _metric("requests_under_load_total", "counter", about, {"": totals.under_load})
    vision = {"computed": totals.vision_calls, "reused": totals.vision_hits}
    about = "Images whose features were computed or there already."
    yield from _metric("vision_total", "counter", about, _labelled("source", vision))
    seconds = _labelled("stage", dataclasses.asdict(totals.seconds))
    yield from _metric("stage_seconds_total", "counter", "Seconds of work, by stage.", seconds)
    stages = {"waiting": status.waiting, "preparing": status.preparing, "decoding": status.decoding}
    yield from _metric("requests", "gauge", "Requests in the engine, by stage.", _labelled("stage", stages))
    yield from _metric("slots", "gauge", "Answers that may run together.", {"": status.slots})
    held = {"answers": status.kv_bytes, "prefixes": status.prefix_bytes, "features": status.vision_bytes}
    yield from _metric("held_bytes", "gauge", "Bytes of KV and of image features.", _labelled("what", held))
    yield from _metric("kv_limit_bytes", "gauge", "Bytes of KV that answers may take.", {"": status.kv_limit})
    about = "Seconds that the step which runs has run."
    yield from _metric("standing_seconds", "gauge", about, {"": status.standing})
    yield from _metric("up", "gauge", "Whether the engine's thread lives.", {"": int(status.alive)})


def _tokens(status: Status) -> Samples:
    totals = status.totals
    kinds = {
        "text": totals.text_positions,
        "image": totals.image_positions,
        "reused": totals.reused_positions,
        "generated": totals.generated_tokens,
    }
    return _labelled("kind", kinds)


def _labelled(label: str, values: Mapping[str, float] | Mapping[int, float]) -> Samples:
    return {f'{{{label}="{key}"}}': value for key, value in values.items()}


def _metric(name: str, kind: str, about: str, samples: Samples) -> Iterator[str]:
    yield f"# HELP avg_mlx_{name} {about}"
    yield f"# TYPE avg_mlx_{name} {kind}"
    for labels, value in samples.items():
        yield f"avg_mlx_{name}{labels} {value}"
