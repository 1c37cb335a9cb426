"""What importing loads, and who prints. The contracts in pyproject.toml say which way imports point: make lint."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

import avg_mlx
from avg_mlx.__main__ import VERBS

PACKAGE = ROOT / "avg_mlx"

FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = sorted(file.parent for file in PACKAGE.glob("*/__init__.py"))


def import_statements(file: Path, late: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements of a file; `late`: also those in functions and for type checkers."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if late else tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node


def imported_files(file: Path, late: bool) -> set[Path]:
    """Files of this package that a file imports."""
    found = set()
    for node in import_statements(file, late):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        home = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
        for alias in node.names:
            module = home / alias.name
            places = (module.with_suffix(".py"), module / "__init__.py", home.with_suffix(".py"), home / "__init__.py")
            found.add(next(place for place in places if place.is_file()))
    return found


def external_packages(file: Path, late: bool) -> set[str]:
    names = [
        alias.name for node in import_statements(file, late) if isinstance(node, ast.Import) for alias in node.names
    ]
    names += [
        node.module or ""
        for node in import_statements(file, late)
        if isinstance(node, ast.ImportFrom) and not node.level
    ]
    return {name.partition(".")[0] for name in names}


def loaded_with(file: Path) -> set[str]:
    """Packages that importing a file loads at once, through whatever it imports, but for Python's own."""
    seen: set[Path] = set()
    waiting, external = {file, file.parent / "__init__.py", PACKAGE / "__init__.py"}, set()
    while waiting:
        seen.add(now := waiting.pop())
        external |= external_packages(now, late=False)
        waiting |= imported_files(now, late=False) - seen
    return external - sys.stdlib_module_names


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_every_room_says_what_it_is_for(room):
    """In a line or two, and its contents are listed among the contracts."""
    said = ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8")))
    assert said
    assert len(said.splitlines()) <= 2
    assert f"avg_mlx.{room.name}" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_contracts_hold_and_see_everything():
    """import-linter reads functions and type checkers' imports too. A module that no contract lists is an error."""
    done = subprocess.run([Path(sys.executable).with_name("lint-imports")], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    assert " 0 broken" in done.stdout


GROUND = sorted(file.stem for file in PACKAGE.glob("*.py") if file.stem != "__init__")


@pytest.mark.parametrize("name", GROUND)
def test_the_ground_floor_needs_nothing_else(name):
    """It loads neither MLX nor anything else from outside, except what makes public names late."""
    assert loaded_with(PACKAGE / f"{name}.py") == {"lazy_loader"}


@pytest.mark.parametrize("verb", VERBS)
def test_help_waits_for_nothing(verb):
    """What a verb needs for its work is imported when it works."""
    assert loaded_with(PACKAGE / "cli" / f"{verb}.py") == {"lazy_loader"}


@pytest.mark.parametrize("command", [["-c", "import avg_mlx"], ["-m", "avg_mlx"], ["-m", "avg_mlx", "generate", "-h"]])
def test_nothing_from_outside_is_loaded_without_need(command):
    """Seen from outside: what the tests above read in the files."""
    done = subprocess.run([sys.executable, "-X", "importtime", *command], capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "avg_mlx" in loaded
    assert not loaded & {"mlx", "mlx_lm", "numpy", "PIL", "transformers", "huggingface_hub"}


def test_inside_the_package_imports_are_relative():
    """So that the tests above see them all."""
    assert not any("avg_mlx" in external_packages(file, late=True) for file in FILES)
    assert "mlx" in loaded_with(PACKAGE / "model" / "avg_llava.py")


def test_the_public_names_come_late():
    for name in avg_mlx.__all__:
        assert getattr(avg_mlx, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        avg_mlx.nonsense  # noqa: B018


def spoken(file: Path) -> Iterator[str]:
    """Where a file prints, or ends the program."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        name = ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""
        if name in (
            "print",
            "input",
            "exit",
            "quit",
            "SystemExit",
            "sys.exit",
            "os._exit",
            "sys.stdout.write",
            "sys.stderr.write",
        ):
            yield f"{file.name}:{node.lineno} {name}"


def test_only_the_command_line_prints_or_exits():
    library = [file for file in FILES if file.parent.name != "cli" and file.name != "__main__.py"]
    assert [place for file in library for place in spoken(file)] == []


def test_the_command_line_does_print():
    """So that the test above would see it."""
    assert any(spoken(file) for file in FILES if file.parent.name == "cli")
    assert [place for place in spoken(PACKAGE / "__main__.py") if place.endswith("sys.exit")]
