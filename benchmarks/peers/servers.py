"""`avg-mlx serve` against mlx-vlm's server, with the same random weights, image and question: Markdown tables.

    python benchmarks/peers/servers.py                          # 300m in float32, for a CPU
    python benchmarks/peers/servers.py --random-weights tiny    # quickly

Installs the environment of run.py, and needs nothing else either. Every row of the table has a server of its own, so
that its peak memory is the row's, and they take turns, so that whatever else the machine does hits all alike. Answers
are streamed, greedy and of 16 tokens. Every request inverts another pixel of the image, so that no cache of images or
of KV helps any of them.

On Linux the CPU backend is much faster with OpenBLAS: LD_PRELOAD=libopenblas.so.0 before the command.
"""

import argparse
import collections
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from run import HERE, environment

CLIENTS = (1, 8)
LONGEST_START = 600.0  # seconds that a server may take to come up
THEIRS = "mlx-vlm, llava_next"
DETAILS = {"avg-mlx, coarsest": "low", "avg-mlx, adaptive": "auto", "avg-mlx, finest": "high", THEIRS: "auto"}

Result = dict[str, Any]  # clients.Figures
Results = dict[str, dict[int, list[Result]]]  # by row and number of clients, a result for each round


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the server with mlx-vlm's on the same random weights.")
    parser.add_argument("--random-weights", choices=("tiny", "300m", "1b", "7b"), default="300m")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float32")
    parser.add_argument("--requests", type=positive, default=8, help="in each round of each row (default: 8)")
    parser.add_argument("--repeats", type=positive, default=3, help="rounds (default: 3)")
    parser.add_argument("--output", type=Path, help="file for the tables, too")
    args = parser.parse_args()
    if args.output and not args.output.parent.is_dir():
        parser.error(f"there is no folder {args.output.parent} for --output; make it, or name another")
    python = environment()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, HERE / "folders.py", args.random_weights, args.dtype, folder], check=True)
        results, memory = take_turns(python, Path(folder), args.requests, args.repeats)
    about = (
        f"{args.random_weights}, {args.dtype}, requests/s as medians (least–most) of {args.repeats} rounds of "
        f"{args.requests} requests, seconds over all of them."
    )
    text = "\n\n".join((table(results, memory), ratios(results, memory), *remarks(results), about))
    print(text)
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")


def positive(text: str) -> int:
    """A number of 1 or more."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


class Server:
    """One contestant's server, from its start until `stop`."""

    def __init__(self, python: Path, row: str, home: Path):
        self.row, self.python, self.home = row, python, home
        self.model = str(home / "theirs") if row == THEIRS else "ours"
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = home / f"{port}.log"
        command = ["mlx_vlm.server"] if row == THEIRS else ["avg_mlx", "serve"]
        model = ["--model", str(home / ("theirs" if row == THEIRS else "ours")), "--port", str(port)]
        with self.log.open("w") as log:
            whole = [str(python), "-m", *command, "--host", "127.0.0.1", *model]
            self.process = subprocess.Popen(whole, stdout=log, stderr=log)
        self.peak: float | None = None  # GB of resident memory, once it has stopped

    def wait(self) -> None:
        """Wait until it answers /health; exit with the end of its log if it never does."""
        end = time.monotonic() + LONGEST_START
        while self.process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=10):
                return
            time.sleep(0.2)
        last = "\n".join(self.log.read_text(errors="replace").splitlines()[-10:])
        sys.exit(f"the server of {self.row} did not come up; its log ends with:\n{last}")

    def ask(self, clients: int, requests: int, first: int) -> Result:
        """Let so many clients ask so many questions, of which the first is number `first`."""
        words = (self.url, self.model, self.home, clients, requests, first, DETAILS[self.row])
        command = [str(self.python), str(HERE / "clients.py"), *map(str, words)]
        result: Result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        return result

    def stop(self) -> None:
        """End it, and learn its peak memory."""
        if self.process.returncode is None:
            self.process.terminate()
            _, status, usage = os.wait4(self.process.pid, 0)
            self.process.returncode = os.waitstatus_to_exitcode(status)
            self.peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def take_turns(python: Path, home: Path, requests: int, repeats: int) -> tuple[Results, dict[str, float]]:
    """What each row's clients saw, and its server's peak memory in GB."""
    results: Results = {row: {clients: [] for clients in CLIENTS} for row in DETAILS}
    with contextlib.ExitStack() as stack:
        servers = []
        for row in DETAILS:
            servers.append(Server(python, row, home))
            stack.callback(servers[-1].stop)
        for server in servers:
            server.wait()
            server.ask(clients=2, requests=2, first=0)
        print("warmed up", file=sys.stderr)
        first = 2
        for n in range(repeats):
            for clients in CLIENTS:
                for server in servers:
                    results[server.row][clients].append(server.ask(clients, requests, first))
                first += requests
            print(f"round {n + 1} of {repeats} done", file=sys.stderr)
    return results, {server.row: server.peak or 0.0 for server in servers}


def per_second(rounds: list[Result]) -> list[float]:
    return [len(one["firsts"]) / one["elapsed"] for one in rounds]


def first_tokens(rounds: list[Result], percent: int) -> float:
    """The seconds to the first token that so many per cent of the answers do not exceed; NaN if none was answered."""
    seconds = [second for one in rounds for second in one["firsts"]]
    if len(seconds) < 2:
        return seconds[0] if seconds else float("nan")
    return statistics.quantiles(seconds, n=100, method="inclusive")[percent - 1]


def table(results: Results, memory: dict[str, float]) -> str:
    rows = ["| | clients | requests/s | first token, s: p50 | p95 | failed | peak memory, GB |", "|---|" + 6 * "---|"]
    for row, by_clients in results.items():
        for clients, rounds in by_clients.items():
            rate = per_second(rounds)
            spread = f"{statistics.median(rate):.3g} ({min(rate):.3g}–{max(rate):.3g})"
            p50, p95 = (f"{first_tokens(rounds, percent):.3g}" for percent in (50, 95))
            failed = sum(one["failed"] for one in rounds)
            peak = f"{memory[row]:.2f}" if clients == CLIENTS[-1] else ""
            rows.append(f"| {row} | {clients} | {spread} | {p50} | {p95} | {failed} | {peak} |")
    return "\n".join(rows)


def ratios(results: Results, memory: dict[str, float]) -> str:
    """What the rows say of mlx-vlm's: above 1 is in this project's favour."""
    columns = (
        "| clients | requests/s, over mlx-vlm's | mlx-vlm's first token (p50) over it | mlx-vlm's peak memory over it |"
    )
    rows = [f"| {columns}", "|---|" + 4 * "---|"]
    for row, by_clients in results.items():
        if row == THEIRS:
            continue
        for clients, rounds in by_clients.items():
            theirs = results[THEIRS][clients]
            rate = ratio(statistics.median(per_second(rounds)), statistics.median(per_second(theirs)))
            first = ratio(first_tokens(theirs, 50), first_tokens(rounds, 50))
            peak = ratio(memory[THEIRS], memory[row]) if clients == CLIENTS[-1] else ""
            rows.append(f"| {row} | {clients} | {rate} | {first} | {peak} |")
    return "\n".join(rows)


def ratio(above: float, below: float) -> str:
    return f"×{above / below:.2f}" if below else "–"


def remarks(results: Results) -> list[str]:
    """What the router chose, answers that ended early, and why requests failed."""
    sentences = []
    for row, by_clients in results.items():
        every = [one for rounds in by_clients.values() for one in rounds]
        chosen = collections.Counter(granularity for one in every for granularity in one["granularities"])
        if chosen:
            counts = ", ".join(f"{granularity} in {count}" for granularity, count in sorted(chosen.items()))
            sentences.append(f"{row}: tokens per crop {counts} answers.")
        lengths = {tokens for one in every for tokens in one["tokens"]}
        if len(lengths) > 1:
            sentences.append(f"{row}: answers of {min(lengths)} to {max(lengths)} tokens.")
        reasons = [one["reason"] for one in every if one["reason"]]
        if reasons:
            sentences.append(f"{row}: the first failure was: {reasons[0]}")
    return sentences


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped, too
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
