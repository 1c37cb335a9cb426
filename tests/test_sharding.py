"""The language model split over two processes on this machine, against one process."""

import contextlib
import io
import itertools
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import launch_two, make_adapters, write_checkpoint

from avg_mlx import InputError, Quantization, convert, load
from avg_mlx.cli.generate import main
from avg_mlx.model.inventory import tensors_of
from avg_mlx.weights.sharding import Agreed, shard

PHOTO = Path(__file__).parent / "photos" / "chelsea.jpg"
MODELS = {
    "float32": ("llava_llama", None),
    "4 bits": ("llava_llama", Quantization(bits=4, group_size=32, router_bits=8)),
    "qwen2": ("llava_qwen2", None),
}
LOOKS = {"adaptive": [], "forced": ["--granularity", "16"]}
SAMPLING = {"greedy": [], "sampled": ["--temp", "1", "--seed", "7"]}
REFUSED = {
    "unequal shares": ["--model", "tiny", "--image", PHOTO],
    "standard input": ["--model", "float32", "--image", "-"],
}


def work(models: Path, folder: Path) -> None:
    """What each process does, alone or in a group; the results are in `folder`."""
    group = mx.distributed.init()

    def run(*arguments) -> tuple[int, str, str]:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            status = main(["--prompt", "Why?", "-m", "3", *map(str, arguments)])
        return status, out.getvalue(), err.getvalue()

    os.chdir(models)
    answers = {}
    for model, (look, looking), (way, sampling) in itertools.product(MODELS, LOOKS.items(), SAMPLING.items()):
        answers[f"{model}, {look}, {way}"] = run("--json", "--model", model, "--image", PHOTO, *looking, *sampling)
    results = {
        "answers": answers,
        "streamed": run("--model", "float32", "--image", PHOTO),
        "unseeded": run("--json", "--model", "float32", "--image", PHOTO, "--temp", "1"),
        "refused": {name: run(*arguments) for name, arguments in REFUSED.items()} if group.size() > 1 else {},
        "agreed": Agreed(lambda x: x + group.rank(), group)(mx.array([5, 6])).tolist(),
        "bytes": {name: bytes_of(load(name, group=group)[0]) for name in MODELS},
        "bytes without a group": {name: bytes_of(load(name)[0]) for name in MODELS},
    }
    (folder / f"{group.rank()}-of-{group.size()}.json").write_text(json.dumps(results))


def bytes_of(model: nn.Module) -> int:
    return sum(array.nbytes for array in tensors_of(model).values())


@pytest.fixture(scope="module")
def models(tiny_folder, tmp_path_factory) -> Path:
    """A folder of models that two processes can share, and of one that they cannot."""
    home = tmp_path_factory.mktemp("models")
    for name, (model_type, quantization) in MODELS.items():
        changes = {"model_type": model_type, "num_key_value_heads": 2, "intermediate_size": 128}
        write_checkpoint(home / f"{name} checkpoint", changes)
        convert(home / f"{name} checkpoint", home / name, quantization=quantization)
    (home / "tiny").symlink_to(tiny_folder)
    return home


@pytest.fixture(scope="module")
def results(models, tmp_path_factory) -> dict[str, dict]:
    """Of one process, and of the first and second of two."""
    folder = tmp_path_factory.mktemp("results")
    with contextlib.chdir(models):
        work(models, folder)
    launch_two(__file__, models, folder)
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in ("0-of-1", "0-of-2", "1-of-2")}


@pytest.fixture
def alone(results):
    return results["0-of-1"]


@pytest.fixture
def first(results):
    return results["0-of-2"]


@pytest.fixture
def second(results):
    return results["1-of-2"]


@pytest.mark.parametrize("way", SAMPLING)
@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("model", MODELS)
def test_two_processes_answer_as_one_does(model, look, way, alone, first):
    (status, expected, _), (_, answer, _) = (x["answers"][f"{model}, {look}, {way}"] for x in (alone, first))
    expected, answer = json.loads(expected), json.loads(answer)
    assert status == 0
    assert len(answer["token_ids"]) > 1
    for key in ("token_ids", "text", "granularity", "granularity_source", "visual_tokens", "prompt_tokens"):
        assert answer[key] == expected[key]


def test_the_first_process_prints_and_the_second_does_not(alone, first, second):
    status, text, summary = first["streamed"]
    assert (status, text) == (0, alone["streamed"][1])
    assert "Time to first token" in summary
    assert second["streamed"] == [0, "", ""]


def test_sampling_without_a_seed_needs_no_more(first, second):
    status, answer, _ = first["unseeded"]
    assert status == second["unseeded"][0] == 0
    assert json.loads(answer)["token_ids"]


def test_the_first_processes_result_is_agreed_on(first, second):
    assert first["agreed"] == second["agreed"] == [5, 6]


@pytest.mark.parametrize("model", MODELS)
def test_each_process_holds_half_of_the_layers(model, models, alone, first, second):
    layers = tensors_of(load(models / model)[0].language_model.model)
    split = sum(array.nbytes for name, array in layers.items() if "_proj." in name)
    assert split > 0
    assert first["bytes"][model] == second["bytes"][model] == alone["bytes"][model] - split // 2


@pytest.mark.parametrize("model", MODELS)
def test_only_who_asks_for_a_group_shares(model, alone, first, second):
    """Training, feedback and evaluation run whole models side by side."""
    assert first["bytes without a group"] == second["bytes without a group"] == alone["bytes"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unequal shares", "2 processes cannot share this language model equally"),
        ("standard input", "mlx.launch does not say where standard input ends"),
    ],
)
def test_every_process_refuses_in_one_line(name, message, first, second):
    for process in (first, second):
        status, out, err = process["refused"][name]
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert message in err


@pytest.mark.parametrize(
    ("model", "processes", "message"),
    [
        (
            "float32",
            3,
            "3 processes cannot share this language model equally (2 attention heads, 2 key-value heads, "
            "128 feed-forward units); start 1 or 2",
        ),
        (
            "4 bits",
            4,
            "4 processes cannot share this language model equally (2 attention heads, 2 key-value heads, "
            "128 feed-forward units, 2 quantization groups); start 1 or 2",
        ),
    ],
)
def test_unequal_shares_are_refused_with_the_numbers_that_do(model, processes, message, models):
    with pytest.raises(InputError) as error:
        shard(load(models / model)[0], group_of(processes))
    assert str(error.value) == message


def test_groups_of_quantized_weights_are_not_torn(tmp_path):
    """With 3 groups of 32 inputs, half of the 96 inputs is no whole number of groups."""
    write_checkpoint(tmp_path / "checkpoint", {"num_key_value_heads": 2})
    convert(tmp_path / "checkpoint", tmp_path / "model", quantization=MODELS["4 bits"][1])
    with pytest.raises(InputError, match=r"96 feed-forward units, 1 quantization groups.*; start 1$"):
        shard(load(tmp_path / "model")[0], group_of(2))


def test_adapters_are_to_be_fused_first(models, tmp_path):
    adapters = make_adapters(models / "float32", tmp_path / "adapters", "lora")
    model, _ = load(models / "float32", adapter_path=adapters)
    with pytest.raises(InputError, match=r"adapters cannot be split over processes.*avg-mlx fuse"):
        shard(model, group_of(2))


def group_of(count: int):
    """A group that is asked for its size only."""
    return SimpleNamespace(size=lambda: count)


if __name__ == "__main__":
    work(*map(Path, sys.argv[1:]))
