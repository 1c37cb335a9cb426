"""Photographs, scans and drawings of many shapes and kinds, fetched for the test, through both scripts."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CHECKPOINT, ROOT, fetch_wheel
from PIL import Image

from avg_mlx.cli.generate import main
from avg_mlx.inputs.image_io import read_image

pytestmark = pytest.mark.slow

# Rows and columns of local crops, by hand from the pictures' sizes.
CROP_GRIDS = {
    "astronaut.png": (2, 2),  # 512×512
    "camera.png": (2, 2),  # 512×512, grey
    "cell.png": (2, 2),  # 550×660, grey
    "chelsea.png": (1, 2),  # 451×300
    "chessboard_GRAY.png": (2, 1),  # 200×200, grey
    "coffee.png": (2, 2),  # 600×400
    "color.png": (2, 2),  # 371×370
    "horse.png": (1, 2),  # 400×328, with transparency
    "hubble_deep_field.jpg": (2, 2),  # 1000×872
    "logo.png": (2, 2),  # 500×500, with transparency
    "microaneurysms.png": (2, 1),  # 102×102, grey
    "motorcycle_left.png": (2, 2),  # 741×500
    "multipage.tif": (2, 1),  # 10×15, grey, two pages
    "no_time_for_that_tiny.gif": (2, 1),  # 14×25, palette, 24 frames
    "page.png": (1, 2),  # 384×191, grey
    "retina.jpg": (2, 2),  # 1411×1411
    "rocket.jpg": (2, 2),  # 640×427
    "text.png": (1, 2),  # 448×172, grey
}
UNREADABLE = "multipage_rgb.tif"  # five dimensions, which Pillow does not know


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """The folder of scikit-image's own pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    with fetch_wheel("scikit-image==0.26.0", folder) as archive:
        archive.extractall(folder, [f"skimage/data/{name}" for name in (*CROP_GRIDS, UNREADABLE)])
    return folder / "skimage" / "data"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What `convert.py` makes of the golden checkpoint."""
    folder = tmp_path_factory.mktemp("converted") / "model"
    command = [sys.executable, ROOT / "convert.py", "--hf-path", CHECKPOINT, "--mlx-path", folder]
    subprocess.run(command, check=True)
    return folder


def run_script(folder: Path, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "generate.py", "--model", folder, "--prompt", "What is this?", "-m", "2"]
    return subprocess.run([*map(str, [*command, *arguments])], capture_output=True, text=True)


def strict_json(text: str) -> dict[str, Any]:
    """The one JSON object in a text; NaN and Infinity are none."""

    def refuse(constant: str):
        raise AssertionError(f"{constant} in {text}")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("name", CROP_GRIDS)
def test_a_picture_is_cut_and_answered(name, pictures, folder, capfd):
    picture = str(pictures / name)
    assert main(["--model", str(folder), "--image", picture, "--prompt", "What is this?", "-m", "2", "--json"]) == 0
    out, err = capfd.readouterr()
    report = strict_json(out)
    rows, columns = CROP_GRIDS[name]
    assert (report["crop_grid"], report["crops"]) == ([rows, columns], 1 + rows * columns)
    assert report["visual_tokens"] <= report["visual_tokens_finest"] == finest(picture, rows, columns)
    assert report["prompt_tokens"] == report["visual_tokens"] + len(report["prompt_token_ids"]) - 1
    assert sum(report["router"]["probabilities"]) == pytest.approx(1)
    assert len(report["token_ids"]) == 2
    assert f"Image: {1 + rows * columns} crops (the whole and {rows}×{columns})" in err


def finest(picture: str, rows: int, columns: int) -> int:
    """Visual tokens at 576 a crop: the base crop, then the local ones without the bars, each row with its newline."""
    with Image.open(picture) as image:
        width, height = image.size
    rows, columns = 24 * rows, 24 * columns
    if width / height > columns / rows:
        rows -= 2 * ((rows - int(height * (columns / width))) // 2)
    else:
        columns -= 2 * ((columns - int(width * (rows / height))) // 2)
    return 576 + rows * (columns + 1)


@pytest.mark.parametrize("name", CROP_GRIDS)
def test_a_picture_keeps_its_colours(name, pictures):
    """Against NumPy: transparency over white, greys three times over, everything else as it is."""
    with Image.open(pictures / name) as image:
        *colours, alpha = np.moveaxis(np.asarray(image.convert("RGBA"), np.float64), -1, 0)
    expected = np.stack(colours, -1) * (alpha / 255)[..., None] + (255 - alpha)[..., None]
    assert np.abs(np.asarray(read_image(pictures / name), np.float64) - expected).max() <= 1


def test_several_pictures_in_one_question(pictures, folder):
    names = ["rocket.jpg", "page.png", "logo.png"]
    done = run_script(folder, "--image", *(pictures / name for name in names), "--granularity", 36, "--json", "--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    report = strict_json(done.stdout)
    grids = [CROP_GRIDS[name] for name in names]
    assert report["crop_grid"] == [list(grid) for grid in grids]
    assert report["crops"] == [1 + rows * columns for rows, columns in grids]
    assert report["granularity"] == [36, 36, 36]
    assert report["prompt_tokens"] == sum(report["visual_tokens"]) + len(report["prompt_token_ids"]) - 3


def test_a_streamed_answer_about_a_photograph(pictures, folder):
    done = run_script(folder, "--image", pictures / "astronaut.png")
    assert done.returncode == 0
    assert done.stdout.endswith("\n")
    assert "Image: 5 crops (the whole and 2×2)" in done.stderr
    assert "Generation: 2 tokens" in done.stderr


def test_a_picture_that_pillow_cannot_read_is_refused(pictures, folder):
    done = run_script(folder, "--image", pictures / UNREADABLE)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        f"generate.py: {pictures / UNREADABLE} is not an image that can be read here; give a PNG"
    )
