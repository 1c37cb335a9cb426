"""Loading a converted folder: found, loaded strictly, and refused with everything that is wrong."""

import gc
import json
import shutil
from pathlib import Path

import huggingface_hub
import mlx.core as mx
import numpy as np
import pytest
from conftest import CHECKPOINT, retype
from safetensors.numpy import load_file, save_file

from avg_mlx import AvgMlxError, InputError, Quantization, convert, generate, load
from avg_mlx.model.inventory import tensors_of
from avg_mlx.weights.checkpoint import load_tokenizer
from avg_mlx.weights.source import find_folder, open_source


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    """A copy of a small converted folder, to be spoiled."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def rewrite(folder: Path, **changes) -> None:
    """Change keys of its config."""
    keys = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(keys | changes))


def test_every_tensor_is_loaded(tiny_folder):
    model, _ = load(tiny_folder)
    stored = load_file(tiny_folder / "model.safetensors")
    loaded = tensors_of(model)
    assert loaded.keys() == stored.keys()
    assert all(np.array_equal(np.array(loaded[name]), array) for name, array in stored.items())


def test_a_loaded_model_is_not_in_training(tiny):
    model, _ = tiny
    assert not any(module.training for module in model.modules())


def test_a_folder_answers_wherever_it_lies(tiny, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    answers = [generate(*loaded, "Why?", max_tokens=4).token_ids for loaded in (tiny, load("model"), load(folder))]
    assert answers[0] == answers[1] == answers[2]


def test_lazy_loading_leaves_weights_on_disk(tiny_folder):
    size = (tiny_folder / "model.safetensors").stat().st_size
    grown = []
    for lazy in (True, False):
        gc.collect()
        before = mx.get_active_memory()
        model, _ = load(tiny_folder, lazy=lazy)
        grown.append(mx.get_active_memory() - before)
        del model
    assert grown[0] < 0.1 * size
    assert grown[1] > 0.9 * size


def test_adapters_are_named_and_not_taken_for_a_revision(tiny_folder):
    with pytest.raises(TypeError):
        load(tiny_folder, "adapters")


def test_a_lazily_loaded_model_is_the_same(tiny, tiny_folder):
    lazy, _ = load(tiny_folder, lazy=True)
    for name, array in tensors_of(tiny[0]).items():
        assert mx.array_equal(tensors_of(lazy)[name], array)


def test_all_tensors_that_do_not_fit_are_listed_at_once(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["router.voter"] = tensors["router.voter"].T.copy()
    tensors["router.extra"] = tensors.pop("router.logit_norm.bias")
    del tensors["image_newline"]
    save_file(tensors, file)
    with pytest.raises(InputError) as error:
        load(folder)
    assert "2 missing (image_newline, router.logit_norm.bias)" in str(error.value)
    assert "1 unexpected (router.extra)" in str(error.value)
    assert "1 misshapen (router.voter is (1, 36), expected (36, 1))" in str(error.value)
    assert str(folder) in str(error.value)


def test_tensors_that_fit_are_not_complained_about(tiny, tiny_folder):
    open_source(tiny_folder).check(tiny[0])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), "is not a model folder: it has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json holds a list, expected an object"),
        (lambda folder: rewrite(folder, model_type="llama"), "model_type is 'llama', but only 'llava_llama'"),
        (lambda folder: rewrite(folder, num_hidden_layers=3), "9 missing (language_model.model.layers.2"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone"}}'), "gone"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no usable tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "no usable tokenizer"),
    ],
)
def test_a_spoiled_folder_is_refused(folder, spoil, words):
    spoil(folder)
    with pytest.raises(InputError) as error:
        load(folder)
    assert words in str(error.value)


@pytest.mark.parametrize("dtype", ["I32", "U32", "C64", "F64", "F8_E4M3"])
def test_norms_that_are_not_floats_are_refused(folder, dtype):
    name = "language_model.model.norm.weight"
    retype(folder / "model.safetensors", name, dtype)
    with pytest.raises(
        InputError, match=rf"^1 of the tensors of .* {name} is .*, expected float16 or bfloat16 or float32\)"
    ):
        load(folder)


@pytest.mark.parametrize(
    ("tensor", "dtype", "told"),
    [
        ("weight", "F32", "is float32, expected uint32"),
        ("weight", "I32", "is int32, expected uint32"),
        ("scales", "C64", "is complex64, expected float16 or bfloat16 or float32"),
        ("biases", "I64", "is int64, expected float16 or bfloat16 or float32"),
    ],
)
def test_packed_tensors_of_another_type_are_refused(tiny_four_bits, tmp_path, tensor, dtype, told):
    folder = Path(shutil.copytree(tiny_four_bits, tmp_path / "model"))
    name = f"language_model.lm_head.{tensor}"
    retype(folder / "model.safetensors", name, dtype)
    with pytest.raises(InputError, match=rf"{name} {told}\); convert the checkpoint again"):
        load(folder)


def test_scales_of_4_bit_floats_are_bytes(tiny_checkpoint, tmp_path):
    convert(tiny_checkpoint, tmp_path / "model", quantization=Quantization(mode="mxfp4"))
    load(tmp_path / "model")
    name = "language_model.lm_head.scales"
    retype(tmp_path / "model" / "model.safetensors", name, "F16")
    with pytest.raises(InputError, match=rf"{name} is float16, expected uint8\)"):
        load(tmp_path / "model")


def test_pickled_weights_are_refused(folder, monkeypatch):
    for file in folder.glob("model*"):
        file.unlink()
    monkeypatch.setattr("avg_mlx.weights.shards.PickledShards.__init__", lambda *_: None)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="holds pickled weights; convert it first: avg-mlx convert --hf-path"):
        load(folder)


def test_a_pytorch_checkpoint_is_to_be_converted_first():
    with pytest.raises(InputError, match=r"PyTorch checkpoint.*convert it first: avg-mlx convert"):
        load(CHECKPOINT)


def test_a_file_is_not_a_folder(folder):
    with pytest.raises(InputError, match=r"config\.json is a file; give the model's folder"):
        load(folder / "config.json")


@pytest.mark.parametrize("path", ["absent", "./absent/model", "/absent/model", "a/b/c", "../absent"])
def test_an_absent_folder_is_not_asked_of_the_hub(path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(InputError, match=f"no folder {path}; give a folder, a Hub repository"):
        load(path)


def test_a_hub_repository_is_downloaded(tiny_folder, monkeypatch):
    asked = {}

    def snapshot_download(repo, **options):
        asked[repo] = options
        return str(tiny_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert find_folder("owner/name", "v2", ["*.json"]) == tiny_folder
    assert asked == {"owner/name": {"revision": "v2", "allow_patterns": ["*.json"]}}


def test_a_folder_wins_over_a_hub_repository(folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    monkeypatch.chdir(folder.parent.parent)
    assert find_folder(f"{folder.parent.name}/model") == Path(folder.parent.name, "model")


def test_a_hub_that_fails_is_no_fault_of_the_input(monkeypatch):
    def snapshot_download(repo, **options):
        raise ConnectionError("no route to host\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(AvgMlxError, match=r"owner/name.*the Hub .*\(no route to host\)") as error:
        load("owner/name")
    assert error.value.exit_status == 1


@pytest.mark.parametrize(("eos", "ids"), [(2, {2}), ([2, 7], {2, 7}), (None, {2})])
def test_answers_end_at_the_configs_tokens(folder, eos, ids):
    assert set(load_tokenizer(folder, {"eos_token_id": eos}).eos_token_ids) == ids
