"""`make metal-check`: the report that a maintainer with a Mac pastes into an issue."""

import subprocess
import sys
from dataclasses import replace

import metal_check
import mlx.core as mx
import numpy as np
import test_golden
import test_half_precision
from conftest import ROOT

from avg_mlx.model.scaler import pool

# The golden case of the fewest crops, at the coarsest granularity.
QUICK = ["--cases", "4", "--granularities", "36", "--repeats", "1"]


def rows(report: str, heading: str) -> dict[str, list[str]]:
    """The table under a heading: the cells of each row by its first."""
    section = report.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line.strip("| ").split("|") for line in section.splitlines() if line.startswith("|")]
    return {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines[2:]}


def test_the_report_of_this_machine():
    command = [sys.executable, ROOT / "benchmarks" / "metal_check.py", *QUICK]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    report = done.stdout
    assert report.startswith("# Metal check: ")
    assert "All hold." in report
    assert f"{mx.default_device()}: {mx.device_info()['device_name']}" in report
    parity, types, memory = (rows(report, heading) for heading in ("Parity", "Types", "Memory"))
    for stage in ("router logits", "last logits", "last logits, mean", "router's choice"):
        assert [cell[-1] for cell in parity[stage]] == ["✓"] * 3
    assert parity["greedy tokens"][0] == "22/22 ✓"
    assert types["KV cache"] == ["float32 ✓", "float16 ✓", "bfloat16 ✓"]
    assert all(cell.endswith(" MB") for row in memory.values() for cell in row)
    assert "| tokens per crop |" in report.partition("\n## Bench\n")[2]


def test_the_bounds_are_those_of_the_tests():
    bounds = metal_check.BOUNDS
    assert bounds["float32"].stages == bounds["float32"].logits == metal_check.EXACT == test_golden.TOLERANCE
    assert bounds["float32"].router == test_golden.ROUTER_TOLERANCE
    for dtype, precision in (("float16", test_half_precision.FLOAT16), ("bfloat16", test_half_precision.BFLOAT16)):
        assert bounds[dtype].router == bounds[dtype].logits == precision.tolerance
        assert bounds[dtype].mean == precision.tolerance / 4
        assert bounds[dtype].lead == precision.lead


def test_whatever_fails_is_marked(monkeypatch, capsys):
    """A difference beyond its bound, a stage that computes NaN, and one that leaves its dtype."""
    monkeypatch.setenv("MLX_ENABLE_TF32", "0")
    tight = replace(metal_check.BOUNDS["float32"], logits=1e-9)
    monkeypatch.setattr(metal_check, "BOUNDS", {"float32": tight})
    monkeypatch.setattr(metal_check, "pool", lambda *arguments: pool(*arguments) * float("nan"))
    monkeypatch.setattr(metal_check, "pyramid", lambda features, *_: features.astype(mx.float16))
    monkeypatch.setattr(metal_check, "run_bench", lambda options, environment: ("A bench.", True))
    assert metal_check.main(QUICK) == 1
    report = capsys.readouterr().out
    assert "**3 fail.**" in report
    found = rows(report, "Parity") | rows(report, "Types")
    failed = {stage: cell for stage, (cell,) in found.items() if "✗" in cell}
    assert failed.keys() == {"pooled features", "last logits", "pyramid"}
    assert failed["pooled features"] == "**nan not < 0.001 ✗**"
    assert failed["pyramid"] == "**float16 ✗**"


def test_a_bench_that_fails_is_told(monkeypatch, capsys):
    monkeypatch.setenv("MLX_ENABLE_TF32", "0")
    monkeypatch.setattr(metal_check, "check", lambda *arguments: metal_check.Findings())
    options = ["--random-weights", "tiny", "--repeats", "0"]
    assert metal_check.main(options) == 1
    assert "--repeats" in capsys.readouterr().out.partition("\n## Bench\n")[2]


def test_a_choice_may_be_the_second_only_where_the_lead_is_small():
    reference, swapped = np.array([0.0, 1.0, 0.9]), np.array([0.0, 0.9, 1.0])
    assert metal_check.agrees(reference, reference, lead=0)
    assert metal_check.agrees(swapped, reference, lead=0.2)
    assert not metal_check.agrees(swapped, reference, lead=0.05)
    assert not metal_check.agrees(-reference, reference, lead=0.2)
