"""Model folders from strangers are refused before they take memory, and nothing outside of them is read."""

import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import CHECKPOINT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from avg_mlx import InputError, convert, load
from avg_mlx.errors import LONGEST
from avg_mlx.weights.checkpoint import build_model, load_model
from avg_mlx.weights.shards import open_shards

INDEX = "model.safetensors.index.json"


def change(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusal(folder: Path) -> str:
    """What loading or converting the folder is told."""
    with pytest.raises(InputError) as error:
        load(folder) if (folder / "tokenizer.json").exists() else convert(folder, folder.parent / "out")
    assert not (folder.parent / "out").exists()
    assert str(error.value).isprintable()
    assert len(str(error.value)) <= LONGEST + 1  # it may list all tensors
    return str(error.value)


# Its config


@pytest.mark.parametrize(
    "keys",
    [
        {"num_hidden_layers": 10**6},
        {"num_hidden_layers": 10**9},
        {"num_attention_heads": 1 << 24},
        {"num_experts": 10**5},
        {"mm_projector_type": "mlp10000000x_gelu"},
        {"image_grid_pinpoints": [[6_400_000 * 336, 336]]},
        {"image_grid_pinpoints": [[336, 336]] * 10**4},
        {"vision_config": {"num_hidden_layers": 10**6}},
        {"vision_config": {"image_mean": [0.5]}},
    ],
    ids=lambda keys: str(keys)[:50],
)
def test_no_model_is_built_of_a_config_out_of_bounds(model_folder, monkeypatch, keys):
    monkeypatch.setattr("avg_mlx.weights.checkpoint.Model", lambda *_: pytest.fail("a model was built"))
    if "vision_config" in keys:
        keys = {
            "vision_config": json.loads((model_folder / "config.json").read_text())["vision_config"]
            | keys["vision_config"]
        }
    change(model_folder / "config.json", **keys)
    refusal(model_folder)


def test_a_model_larger_than_its_files_takes_no_memory(model_folder):
    change(model_folder / "config.json", num_hidden_layers=256, vocab_size=1 << 24, intermediate_size=1 << 24)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    told = refusal(model_folder)
    assert mx.get_peak_memory() - before < 1 << 20
    assert "2277 missing (language_model.model.layers.10." in told
    assert "2177 more" in told
    assert "lm_head.weight is (512, 64), expected (16777216, 64)" in told


@pytest.mark.parametrize(
    "keys",
    [
        {"num_key_value_heads": 3},
        {"num_attention_heads": 3},  # heads of an odd width
        {"num_attention_heads": 1 << 10},  # of no width
        {"rope_scaling": {"type": "dynamic", "factor": "a"}},
        {"rope_scaling": {"type": "linear", "factor": 0}},
        {"rope_scaling": {"type": "longrope"}},
        {"rope_scaling": {"type": "llama3", "factor": None}},
    ],
    ids=str,
)
def test_a_model_that_could_not_run_is_refused(model_folder, keys):
    """Not when the first question is asked: an unloaded model's shapes are inferred."""
    change(model_folder / "config.json", **keys)
    assert refusal(model_folder).startswith("config.json describes no model (")


KEYS = json.loads((CHECKPOINT / "config.json").read_text())
MLX_KEYS = ["head_dim", "layer_types", "quantization", "rope_traditional", "sliding_window"]
STRANGE = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([-1, 0, 1, 2, 3, 64, 10**6, 10**9, 10**30, 1.5, float("inf"), -0.0])
    | st.sampled_from(["", "llama3", "linear", "dynamic", "yarn", "mlp2x_gelu", "[[336, 336]]", "(1, 2)", "x" * 1000]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["type", "factor", "bits", "group_size", "low_freq_factor"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from([*KEYS, *MLX_KEYS]), value=STRANGE)
def test_any_value_of_any_key_is_refused_or_answers(converted, key, value):
    keys = json.loads((converted / "config.json").read_text()) | {key: value}
    try:
        model = load_model(converted, keys)
    except InputError:
        return
    mx.eval(model(model.embed_text([1, 2])[None]))


@settings(max_examples=100)
@given(
    key=st.sampled_from([*json.loads((CHECKPOINT / "clip" / "config.json").read_text()), "image_mean"]), value=STRANGE
)
def test_any_value_of_any_key_of_the_tower_is_refused_or_answers(converted, key, value):
    keys = json.loads((converted / "config.json").read_text())
    keys["vision_config"] |= {key: value}
    try:
        model = load_model(converted, keys)
    except InputError:
        return
    side = model.config.vision.image_size
    mx.eval(model.vision_tower(mx.zeros((1, side, side, 3))))


def test_a_dry_run_computes_nothing(converted):
    keys = json.loads((converted / "config.json").read_text())
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    build_model(keys | {"intermediate_size": 1 << 24}, ())
    assert mx.get_peak_memory() - before < 1 << 20


# Its files


@pytest.mark.parametrize("kind", ["pipe", "device", "sparse"])
@pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_pipes_devices_and_huge_files_are_refused(model_folder, name, kind):
    file = model_folder / name
    file.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        with file.open("wb") as stream:
            stream.truncate(10 << 30)
    with pytest.raises(InputError, match=rf"{name} (is a device or a pipe|has 10240 MB)|there is no tokenizer\.json"):
        load(model_folder)


@pytest.mark.parametrize(
    "name", ["config.json", INDEX, "tokenizer_config.json", "clip/config.json", "clip/preprocessor_config.json"]
)
def test_a_checkpoint_is_not_read_from_a_pipe(checkpoint, name):
    (checkpoint / name).unlink(missing_ok=True)
    os.mkfifo(checkpoint / name)
    assert f"{name} is a device or a pipe" in refusal(checkpoint)


def test_weights_are_not_read_from_a_pipe(model_folder):
    (model_folder / INDEX).unlink()
    os.mkfifo(model_folder / "more.safetensors")
    assert "weights that are not files: more.safetensors" in refusal(model_folder)


@pytest.mark.parametrize("longest", [[], "4096", {}, -1, True])
def test_a_length_of_another_type_in_the_tokenizers_config(model_folder, checkpoint, longest):
    for folder in (model_folder, checkpoint):
        change(folder / "tokenizer_config.json", model_max_length=longest)
        assert f"model_max_length is {longest!r}, expected a number above 0" in refusal(folder)


def test_no_limit_as_transformers_writes_it(model_folder):
    change(model_folder / "tokenizer_config.json", model_max_length=10**30)
    load(model_folder)


# Its weights


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "{outside}", "./model.safetensors", "a/../model.safetensors", "a/"]
)
@pytest.mark.parametrize("index", [INDEX, "pytorch_model.bin.index.json"])
def test_an_index_names_files_beside_it_only(checkpoint, name, index):
    """Also where the file that it names is there."""
    for shard in checkpoint.glob("model-*"):
        shard.rename(checkpoint.parent / "model.safetensors")
    (checkpoint / INDEX).unlink()
    name = name.format(outside=checkpoint.parent / "model.safetensors")
    (checkpoint / index).write_text(json.dumps({"weight_map": {"a": name}}))
    assert f"{index} names files that are not beside it: {name}; " in refusal(checkpoint)


@pytest.mark.parametrize("name", ["", ".", "..", "a\0b", "x" * 5000])
def test_an_index_of_impossible_names(model_folder, name):
    (model_folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    assert INDEX in refusal(model_folder)


def test_links_within_the_hubs_cache_are_followed(model_folder):
    """A snapshot's files are links to blobs beside the folder of snapshots."""
    blobs = model_folder.parent / "blobs"
    blobs.mkdir()
    for file in list(model_folder.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(Path("..") / "blobs" / file.name)
    model, _ = load(model_folder)
    assert model.config.has_router


def test_two_files_of_the_same_tensors_are_named(model_folder):
    (model_folder / INDEX).unlink()
    shutil.copy(model_folder / "model.safetensors", model_folder / "copy.safetensors")
    told = refusal(model_folder)
    assert f"{model_folder}/copy.safetensors and {model_folder}/model.safetensors both hold image_newline, " in told
    assert "remove one of the files" in told


def test_two_pickled_files_of_the_same_tensors_are_named(tmp_path):
    torch = pytest.importorskip("torch")
    for name in ("pytorch_model-1.bin", "pytorch_model-2.bin"):
        torch.save({"a": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(InputError, match=r"model-1\.bin and .*model-2\.bin both hold a; remove one"):
        open_shards(tmp_path)


def test_a_header_of_a_million_tensors_is_not_parsed(model_folder):
    header = json.dumps(
        {f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(10**5)}
    ).encode()
    length = np.array([len(header)], "<u8").tobytes()
    (model_folder / "model.safetensors").write_bytes(length + header)
    assert f"model.safetensors is truncated or damaged (a header of {len(header)} bytes)" in refusal(model_folder)
