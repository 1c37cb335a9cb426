"""Commands that are stopped at random moments, or run out of disk, and are then run again to their end."""

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from workers import Outcome

TESTS = Path(__file__).parent.parent
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SPEEDS = ("samples_per_second", "peak_memory_gb", "seconds", "prefill", "generation", "timings")
PAGE = 4096  # bytes, of which a disk in memory has a whole number
STATUSES = (0, 1, 2, 129, 130, 143, -signal.SIGKILL)

# What each verb is given, in a folder with a checkpoint, a model, adapters and data; {out} is what it writes.
TRAIN = "--model model --data data.json --adapter-path {out} --iters 4 --save-every 1 --resume"
ANSWER = "--model model --batch requests.jsonl --output {out}/answers.jsonl -m 3 --batch-size 1"
VERBS = {
    "convert": "convert --hf-path checkpoint --mlx-path {out}",
    "convert -q": "convert --hf-path checkpoint --mlx-path {out} -q --q-group-size 32",
    "fuse": "fuse --model model --adapter-path adapters --save-path {out}",
    "export": "export --model model --save-path {out}",
    "train instruct": f"train instruct {TRAIN}",
    "train router": f"train router {TRAIN} --fresh-router",
    "feedback": "feedback --model model --data data.json --output {out}/feedback.jsonl",
    "evaluate": "evaluate --model model --data questions.json --output {out} -m 3",
    "generate --batch": f"generate {ANSWER}",
}


def kills(seed: int, count: int) -> Outcome:
    """Stop commands at random moments, and run them again."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as home, ThreadPoolExecutor(2) as threads:
        whole = prepare(Path(home))
        work = [(Path(home), whole, seed, number) for number in range(count)]
        for number, finding in enumerate(threads.map(lambda given: _killed(*given), work)):
            outcome.ends["failed" if finding else "answered"] += 1
            if finding:
                outcome.findings.append(f"kills {number}: {finding}")
    return outcome


def full_disks(seed: int, count: int) -> Outcome:
    """Run commands on a disk that is too small, make room, and run them again. Linux, with user namespaces."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        whole = prepare(home)
        for number in range(count):
            rng = random.Random(f"full_disks {seed} {number}")
            verb = list(VERBS)[number % len(VERBS)]
            size = sum(len(content) for content in whole[verb].values())
            finding = _on_full_disk(home, verb, int(size * rng.uniform(0.2, 0.9)), number, whole[verb])
            outcome.ends["failed" if finding else "answered"] += 1
            if finding:
                outcome.findings.append(f"full disks {number} ({verb}): {finding}")
    return outcome


FAULTS: dict[Callable[[int, int], Outcome], int] = {kills: 150, full_disks: 9}


def prepare(home: Path) -> dict[str, dict[str, bytes]]:
    """What the commands need; returns what each writes when nothing happens to it."""
    sys.path.insert(0, str(TESTS))
    from conftest import RECORDS, make_adapters, write_checkpoint, write_samples

    from avg_mlx import convert

    write_checkpoint(home / "checkpoint")
    convert(home / "checkpoint", home / "model")
    make_adapters(home / "model", home / "adapters", "lora")
    records = [record for record in RECORDS if isinstance(record.get("image"), str)]
    write_samples(home, records)
    questions = [{"id": r["id"], "image": r["image"], "question": "What is this?", "answer": "a"} for r in records]
    (home / "questions.json").write_text(json.dumps(questions))
    requests = [{"id": r["id"], "image": r["image"], "prompt": f"What is this {r['id']}?"} for r in records]
    (home / "requests.jsonl").write_text("".join(json.dumps(request) + "\n" for request in requests))
    whole = {}
    for verb in VERBS:
        done = subprocess.run(_command(verb, "whole"), cwd=home, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        whole[verb] = _content(home / "whole")
        (home / "whole").rename(home / f"whole {verb}")
    return whole


def _command(verb: str, out: str) -> list[str]:
    return [sys.executable, "-m", "avg_mlx", *(word.format(out=out) for word in VERBS[verb].split())]


def _killed(home: Path, whole: dict[str, dict[str, bytes]], seed: int, number: int) -> str:
    """What went wrong, or nothing."""
    rng = random.Random(f"kills {seed} {number}")
    verb, sent = list(VERBS)[number % len(VERBS)], rng.choice(SIGNALS)
    place = home / f"run {number}"
    place.mkdir()
    for given in ("checkpoint", "model", "adapters", "data.json", "questions.json", "requests.jsonl"):
        (place / given).symlink_to(home / given)
    for image in home.glob("*.png"):
        (place / image.name).symlink_to(image)
    process = subprocess.Popen(_command(verb, "out"), cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    begun = rng.random() < 0.7  # most of them once something is written
    while begun and process.poll() is None and not _written(place):
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.3 if begun else 2))
    process.send_signal(sent)
    errors = process.communicate(timeout=60)[1].decode()
    told = f"{verb}, {sent.name}"
    if process.returncode not in STATUSES and process.returncode != -sent:
        return f"{told}: status {process.returncode}: {errors[-200:]}"
    if "Traceback" in errors and process.returncode != -signal.SIGKILL and _of_ours(errors):
        return f"{told}: a traceback: {errors[-200:]}"
    if sent != signal.SIGKILL and (left := _hidden(place)):
        return f"{told}: left {left}"
    if not (place / "out").exists() or not verb.startswith(("convert", "fuse", "export")):
        done = subprocess.run(_command(verb, "out"), cwd=place, capture_output=True, text=True)
        if done.returncode:
            return f"{told}: again: {done.stderr[-200:]}"
    if left := _hidden(place):
        return f"{told}: left {left} after the next run"
    return _difference(told, _content(place / "out"), whole[verb])


def _of_ours(errors: str) -> bool:
    """Whether a traceback passed through the package; a signal may come before it is there."""
    return "avg_mlx/" in errors.replace("avg_mlx/__main__.py", "").replace("avg_mlx/__init__.py", "")


def _written(place: Path) -> bool:
    return (place / "out").exists() or bool(_hidden(place))


def _hidden(place: Path) -> list[str]:
    return [str(file.relative_to(place)) for file in place.rglob(".*") if file.name != "."]


def _on_full_disk(home: Path, verb: str, size: int, number: int, whole: dict[str, bytes]) -> str:
    small = home / f"disk {number}"
    small.mkdir()
    arguments = [str(small), str(size), json.dumps(_command(verb, f"{small.name}/out"))]
    command = ["unshare", "--map-root-user", "--mount", sys.executable, __file__, *arguments]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True)
    if done.returncode:
        return done.stderr[-300:]
    report = json.loads(done.stdout)
    if report["status"] not in (1, 2) or len(report["errors"].strip().splitlines()) != 1:
        return f"status {report['status']}: {report['errors'][-300:]}"
    if report["left"]:
        return f"left {report['left']}"
    if report["again"]:
        return f"again: {report['again'][-300:]}"
    ended = {name: bytes.fromhex(content) for name, content in report["content"].items()}
    return _difference(verb, ended, whole)


def on_small_disk(place: str, size: str, command: str) -> None:
    """In a mount namespace of its own: run a command on a small disk, make room, run it again, and print what was."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place], check=True)
    filler = Path(place) / "filler"
    filler.write_bytes(b" " * PAGE * (int(size) < PAGE))
    first = subprocess.run(json.loads(command), capture_output=True, text=True)
    left = _hidden(Path(place))
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=1g", place], check=True)
    again = subprocess.run(json.loads(command), capture_output=True, text=True)
    content = {name: value.hex() for name, value in _content(Path(place) / "out").items()}
    errors = [line for line in first.stderr.splitlines() if line.startswith("avg-mlx")]
    report = {"status": first.returncode, "errors": "\n".join(errors), "left": left, "content": content}
    print(json.dumps(report | {"again": again.stderr if again.returncode else ""}))


def _content(folder: Path) -> dict[str, bytes]:
    """The files of a folder; of those that tell times, what does not depend on them."""
    return {str(file.relative_to(folder)): _timeless(file) for file in sorted(folder.rglob("*")) if file.is_file()}


def _timeless(file: Path) -> bytes:
    if file.suffix == ".jsonl":
        rows = [_without_speeds(json.loads(line)) for line in file.read_text().splitlines()]
        return json.dumps(rows).encode()
    told = file.suffix in (".png", ".md") or file.name == "summary.json"
    return b"" if told else file.read_bytes()


def _without_speeds(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_speeds(one) for key, one in value.items() if key not in SPEEDS}
    return [_without_speeds(one) for one in value] if isinstance(value, list) else value


def _difference(told: str, ended: dict[str, bytes], whole: dict[str, bytes]) -> str:
    names = sorted(name for name in ended.keys() | whole.keys() if ended.get(name) != whole.get(name))
    return f"{told}: other files than without: {names}" if names else ""


if __name__ == "__main__":
    on_small_disk(*sys.argv[1:])
