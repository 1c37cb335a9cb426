"""Imports point strictly downwards, as docs/architecture.md draws them."""

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

# Bottom to top; what stands in one line does not import each other. Some are packages.
LAYERS = (
    {"demo", "errors", "version"},
    {"files", "geometry"},
    {"config"},
    {"cost"},
    {"image", "image_io", "prompt", "vision", "scaler", "router", "packing"},
    {"tokenizer"},  # beside those, but for the conversation template that it writes down
    {"model", "model_card", "pytorch"},
    {"caches"},
    {"adapters", "quantization", "sharding", "view", "writing"},
    {"checkpoint", "generation"},
    {"batch", "chat", "source", "fusing"},
    {"conversion"},
    {"exporting"},
    {"training", "bench"},
    {"evaluation"},
    {"cli"},
    {"__init__", "__main__"},
)
SIBLINGS = LAYERS[3] | LAYERS[4]


def unit_of(file: Path) -> str:
    """The module or package directly under avg_mlx that a file belongs to."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(PACKAGE.rglob("*.py"))
UNITS = sorted({unit_of(file) for file in FILES})


def files_of(unit: str) -> list[Path]:
    return [file for file in FILES if unit_of(file) == unit]


def import_statements(file: Path, late: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements of a file; `late`: also those in functions and for type checkers."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if late else tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node


def imported_files(file: Path, late: bool) -> set[Path]:
    """Files of this package that a file imports; a public name counts as the module that it lives in."""
    found = set()
    for node in import_statements(file, late):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        home = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
        for alias in node.names:
            module = home / avg_mlx._HOME_OF.get(alias.name, alias.name) if home == PACKAGE else home / alias.name
            places = (module.with_suffix(".py"), module / "__init__.py", home.with_suffix(".py"), home / "__init__.py")
            found.add(next(place for place in places if place.is_file()))
    return found


def imported_units(unit: str) -> set[str]:
    """Units that a unit imports, sooner or later; the package itself is none, it has the version's number only."""
    return {unit_of(f) for file in files_of(unit) for f in imported_files(file, late=True)} - {unit, "__init__"}


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


def test_every_module_has_its_layer():
    assert set(UNITS) <= set().union(*LAYERS)
    assert sum(map(len, LAYERS)) == len(set().union(*LAYERS))


@pytest.mark.parametrize("unit", UNITS)
def test_imports_point_downwards(unit):
    (layer,) = (i for i, units in enumerate(LAYERS) if unit in units)
    assert imported_units(unit) <= set().union(*LAYERS[:layer])


@pytest.mark.parametrize("unit", sorted(SIBLINGS))
def test_stages_do_not_know_each_other(unit):
    assert imported_units(unit) & SIBLINGS == ({"prompt"} if unit == "tokenizer" else set())


@pytest.mark.parametrize("name", ["errors", "files", "version", "geometry", "config", "cost", "__main__", "__init__"])
def test_geometry_and_config_need_nothing_else(name):
    """Neither MLX nor anything else from outside."""
    assert loaded_with(PACKAGE / f"{name}.py") == set()


@pytest.mark.parametrize("verb", VERBS)
def test_help_waits_for_nothing(verb):
    """What a verb needs for its work is imported when it works."""
    assert loaded_with(PACKAGE / "cli" / f"{verb}.py") == set()


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
    assert "mlx" in loaded_with(PACKAGE / "model.py")


def test_the_public_names_come_late():
    assert set(avg_mlx.__all__) >= set(avg_mlx._HOME_OF)
    for name in avg_mlx.__all__:
        assert getattr(avg_mlx, name) is not None
    with pytest.raises(AttributeError, match="module 'avg_mlx' has no attribute 'nonsense'"):
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


@pytest.mark.parametrize("unit", [unit for unit in UNITS if unit not in ("cli", "__main__")])
def test_only_the_command_line_prints_or_exits(unit):
    assert [place for file in files_of(unit) for place in spoken(file)] == []


def test_the_command_line_does_print():
    """So that the test above would see it."""
    assert any(spoken(file) for file in files_of("cli"))
    assert [place for place in spoken(PACKAGE / "__main__.py") if place.endswith("sys.exit")]
