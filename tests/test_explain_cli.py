"""`avg-mlx explain` as a user types it."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import PHOTO, ROOT
from PIL import Image

from avg_mlx.cli import explain as cli

QUESTION = "What is this?"


def run(*arguments, code: str = "pass") -> subprocess.CompletedProcess:
    """Run the command in a process of its own, after `code`."""
    start = f"import sys; {code}; from avg_mlx.__main__ import main; sys.exit(main())"
    command = [sys.executable, "-c", start, "explain", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def one_line(done: subprocess.CompletedProcess) -> str:
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    [line] = done.stderr.splitlines()
    return line


def test_a_picture_and_json_from_a_process_of_its_own(tiny_folder, tmp_path):
    picture = tmp_path / "picture.png"
    done = run("--model", tiny_folder, "--image", PHOTO, "--prompt", QUESTION, "--output", picture, "--json")
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert (content["model"], content["prompt"]) == (str(tiny_folder), QUESTION)
    [image] = content["images"]
    assert image["granularity"] in image["router"]["granularities"]
    assert image["evidence"][0]["for"] == image["granularity"]
    with Image.open(picture) as drawn:
        assert drawn.format == "PNG"
    assert str(picture) in done.stderr


def test_tables_add_up(tiny_folder, capsys):
    assert cli.main(["--model", str(tiny_folder), "--image", str(PHOTO), "-p", QUESTION]) == 0
    shown = capsys.readouterr().out
    parts = [float(number) for number in re.findall(r"\| +([+-]\d+\.\d{3}) \|$", shown, re.MULTILINE)]
    assert parts[-1] == pytest.approx(sum(parts[:-1]), abs=0.002 * len(parts))
    logits = sorted(float(row.split("|")[4]) for row in re.findall(r"^\|.*%.*$", shown, re.MULTILINE))
    assert parts[-1] == pytest.approx(logits[-1] - logits[-2], abs=0.002)
    assert len(logits) == 5


def test_several_images_have_numbered_pictures(tiny_folder, tmp_path, capsys):
    images = [str(PHOTO), str(PHOTO)]
    arguments = ["--model", str(tiny_folder), "--image", *images, "-p", QUESTION, "--output", str(tmp_path / "p.svg")]
    assert cli.main([*arguments, "--json"]) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["p-1.svg", "p-2.svg"]
    assert len(json.loads(capsys.readouterr().out)["images"]) == 2


def test_options_of_looking_reach_the_router(tiny_folder, capsys):
    base = ["--model", str(tiny_folder), "--image", str(PHOTO), "-p", QUESTION, "--json"]
    assert cli.main([*base, "--max-visual-tokens", "9"]) == 0
    [image] = json.loads(capsys.readouterr().out)["images"]
    assert image["visual_tokens"] <= 9
    assert cli.main([*base, "--granularity", "4"]) == 0
    [image] = json.loads(capsys.readouterr().out)["images"]
    assert (image["granularity"], image["granularity_source"], image["votes"]) == (4, "forced", None)


def test_a_model_without_a_router_says_so(tiny_stage3, tmp_path, capsys):
    picture = tmp_path / "picture.png"
    assert cli.main(["--model", str(tiny_stage3), "--image", str(PHOTO), "-p", QUESTION, "--output", str(picture)]) == 0
    assert "no router" in capsys.readouterr().out
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "status", "named"),
    [
        (["--image", "missing.jpg"], 2, "missing.jpg"),
        (["--image", __file__], 2, "test_explain_cli.py"),
        (["--image", PHOTO, "--over", "3"], 2, "3"),
        (["--image", PHOTO, "--over", "0"], 2, "--over"),
        (["--image", PHOTO, "--granularity", "5"], 2, "5"),
        (["--image", PHOTO, "--output", "picture.txt"], 2, ".png"),
        (["--image", PHOTO, "--output", "nowhere/picture.png"], 2, "nowhere"),
        (["--image", PHOTO, "--max-pixels", "10"], 2, "--max-pixels"),
        (["--image", PHOTO, "--ouput", "picture.png"], 2, "--output"),
        ([], 2, "--image"),
    ],
)
def test_bad_input_is_one_line_that_names_it(arguments, status, named, tiny_folder, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert named in refused(cli.main, "--model", tiny_folder, "-p", QUESTION, *arguments, status=status)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_question_is_one_line(tiny_folder, refused):
    assert "empty" in refused(cli.main, "--model", tiny_folder, "--image", PHOTO, "-p", " ")


def test_without_the_plotting_library_one_line_names_the_remedy_before_the_model_is_loaded(tmp_path):
    arguments = ["--model", tmp_path / "none", "--image", PHOTO, "-p", QUESTION, "--output", tmp_path / "picture.png"]
    done = run(*arguments, code="sys.modules['matplotlib'] = None")
    assert done.returncode == 2
    assert "pip install 'avg-mlx[plot]'" in one_line(done)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_image_is_one_line_from_a_process_of_its_own(tiny_folder, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    done = run("--model", tiny_folder, "--image", broken, "-p", QUESTION, "--output", tmp_path / "picture.png")
    assert done.returncode == 2
    assert "broken.png" in one_line(done)
    assert [file.name for file in tmp_path.iterdir()] == ["broken.png"]
