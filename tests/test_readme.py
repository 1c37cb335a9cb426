"""What README and docs show can be run."""

import re
import shlex

import pytest
from conftest import PHOTO, ROOT

from avg_mlx.cli import bench, chat, convert, evaluate, explain, export, feedback, fuse, generate, models, serve, train

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PARSERS = {
    "convert": convert.build_parser,
    "chat": chat.build_parser,
    "generate": generate.build_parser,
    "feedback": feedback.build_parser,
    "evaluate": evaluate.build_parser,
    "explain": explain.build_parser,
    "fuse": fuse.build_parser,
    "export": export.build_parser,
    "models": models.build_parser,
    "serve": serve.build_parser,
    "bench": bench.build_parser,
    "train instruct": train.instruct_parser,
    "train router": train.router_parser,
    "train rglf": train.rglf_parser,
}


def commands() -> list[str]:
    """All calls of our commands in the pages, lines that end in a backslash joined."""
    texts = [page.read_text(encoding="utf-8").replace("\\\n", " ") for page in PAGES]
    calls = re.compile(r"(?:avg-mlx (?=[a-z])|python (?=convert\.py|generate\.py))[^`\n]*")
    return [call for text in texts for call in calls.findall(text) if " --" in call]


@pytest.mark.parametrize("command", commands())
def test_a_command_has_the_options_that_the_pages_give_it(command):
    words = shlex.split(command, comments=True)[1:]
    verb = words.pop(0).removesuffix(".py")
    if verb == "train":
        verb += f" {words.pop(0)}"
    PARSERS[verb]("command").parse_args(words)


def test_the_commands_are_found():
    assert len(commands()) > 10


def test_the_python_example_runs(converted, capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    code = code.replace('"mlx_model"', repr(str(converted))).replace('"photo.jpg"', repr(str(PHOTO)))
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["answer"].text in capsys.readouterr().out
    assert names["view"].visual_tokens > 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target
