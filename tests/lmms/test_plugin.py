"""lmms-eval's own command, with this package's model and a task of one's own."""

import pytest
from lmms_runs import lmms_eval
from made_up import picture, write_task
from PIL import Image

from avg_mlx import generate, load
from avg_mlx.weights.demo import demo_model

pytestmark = pytest.mark.slow

LITERAL = "Where is <image> written?"
QUESTIONS = [
    {"question": "is there a circle?", "answer": "yes", "image": picture(0)},
    {"question": LITERAL, "answer": "nowhere", "image": picture(1)},
    {"question": "is there a circle? " * 1000, "answer": "", "image": picture(2)},
    {"question": "what is written?", "answer": "4660", "image": Image.open(demo_model() / "sign.png")},
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("tasks"), "signs", QUESTIONS)


@pytest.fixture(scope="module")
def logged(tasks, tmp_path_factory):
    """What lmms-eval logs of the task, the model choosing for itself."""
    output = tmp_path_factory.mktemp("results")
    return lmms_eval(output, "--include_path", tasks, "--tasks", "signs", model_args="pretrained=demo")


def test_answers_are_those_of_generate(logged):
    model, tokenizer = load("demo")
    for n in (0, 3):
        answer = generate(model, tokenizer, QUESTIONS[n]["question"], QUESTIONS[n]["image"], max_tokens=8)
        assert logged["samples"]["signs"][n]["filtered_resps"] == answer.text.strip()


def test_a_literal_image_is_text(logged):
    sample = logged["samples"]["signs"][1]
    assert sample["filtered_resps"]
    assert sample["token_counts"][0]["problem"] is None


def test_what_does_not_fit_into_the_context_is_answered_with_nothing_and_says_so(logged):
    sample = logged["samples"]["signs"][2]
    assert sample["filtered_resps"] == ""
    assert "positions" in sample["token_counts"][0]["problem"]


def test_samples_tell_visual_tokens_granularity_and_seconds(logged):
    counts = [sample["token_counts"][0] for sample in logged["samples"]["signs"]]
    granularities = load("demo")[0].config.granularities
    for n in (0, 1, 3):
        assert 0 < counts[n]["visual_tokens"] <= counts[n]["visual_tokens_finest"]
        assert counts[n]["granularity"][0] in granularities
        assert counts[n]["granularity_source"] == "router"
        assert counts[n]["seconds"].keys() == {"preprocess", "vision", "router", "prefill", "generation"}
        assert counts[n]["input_tokens"] > counts[n]["visual_tokens"]


@pytest.mark.parametrize(("option", "value"), [("granularity", 4), ("max_visual_tokens", 12), ("token_cost", 100)])
def test_it_looks_as_it_is_told(tasks, tmp_path, option, value):
    how = ("--include_path", tasks, "--tasks", "signs", "--offset", 3)
    [sample] = lmms_eval(tmp_path, *how, model_args=f"pretrained=demo,{option}={value}")["samples"]["signs"]
    [view] = generate(
        *load("demo"), QUESTIONS[3]["question"], QUESTIONS[3]["image"], max_tokens=1, **{option: value}
    ).views
    assert view.source != "router"  # by itself it would look more closely
    counts = sample["token_counts"][0]
    assert counts["granularity"] == [view.granularity]
    assert counts["granularity_source"] == view.source
    assert counts["visual_tokens"] == view.visual_tokens
