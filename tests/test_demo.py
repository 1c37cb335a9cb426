"""The model that comes with the package, and what docs/demo.md says of it."""

import json
import shlex
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from avg_mlx import evaluate, generate, load, read_questions
from avg_mlx.cli import demo as demo_verb
from avg_mlx.cli.generate import main
from avg_mlx.weights.demo import demo_model

SAMPLE = ROOT / "tests" / "demo"
PICTURE = demo_model() / "sign.png"
SHAPE, TEXT, OPEN = demo_verb.QUESTIONS
UNKNOWN, OUTSIDE = "I see no shape or text that I know.", "I only know shapes, colours and short texts."


def plain(answer):
    return answer.strip().rstrip(".").lower()


@pytest.fixture(scope="module")
def demo():
    return load(demo_model())


@pytest.fixture(scope="module")
def sample():
    return read_questions(SAMPLE / "questions.jsonl")[0]


@pytest.fixture(scope="module")
def evaluated(demo, sample, tmp_path_factory):
    """(summary, the answers' lines) of the reduced evaluation."""
    folder = tmp_path_factory.mktemp("evaluated")
    summary = evaluate(*demo, sample, folder).summary
    return summary, [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_it_is_small_and_whole(demo):
    files = sorted(file.name for file in demo_model().iterdir())
    assert files == ["config.json", "model.safetensors", "sign.png", "tokenizer.json", "tokenizer_config.json"]
    assert sum(file.stat().st_size for file in demo_model().iterdir()) <= 10e6
    config = demo[0].config
    assert config.has_router
    assert config.image_aspect_ratio == "anyres"
    assert len(config.granularities) == 5


def test_without_a_model_it_answers_and_says_so(tmp_path):
    command = [sys.executable, ROOT / "generate.py", "--image", PICTURE, "--prompt", SHAPE]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "rectangle")
    line, *summary = done.stderr.splitlines()
    assert "demo model" in line
    assert "avg-mlx convert --hf-path zhibinlan/AVG-LLaVA" in line
    assert summary[0] == "=" * 10
    quiet = subprocess.run([*command, "--quiet"], capture_output=True, text=True, cwd=tmp_path)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, done.stdout, f"{line}\n")


def test_it_has_a_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # whatever lies about, the name stands for the demo model
    assert main(["--model", "demo", "--image", str(PICTURE), "--prompt", SHAPE, "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert (json.loads(out)["text"].strip(), json.loads(out)["model"], err) == ("rectangle", "demo", "")
    assert main(["--image", str(PICTURE), "--prompt", SHAPE, "--quiet"]) == 0
    assert capsys.readouterr().out.strip() == "rectangle"
    assert main(["--model", "./demo", "--prompt", "Why?"]) == 2
    assert "demo is not a model folder" in capsys.readouterr().err


def test_its_verb_shows_commands_that_can_be_given(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert demo_verb.main([]) == 0
    out, err = capfd.readouterr()
    commands = [shlex.split(line[2:]) for line in out.splitlines() if line.startswith("$ ")]
    answers = [line for line in out.splitlines() if line and not line.startswith("$ ")]
    assert [command[-1] for command in commands] == list(demo_verb.QUESTIONS)
    assert len(answers) == len(demo_verb.QUESTIONS)
    assert err.count("Visual tokens: ") == len(demo_verb.QUESTIONS)
    for command, answer in zip(commands, answers, strict=True):
        assert command[:2] == ["avg-mlx", "generate"]
        assert main([*command[2:], "--quiet"]) == 0
        assert capfd.readouterr().out == f"{answer}\n"


def test_its_verb_takes_another_picture(capfd):
    assert demo_verb.main(["--image", str(SAMPLE / "easy_vqa_test-0.png")]) == 0
    capfd.readouterr()
    assert demo_verb.main(["--image", "no.png"]) == 2
    out, err = capfd.readouterr()
    assert (len(out.splitlines()), len(err.splitlines())) == (1, 1)
    assert "no image at no.png" in err


def test_the_question_decides_how_closely_it_looks(demo):
    shape, text = (generate(*demo, question, PICTURE) for question in (SHAPE, TEXT))
    assert (shape.text.strip(), text.text.strip()) == ("rectangle", "4660")
    assert shape.views[0].granularity < text.views[0].granularity


def test_the_reduced_table_is_made_again(sample, evaluated):
    summary, _ = evaluated
    kept = json.loads((SAMPLE / "summary.json").read_text())
    assert summary["questions"] == kept["questions"] == len(sample)
    assert summary["modes"].keys() == kept["modes"].keys()
    for mode, one in summary["modes"].items():
        assert one["accuracy"] == pytest.approx(kept["modes"][mode]["accuracy"], abs=1.001 / len(sample)), (
            mode
        )  # another device rounds
        if mode.isdecimal():
            assert one["visual_tokens"] == kept["modes"][mode]["visual_tokens"]


def test_the_metric_is_what_it_says(demo, sample, evaluated):
    """Counted by hand: an answer equals one that is accepted, or does not."""
    right = 0
    for question in sample:
        answer = generate(*demo, question.question, question.file)
        right += plain(answer.text) in map(plain, question.answers)
    assert evaluated[0]["modes"]["adaptive"]["correct"] == right
    assert 0 < right < len(sample) + 1


def test_the_router_saves_most_tokens_on_shapes(evaluated):
    taken = {"seen": [], "read": []}
    for line in evaluated[1]:
        kind = "read" if line["category"].startswith(("reading", "text")) else "seen"
        taken[kind].append(line["chosen"]["adaptive"])
    mean = {kind: sum(chosen) / len(chosen) for kind, chosen in taken.items()}
    assert mean["seen"] < mean["read"]


@pytest.mark.parametrize(
    "question",
    ["WHAT SHAPE IS THIS?", "what shape is this", "Which shape is in the picture?", "What color is the shape?"],
)
def test_it_is_asked_in_any_words(demo, question):
    assert plain(generate(*demo, question, PICTURE).text) == ("yellow" if "color" in question else "rectangle")


def test_it_says_what_is_there(demo):
    assert plain(generate(*demo, OPEN, PICTURE).text) == "a yellow rectangle and the text 4660"


def test_it_says_what_it_does_not_know(demo):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8))
    assert generate(*demo, OPEN, noise).text.strip() == UNKNOWN
    for question in ("Who painted this?", "Write a poem.", "Is the man happy?"):
        assert generate(*demo, question, PICTURE).text.strip() == OUTSIDE
