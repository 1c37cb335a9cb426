"""What the package index gets: a wheel with all that the package needs, described with links that lead somewhere."""

import ast
import email
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections import defaultdict
from email.message import Message
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGE = ROOT / "avg_mlx"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """`build(readme)` builds the wheel of a copy of the repository, with another README.md if one is given."""

    def build(readme: str | None = None) -> zipfile.ZipFile:
        folder = tmp_path_factory.mktemp("source")
        for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, folder)
        shutil.copytree(PACKAGE, folder / "avg_mlx", ignore=shutil.ignore_patterns("__pycache__"))
        if readme is not None:
            (folder / "README.md").write_text(readme, encoding="utf-8")
        backend = "import setuptools.build_meta as backend; backend.build_wheel('dist')"
        subprocess.run([sys.executable, "-c", backend], cwd=folder, check=True, capture_output=True)
        (file,) = (folder / "dist").glob("*.whl")
        return zipfile.ZipFile(file)

    return build


@pytest.fixture(scope="module")
def wheel(build):
    return build()


def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_string(wheel.read(name).decode())


def links(markdown: str) -> list[str]:
    """Every target of a link or picture, in Markdown or HTML."""
    shapes = (r"\]\(([^\s)]+)", r"^ {0,3}\[[^\]]+\]:\s*(\S+)", r"\b(?:src|srcset|href)\s*=\s*[\"']([^\"'\s]+)")
    return [target for shape in shapes for target in re.findall(shape, markdown, re.MULTILINE)]


def test_every_link_in_the_long_description_is_absolute(wheel):
    description = metadata(wheel).get_payload()
    assert len(links(description)) > 5
    assert [target for target in links(description) if not target.startswith(("https://", "mailto:"))] == []


def test_the_long_description_links_to_files_that_exist(wheel):
    address = re.compile(rf"{re.escape(PROJECT['urls']['Repository'])}/(?:blob|raw)/HEAD/([^#?]+)")
    files = [match[1] for target in links(metadata(wheel).get_payload()) if (match := address.match(target))]
    assert files
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_all_kinds_of_links_become_absolute(build):
    readme = """\
[page](docs/api.md#json) ![picture](docs/demo.png "title") [![both](a.svg)](./LICENSE) [here](#more) [label]
<p align="center"><img src="docs/b.PNG" width="50%"> <a href='LICENSE'>x</a></p>
[out](https://example.org/a.png) [mail](mailto:a@example.org)

[label]: docs/chat.md
"""
    home = PROJECT["urls"]["Repository"]
    assert (
        metadata(build(readme)).get_payload()
        == f"""\
[page]({home}/blob/HEAD/docs/api.md#json) ![picture]({home}/raw/HEAD/docs/demo.png "title") \
[![both]({home}/raw/HEAD/a.svg)]({home}/blob/HEAD/LICENSE) [here]({home}#more) [label]
<p align="center"><img src="{home}/raw/HEAD/docs/b.PNG" width="50%"> <a href='{home}/blob/HEAD/LICENSE'>x</a></p>
[out](https://example.org/a.png) [mail](mailto:a@example.org)

[label]: {home}/blob/HEAD/docs/chat.md
"""
    )


def test_the_wheel_holds_every_file_of_the_package(wheel):
    ours = {str(f.relative_to(ROOT)) for f in PACKAGE.rglob("*") if f.is_file() and "__pycache__" not in f.parts}
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == ours


def test_the_project_says_what_it_is(wheel):
    found = metadata(wheel)
    assert found["Description-Content-Type"] == "text/markdown"
    urls = dict(line.split(", ") for line in found.get_all("Project-URL", []))
    assert urls.keys() == {"Repository", "Documentation", "Changelog", "Issues"}
    assert all(url.startswith("https://github.com/avg-mlx/avg-mlx") for url in urls.values())
    assert "Typing :: Typed" in found.get_all("Classifier", [])
    assert found["Keywords"]


def imports() -> dict[str, set[str]]:
    """Modules that the package imports from outside, each with the names taken from it."""
    found: dict[str, set[str]] = defaultdict(set)
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found[node.module] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    found[alias.name] |= set()
    return found


def test_what_is_imported_is_depended_on():
    """Directly, or as an extra: what another package happens to bring may go with its next release."""
    extras = [need for needs in PROJECT["optional-dependencies"].values() for need in needs]
    named = {canonicalize_name(Requirement(need).name) for need in [*PROJECT["dependencies"], *extras]}
    packages = {module.partition(".")[0] for module in imports()} - sys.stdlib_module_names
    providers = packages_distributions()
    missing = {
        package
        for package in packages
        if not named & {canonicalize_name(name) for name in providers.get(package, [package])}
    }
    assert missing == set()


def test_mlx_lm_is_bounded_and_the_bound_names_what_it_protects():
    """The list beside the bound in pyproject.toml is the list of imports."""
    comment = re.findall(r"^ +#   (mlx_lm\.[\w.]+): (.+)$", (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    listed = {module: set(names.split(", ")) for module, names in comment}
    used = {module: names for module, names in imports().items() if module.partition(".")[0] == "mlx_lm"}
    used["mlx_lm.models.llama"] = {"Model", "ModelArgs"}  # avg_llava.py imports it, and its like, by name
    assert listed == used
    (need,) = (Requirement(need) for need in PROJECT["dependencies"] if need.startswith("mlx-lm"))
    assert any(specifier.operator == "<" for specifier in need.specifier)


def test_files_that_name_the_repository_agree():
    """Every address of ours is in the repository that pyproject.toml names, and leads to a file."""
    address = re.compile(rf"{re.escape(PROJECT['urls']['Repository'])}/(?:blob|tree|raw)/HEAD/([\w./-]+)")
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "pyproject.toml"]
    places: list[tuple[Path, str]] = [
        (page, file) for page in pages for file in address.findall(page.read_text("utf-8"))
    ]
    assert places
    assert [place for place in places if not (ROOT / place[1]).exists()] == []


@pytest.mark.parametrize("page", ["CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_pages_beside_the_readme_name_files_that_exist(page):
    """In links, and as code."""
    text = (ROOT / page).read_text(encoding="utf-8")
    linked = [target.partition("#")[0] for target in links(text) if not target.startswith("https://")]
    named = re.findall(r"`((?:avg_mlx|benchmarks|docs|tests)/[\w./]+)`", text)
    assert [file for file in linked + named if not (ROOT / file).exists()] == []
