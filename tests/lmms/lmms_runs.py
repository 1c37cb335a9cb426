"""Commands that the tests of this folder run, without a network and with a cache of their own, and what they leave."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CACHE = tempfile.TemporaryDirectory(prefix="lmms-")
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": CACHE.name}
BIN = Path(sys.executable).parent
PATIENCE = 1800  # seconds


def avg_mlx(*arguments) -> subprocess.CompletedProcess:
    """Run one of our commands to its end."""
    command = [sys.executable, "-m", "avg_mlx", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


def lmms_eval_command(output: Path, *arguments, model_args: str) -> list[str]:
    """lmms-eval's own command with our model."""
    command = [BIN / "lmms-eval", "eval", "--model", "avg_mlx", "--model_args", model_args, "--output_path", output]
    return list(map(str, [*command, "--log_samples", "--batch_size", 1, *arguments]))


def lmms_eval(output: Path, *arguments, model_args: str, cwd: Path | None = None) -> dict:
    """Run it with the demo model to its end, and return its results, with the samples that it logs."""
    command = lmms_eval_command(output, *arguments, model_args=model_args)
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    home = output / "demo"  # named as the model
    (file,) = home.glob("*_results.json")
    samples = {file.stem.partition("_samples_")[2]: rows_of(file) for file in home.glob("*_samples_*.jsonl")}
    return json.loads(file.read_text()) | {"samples": samples}


def killed(command: list[str], answers: Path, rows: int) -> list[dict]:
    """Kill a command once its journal has so many rows, and return those it has then."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(rows_of(answers)) < rows:
        time.sleep(0.001)
    process.kill()
    _, err = process.communicate()
    assert process.returncode == -9, err
    return rows_of(answers)


def rows_of(file: Path) -> list[dict]:
    """The whole lines of a JSON Lines file."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
