"""What was measured, for people and for programs: Markdown, JSON, and a picture."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .measure import STAGES, Row

Report = dict[str, Any]


def make_report(about: Report, rows: Sequence[Row]) -> Report:
    """The JSON object: what was measured on what, a row for each granularity, and finest against coarsest."""
    coarsest, finest = rows[0], rows[-1]
    return {
        **about,
        "rows": [asdict(row) | {"work_to_first_token": asdict(row.work_to_first_token)} for row in rows],
        "finest_to_coarsest": {
            "granularities": [finest.granularity, coarsest.granularity],
            "time_to_first_token": finest.time_to_first_token.median / coarsest.time_to_first_token.median,
            "flop": finest.work_to_first_token.flop / coarsest.work_to_first_token.flop,
            "bytes": finest.work_to_first_token.bytes / coarsest.work_to_first_token.bytes,
        },
    }


def markdown(report: Report) -> str:
    """The whole report in words and tables."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    bits = ", ".join(f"{part} {number:g}" for part, number in report["bits_per_weight"].items())
    return "\n".join(
        [
            f"{report['model']}: {report['parameters'] / 1e6:,.1f} M parameters, {report['weights_gb']:.2f} GB, "
            f"{report['dtype']}; bits per weight: {bits}.",
            f"{report['device']}, {report['chip']}, {report['system']}; {versions}.",
            f"{report['image']}, {report['text_tokens']} text tokens; {report['decode_tokens']} tokens decoded; "
            f"median (least–most) of {report['repeats']} after {report['warmup']} to warm up.",
            "",
            *_measured(report["rows"]),
            "",
            "Counted (TFLOP, and GB moved):",
            "",
            *_counted(report["rows"]),
            *_compared(report["finest_to_coarsest"]),
        ]
    )


def _compared(ratio: Report) -> list[str]:
    finest, coarsest = ratio["granularities"]
    if finest == coarsest:
        return []
    return [
        "",
        f"{finest} against {coarsest} tokens per crop: time to first token ×{ratio['time_to_first_token']:.2f}, "
        f"counted operations ×{ratio['flop']:.2f}, bytes ×{ratio['bytes']:.2f}.",
    ]


def _measured(rows: Sequence[Report]) -> list[str]:
    stages = " | ".join(STAGES)
    return [
        f"| tokens per crop | visual tokens | {stages} | time to first token, s | decode tokens/s | peak memory, GB |",
        "|---" * (len(STAGES) + 5) + "|",
        *(
            f"| {row['granularity']} | {row['visual_tokens']} | "
            + " | ".join(_spread(row[stage]) for stage in (*STAGES, "time_to_first_token"))
            + f" | {_spread(row['decode_tokens_per_second'])} | {row['peak_memory_gb']['median']:.3g} |"
            for row in rows
        ),
    ]


def _spread(spread: Report) -> str:
    return f"{spread['median']:.3g} ({spread['least']:.3g}–{spread['most']:.3g})"


def _counted(rows: Sequence[Report]) -> list[str]:
    names = ("vision", "router", "prefill", "to first token", "one decode step")
    return [
        f"| tokens per crop | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
        *(
            f"| {row['granularity']} | "
            + " | ".join(
                f"{work['flop'] / 1e12:.3g}, {work['bytes'] / 1e9:.3g}"
                for work in (
                    *(row["work"][stage] for stage in ("vision", "router", "prefill")),
                    row["work_to_first_token"],
                    row["work"]["decode"],
                )
            )
            + " |"
            for row in rows
        ),
    ]


def plot(report: Report, picture: Path) -> Path | None:
    """Stages stacked for each granularity; None where the plotting library (the plot extra) is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    labels = [f"{row['granularity']}\n({row['visual_tokens']} tokens)" for row in report["rows"]]
    height = [0.0] * len(labels)
    for stage in STAGES:
        seconds = [row[stage]["median"] for row in report["rows"]]
        axes.bar(labels, seconds, bottom=height, label=stage)
        height = [below + more for below, more in zip(height, seconds, strict=True)]
    axes.set(xlabel="tokens per crop", ylabel="seconds to the first token", title=report["model"])
    axes.legend()
    figure.savefig(picture, dpi=150)
    return picture
