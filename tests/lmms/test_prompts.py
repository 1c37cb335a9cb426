"""The prompts of the eleven benchmarks are the authors', to the id."""

import json
from pathlib import Path

import pytest

from avg_mlx.benchmark.paper import PAPER
from avg_mlx.benchmark.questions import prompt_of, question_of
from avg_mlx.benchmark.tasks import Tasks
from avg_mlx.inputs.prompt import build_messages, encode_messages

pytestmark = pytest.mark.slow

# The first question of each benchmark's made-up data: as vicuna_v1 has it, its ids with Llama-2's tokenizer, and how
# many new tokens it may get.
PROMPTS = json.loads((Path(__file__).parent / "prompts.json").read_text())


@pytest.fixture(scope="module")
def known():
    return Tasks()


@pytest.fixture(scope="module", params=[benchmark.task for benchmark in PAPER])
def asked(request, known, data_root):
    """A task's name, its first question and that question's images."""
    task = known.load(known.source(request.param, data_root), data_root)
    task.build_all_requests(limit=1)
    question = question_of(task.instances[0], {task.config.task: task.dataset})
    return request.param, question, question.images()


def test_ids(asked, llama2):
    name, question, images = asked
    messages = build_messages(prompt_of(question.text, len(images)), len(images))
    assert encode_messages(llama2, messages) == PROMPTS[name]["ids"]


def test_the_ids_are_the_references(llama2_reference):
    """Its tokenizer's, of the text that its conversation makes: each piece between images by itself."""
    assert PROMPTS.keys() == {benchmark.task for benchmark in PAPER}
    for prompt in PROMPTS.values():
        first, *others = (llama2_reference.encode(piece) for piece in prompt["text"].split("<image>"))
        ids = first
        for other in others:
            ids = [*ids, -200, *other[1:]]
        assert prompt["ids"] == ids


def test_new_tokens(asked):
    name, question, _ = asked
    assert question.max_tokens == PROMPTS[name]["max_new_tokens"]
