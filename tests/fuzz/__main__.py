"""Hostile inputs for every border of the package, and faults while it writes.

    python tests/fuzz                             all of it: about an hour on two cores
    python tests/fuzz images --count 500          one border
    python tests/fuzz images --only 123           one input again, with its error
    python tests/fuzz --report docs/reliability.md

Exits with 1 if there was any finding.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random

from borders import BORDERS
from stops import FAULTS
from workers import ANSWERED, REFUSED, Outcome, run

SEED = 0
HEAD = ("| border | inputs | answered | refused | anything else |", "|---|---:|---:|---:|---:|")
BEGIN, END = "<!-- make fuzz -->", "<!-- end of make fuzz -->"


def main() -> int:
    names = {kind.__name__: kind for kind in (*BORDERS, *FAULTS)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("borders", nargs="*", choices=[*names, []], metavar="BORDER", help=", ".join(names))
    parser.add_argument("--count", type=int, help="inputs for each (default: as many as the report promises)")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--only", type=int, metavar="NUMBER", help="repeat one input of one border")
    parser.add_argument("--report", type=Path, help="a Markdown file whose table is written again")
    args = parser.parse_args()
    chosen = args.borders or list(names)
    if args.only is not None:
        return repeat(names[chosen[0]], args.seed, args.only)
    rows, findings = {}, []
    for name in chosen:
        kind = names[name]
        count = args.count or {**BORDERS, **FAULTS}[kind]
        outcome = run(kind, args.seed, range(count)) if kind in BORDERS else kind(args.seed, count)
        rows[title(kind)] = row(title(kind), count, outcome)
        findings += outcome.findings
        print(rows[title(kind)], *outcome.findings, sep="\n", flush=True)
    if args.report:
        write_report(args.report, rows)
    return 1 if findings else 0


def repeat(border, seed: int, number: int) -> int:
    with tempfile.TemporaryDirectory() as home:
        attempt = border(Path(home))
        attempt(Random(f"{border.__name__} {seed} {number}"))
    print("answered")
    return 0


def title(kind: Callable) -> str:
    return kind.__name__.replace("_", " ")


def row(name: str, count: int, outcome: Outcome) -> str:
    answered, refused = outcome.ends[ANSWERED], outcome.ends[REFUSED]
    return f"| {name} | {count:,} | {answered:,} | {refused:,} | {count - answered - refused:,} |"


def write_report(file: Path, rows: dict[str, str]) -> None:
    """Put rows into the table of a file; those of other borders stay."""
    before, _, rest = file.read_text().partition(BEGIN)
    table, _, after = rest.partition(END)
    known = {line.split("|")[1].strip(): line for line in table.splitlines() if line.count("|") == 6} | rows
    lines = [known[title(kind)] for kind in (*BORDERS, *FAULTS) if title(kind) in known]
    file.write_text("\n".join([before + BEGIN, *HEAD, *lines, END + after]))


if __name__ == "__main__":
    sys.exit(main())
