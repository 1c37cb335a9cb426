"""What was measured, for people and for programs: Markdown, JSON, and a picture."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import plotting
from ..markdown import table
from .measure import STAGES, Row

Report = dict[str, Any]

# Neighbours differ in brightness too, so that they can be printed in grey.
COLORS = dict(zip(STAGES, (plotting.BLACK, plotting.BLUE, plotting.ORANGE, plotting.SKY), strict=True))


def make_report(about: Report, rows: Sequence[Row]) -> Report:
    """The JSON object: what was measured, a row for each granularity, and the finest compared with the coarsest."""
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
    """The report as Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    bits = ", ".join(f"{part} {number:g}" for part, number in report["bits_per_weight"].items())
    return "\n".join(
        [
            f"{report['model']}: {report['parameters'] / 1e6:,.1f} M parameters, {report['weights_gb']:.2f} GB, "
            f"{report['dtype']}; bits per weight: {bits}.",
            f"{report['device']}, {report['chip']}, {report['system']}; {versions}.",
            f"BLAS on the CPU: {report['blas']}.",
            f"{report['image']}, {report['text_tokens']} text tokens; {report['decode_tokens']} tokens decoded; "
            f"median (least–most) of {report['repeats']} after {report['warmup']} to warm up.",
            "",
            _measured(report["rows"]),
            "",
            "Counted: TFLOP, and GB moved.",
            "",
            _counted(report["rows"]),
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


def _measured(rows: Sequence[Report]) -> str:
    times = ("time to first token, s", "decode tokens/s", "peak memory, GB")
    return table(
        ["tokens per crop", "visual tokens", *STAGES, *times],
        [
            [
                row["granularity"],
                row["visual_tokens"],
                *(_spread(row[what]) for what in (*STAGES, "time_to_first_token", "decode_tokens_per_second")),
                f"{row['peak_memory_gb']['median']:.3g}",
            ]
            for row in rows
        ],
    )


def _spread(spread: Report) -> str:
    return f"{spread['median']:.3g} ({spread['least']:.3g}–{spread['most']:.3g})"


def _counted(rows: Sequence[Report]) -> str:
    return table(
        ["tokens per crop", "vision", "router", "prefill", "to first token", "one decode step"],
        [
            [
                row["granularity"],
                *(_work(row["work"][stage]) for stage in ("vision", "router", "prefill")),
                _work(row["work_to_first_token"]),
                _work(row["work"]["decode"]),
            ]
            for row in rows
        ],
    )


def _work(work: Report) -> str:
    return f"{work['flop'] / 1e12:.3g}, {work['bytes'] / 1e9:.3g}"


@plotting.style()
def plot(report: Report, picture: Path) -> Path | None:
    """Draw the seconds to the first token by stage, a bar for each granularity.

    Returns None where the plotting library (the plot extra) is not installed.
    """
    figure = plotting.new_figure(4.5)
    if figure is None:
        return None
    axes = figure.subplots()
    labels = [f"{row['granularity']}\n({row['visual_tokens']:,})" for row in report["rows"]]
    height = [0.0] * len(labels)
    for stage in STAGES:
        seconds = [row[stage]["median"] for row in report["rows"]]
        axes.bar(labels, seconds, 0.7, height, label=stage, color=COLORS[stage], edgecolor="white", linewidth=0.5)
        height = [below + more for below, more in zip(height, seconds, strict=True)]
    axes.grid(axis="y")
    axes.set_xlabel("tokens per crop (visual tokens in all)")
    axes.set_ylabel("seconds to the first token (linear scale)")
    axes.set_title(plotting.short(report["model"], 80))
    axes.legend(reverse=True)  # in the order in which the stages lie on each other
    return plotting.save(figure, picture)
