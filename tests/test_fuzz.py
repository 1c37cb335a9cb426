"""Hostile inputs for every border: some of what `make fuzz` gives, and that the watch sees what it is there for."""

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from borders import BORDERS, pickles
from stops import full_disks, kills
from workers import ANSWERED, REFUSED, run

from avg_mlx import InputError

SEED = 1  # other inputs than the report's
SHARE = 50  # one in so many
MEMORY = 256 << 20  # bytes: on a busy machine, touching gigabytes takes longer than an input may


@pytest.mark.parametrize("border", BORDERS, ids=lambda border: border.__name__)
def test_the_package_answers_or_refuses(border):
    if border is pickles and importlib.util.find_spec("torch") is None:
        pytest.skip("pickles need torch")
    count = max(10, BORDERS[border] // SHARE)
    outcome = run(border, SEED, range(count))
    assert not outcome.findings
    assert outcome.ends[REFUSED] > 0
    assert sum(outcome.ends.values()) == count


@pytest.mark.slow
@pytest.mark.parametrize("fault", [kills, full_disks])
def test_what_was_stopped_goes_on(fault):
    assert not fault(SEED, 9).findings


def raising(folder):
    def attempt(random):
        raise KeyError("a")

    return attempt


def telling_two_lines(folder):
    class TwoLines(InputError):
        def __str__(self):
            return "one\ntwo"

    def attempt(random):
        raise TwoLines("")

    return attempt


def hanging(folder):
    def attempt(random):
        while True:
            pass

    return attempt


def swelling(folder):
    def attempt(random):
        _ = b"a" * (2 * MEMORY)

    return attempt


def dying(folder):
    return lambda random: os.kill(os.getpid(), signal.SIGSEGV)


def writing_outside(folder):
    outside = folder.with_suffix(".outside")

    def attempt(random):
        outside.touch()
        outside.unlink()

    return attempt


def moving_away(folder):
    Path("a").touch()

    def attempt(random):
        Path("a").rename("../b")
        Path("../b").rename("a")

    return attempt


def starting(folder):
    return lambda random: subprocess.run(["true"])


def connecting(folder):
    def attempt(random):
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", 1))

    return attempt


def writing_inside(folder):
    return lambda random: Path("a").write_text("b")


@pytest.mark.parametrize(
    ("border", "end"),
    [
        (raising, "failed"),
        (telling_two_lines, "told badly"),
        (hanging, "hung"),
        (swelling, "swelled"),
        (dying, "died"),
        (writing_outside, "escaped"),
        (moving_away, "escaped"),
        (starting, "escaped"),
        (connecting, "escaped"),
        (writing_inside, ANSWERED),
    ],
)
def test_the_watch_sees(border, end):
    outcome = run(border, SEED, range(2), workers=1, memory=MEMORY)
    assert outcome.ends == {end: 2}  # a worker that is lost is replaced
    assert len(outcome.findings) == (0 if end == ANSWERED else 2)
