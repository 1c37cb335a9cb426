"""Processes that feed hostile inputs to the package, watched from outside.

A worker reports how each input ended. Only two ends are good: the package answered, or it refused with its own error in
one printable line. Everything else is a finding: another exception, five seconds of work or a minute of waiting, two
gigabytes, a dead process, a file written elsewhere, a process started, a connection opened.
"""

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from random import Random
from typing import Any

from avg_mlx.errors import LONGEST, AvgMlxError

PROCESSOR_SECONDS = 5.0  # that an input may take; other processes' work does not count
PATIENCE = 60.0  # seconds to wait for something that may never come
MEMORY = 2 << 30  # bytes an input may take beside what the worker held before
ANSWERED, REFUSED = "answered", "refused"

Attempt = Callable[[Random], None]  # makes one input of the random numbers, and gives it to the package
Border = Callable[[Path], Attempt]  # makes what the attempts need, in a folder


@dataclass
class Outcome:
    """How the inputs of a border ended."""

    ends: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)


def run(border: Border, seed: int, numbers: Iterable[int], workers: int = 2, memory: int = MEMORY) -> Outcome:
    """Give the inputs with these numbers to a border in as many processes; an input may take that many bytes."""
    outcome, left = Outcome(), iter(numbers)
    crew = [Worker(border, seed, memory) for _ in range(workers)]
    try:
        busy = {worker.pipe: worker for worker in crew if worker.begin(left)}
        while busy:
            ready = wait(list(busy), timeout=min(worker.patience() for worker in busy.values()))
            late = [pipe for pipe, worker in busy.items() if worker.patience() <= 0 and pipe not in ready]
            for pipe in [*ready, *late]:
                worker = busy.pop(pipe)
                end, finding = worker.end(hung=pipe in late)
                outcome.ends[end] += 1
                if finding:
                    outcome.findings.append(f"{border.__name__} {worker.number}: {finding}")
                if worker.begin(left):
                    busy[worker.pipe] = worker
    finally:
        for worker in crew:
            worker.stop()
    return outcome


class Worker:
    """A process that takes one input after another; it is replaced when it is lost."""

    def __init__(self, border: Border, seed: int, memory: int):
        self.border, self.seed, self.memory, self.number = border, seed, memory, -1
        self.process: Any = None
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, self.border, self.seed, self.memory), daemon=True)
        self.process.start()
        theirs.close()
        self.deadline = None

    def begin(self, numbers: Iterable[int]) -> bool:
        """Give the worker its next input, if there is one."""
        number = next(iter(numbers), None)
        if number is None:
            return False
        if self.process is None:
            self._start()
        if self.deadline is None:
            try:
                self.pipe.recv()  # it is prepared
            except EOFError:
                sys.exit(f"{self.border.__name__} cannot be prepared: see above")
        self.number = number
        self.pipe.send(number)
        self.deadline = _now() + PATIENCE
        return True

    def patience(self) -> float:
        """Seconds until the input has taken too long."""
        return max(0.0, self.deadline - _now())

    def end(self, hung: bool) -> tuple[str, str]:
        """How the input ended, and what was found."""
        if hung:
            self.stop()
            return "hung", f"no end after {PATIENCE:g} s"
        try:
            end, finding, lost = self.pipe.recv()
        except EOFError:
            self.process.join()
            end, finding, lost = "died", f"the process ended with status {self.process.exitcode}", True
            if self.process.exitcode == -signal.SIGPROF:
                end, finding = "hung", f"no end after {PROCESSOR_SECONDS:g} s of work"
        if lost:
            self.stop()
        return end, finding

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
            self.process = None


def _now() -> float:
    return os.times().elapsed


def _work(pipe: Connection, border: Border, seed: int, memory: int) -> None:
    """Take numbers from the pipe, and tell how their inputs end."""
    with tempfile.TemporaryDirectory(prefix="avg-mlx-fuzz-") as home:
        folder = Path(home).resolve()
        os.chdir(folder)
        attempt = border(folder)
        watch = Watch(folder, getattr(attempt, "address", None))
        pipe.send("prepared")
        while True:
            try:
                number = pipe.recv()
            except EOFError:
                return
            held = _peak_memory()
            watch.seen.clear()
            signal.setitimer(signal.ITIMER_PROF, PROCESSOR_SECONDS)  # its signal ends the process
            try:
                attempt(Random(f"{border.__name__} {seed} {number}"))
                end, finding = ANSWERED, ""
            except AvgMlxError as error:
                end, finding = REFUSED, _badly_told(str(error))
            except BaseException as error:
                end, finding = "failed", f"{type(error).__name__}: {error}"[:300]
            signal.setitimer(signal.ITIMER_PROF, 0)
            grown = _peak_memory() - held
            if watch.seen:
                end, finding = "escaped", ", ".join(watch.seen)
            elif grown > memory:
                end, finding = "swelled", f"{grown / 1e9:.1f} GB"
            elif finding and end == REFUSED:
                end = "told badly"
            pipe.send((end, finding, grown > memory))


def _badly_told(message: str) -> str:
    """What is wrong with a message, or nothing."""
    if not message.isprintable():
        return f"not one printable line: {message!r}"[:300]
    return f"{len(message)} characters" if len(message) > LONGEST + 1 else ""


def _peak_memory() -> int:
    """Bytes this process has held at most."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status").read_text()  # on Linux, ru_maxrss includes what the parent held
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


class Watch:
    """Sees what this process does to the world outside a folder, but for connections to one address."""

    STARTS = ("subprocess.Popen", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "pty.spawn")
    NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.bind")
    CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
    TWO_PLACES = ("os.rename", "os.link", "os.symlink")

    def __init__(self, folder: Path, address: tuple[str, int] | None = None):
        self.seen: list[str] = []
        self._folder, self._address = str(folder), address
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in self.NETWORK and self._address in (arguments[:2], arguments[1]):
            return
        if event in self.STARTS or event in self.NETWORK:
            self.seen.append(f"{event} {arguments[:2]!r}"[:200])
        elif event in self.CHANGES or (event == "open" and self._writes(arguments)):
            for place in arguments[: 2 if event in self.TWO_PLACES else 1]:
                if isinstance(place, str | bytes | os.PathLike) and self._is_outside(os.fsdecode(place)):
                    self.seen.append(f"{event} {os.fsdecode(place)}"[:200])

    def _is_outside(self, place: str) -> bool:
        path = os.path.realpath(place)
        inside = (path + os.sep).startswith(self._folder + os.sep)
        return not inside and path != os.devnull and "__pycache__" not in path

    @staticmethod
    def _writes(arguments: tuple[Any, ...]) -> bool:
        _, mode, flags = arguments
        if isinstance(mode, str):
            return any(letter in mode for letter in "wax+")
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND))
