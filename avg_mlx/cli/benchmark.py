"""`avg-mlx benchmark`: the paper's benchmarks, through lmms-eval."""

import argparse
import sys
from pathlib import Path

from ..errors import InputError
from .parser import Parser, number, run


def main(arguments: list[str] | None = None, prog: str = "avg-mlx benchmark") -> int:
    """Run the command and return its exit status."""
    return run(build_parser(prog), benchmark, arguments)


def build_parser(prog: str) -> Parser:
    """The command's options."""
    parser = Parser(
        prog=prog,
        description="Run the paper's benchmarks, or other tasks of lmms-eval, and compare modes from one look at each "
        "image. The same command resumes what was interrupted.",
    )
    add = parser.add_argument
    add("--model", required=True, help="converted folder, Hub repository, or demo")
    add("--adapter-path", type=Path, help="a folder of adapters that training wrote")
    add("--tasks", required=True, nargs="+", metavar="NAME", help="paper for its eleven, or tasks of lmms-eval")
    modes = "adaptive, a granularity, cost=COST or budget=TOKENS (default: adaptive and the finest granularity)"
    add("--modes", nargs="+", default=[], metavar="MODE", help=modes)
    cost = "also the router's choice at these token costs, as cost=COST among the modes"
    add("--token-cost", type=number(float, 0), nargs="+", default=[], metavar="COST", help=cost)
    add("--limit", type=number(int, 1), metavar="N", help="ask only the first N questions of each task")
    add("--output", required=True, type=Path, help="folder for answers, tables, summary and pictures")
    add("--data-root", type=Path, metavar="DIR", help="read copies of datasets in DIR/OWNER/NAME, nothing from the Hub")
    add("--include-path", type=Path, metavar="DIR", help="a folder with tasks of your own, in lmms-eval's YAML")
    add("--skip-bad", action="store_true", help="answer questions that cannot be asked with nothing, and count them")
    return parser


def benchmark(args: argparse.Namespace) -> None:
    """Say where the data comes from, load model and tasks, ask with a progress bar, and print the tables."""
    from ..benchmark.modes import default_modes, looking_of
    from ..benchmark.run import benchmark
    from ..benchmark.tasks import Tasks
    from ..weights.checkpoint import load
    from .progress import Bar

    for mode in args.modes:
        looking_of(mode)
    for folder in (args.data_root, args.include_path):
        if folder is not None and not folder.is_dir():
            raise InputError(f"{folder} is not a folder; check the path")
    known = Tasks(args.include_path)
    sources = [known.source(name, args.data_root) for name in known.named(args.tasks)]
    for source in sources:
        print(source, file=sys.stderr)
    model, tokenizer = load(args.model, adapter_path=args.adapter_path)
    tasks, failed = {}, []
    for source in sources:
        try:
            tasks[source.task] = known.load(source, args.data_root)
        except InputError as error:
            print(error, file=sys.stderr)
            failed.append(str(error))
    if not tasks:
        raise InputError("no task is left to run; see the lines above")
    with Bar("Benchmark", "question") as bar:
        outcome = benchmark(
            model,
            tokenizer,
            tasks,
            args.output,
            modes=[*(args.modes or default_modes(model.config)), *(f"cost={cost:g}" for cost in args.token_cost)],
            limit=args.limit,
            skip_bad=args.skip_bad,
            failed=failed,
            report=bar.show,
        )
    print(outcome.table, end="")
