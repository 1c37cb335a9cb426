"""pyproject.toml describes the package; only its long description is made here.

It is README.md, whose links lead from file to file. On a package index they would lead nowhere, so they become
addresses in the repository.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
REPOSITORY: str = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
PICTURES = (".gif", ".jpeg", ".jpg", ".png", ".svg", ".webp")

# [text](target), ![text](target), [label]: target, src="target", srcset="target", href="target"
LINK = re.compile(r"""(\]\(|^ {0,3}\[[^\]]+\]: *|\b(?:src|srcset|href)=["'])([^\s)"'>]+)""", re.MULTILINE)


def absolute(link: re.Match[str]) -> str:
    """A link with its target's address: a picture's bytes, or the page that shows a file."""
    before, target = link.groups()
    if re.match(r"[a-z][a-z0-9+.-]*:", target):
        return before + target
    if target.startswith("#"):
        return f"{before}{REPOSITORY}{target}"
    view = "raw" if target.lower().endswith(PICTURES) else "blob"
    return f"{before}{REPOSITORY}/{view}/HEAD/{target.removeprefix('./')}"


setup(
    long_description=LINK.sub(absolute, (ROOT / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)
