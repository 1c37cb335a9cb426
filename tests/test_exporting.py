"""Exporting: the authors' names and shapes again, and converting that gives the same model."""

import functools
import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import CHECKPOINT
from safetensors import safe_open

from avg_mlx import AvgMlxError, InputError, convert
from avg_mlx.weights import exporting
from avg_mlx.weights.exporting import export
from avg_mlx.weights.pytorch import UNUSED


def tensors_in(folder: Path) -> dict[str, mx.array]:
    return {name: array for file in folder.glob("*.safetensors") for name, array in mx.load(str(file)).items()}


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def same_tensors(ours: Path, theirs: Path) -> bool:
    one, other = tensors_in(ours), tensors_in(theirs)
    return one.keys() == other.keys() and all(
        one[name].dtype == array.dtype and mx.array_equal(one[name], array) for name, array in other.items()
    )


@pytest.fixture(scope="module")
def folders(tiny_folder, tiny_four_bits, tiny_stage3, converted) -> dict[str, Path]:
    return {"plain": tiny_folder, "quantized": tiny_four_bits, "stage3": tiny_stage3, "golden": converted}


@pytest.mark.parametrize("base", ["plain", "quantized", "stage3", "golden"])
def test_converting_an_export_gives_the_same_model(base, folders, tmp_path):
    model = folders[base]
    export(model, tmp_path / "exported")
    convert(tmp_path / "exported", tmp_path / "again")
    if base == "quantized":
        convert(model, tmp_path / "dequantized", dequantize=True)
        model = tmp_path / "dequantized"
    assert same_tensors(tmp_path / "again", model)
    for name in ("tokenizer.json", "preprocessor_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (model / name).read_bytes()
    ours, theirs = config_of(tmp_path / "again"), config_of(model)
    ours["vision_config"].pop("model_type", None)
    theirs["vision_config"].pop("model_type", None)
    assert ours.pop("mm_vision_tower") == "vision_tower"
    assert ours == {key: value for key, value in theirs.items() if key != "mm_vision_tower"}


def test_names_and_tensors_are_the_golden_checkpoints(converted, tmp_path):
    export(converted, tmp_path / "exported")
    ours, theirs = tensors_in(tmp_path / "exported"), tensors_in(CHECKPOINT)
    kept = {name for name in theirs if name in ours or not UNUSED.search(name)}
    assert ours.keys() == kept
    assert all(mx.array_equal(array, theirs[name]) for name, array in ours.items())
    left_out = theirs.keys() - kept  # the tower's layer that LLaVA does not run, and what follows it
    assert left_out
    assert all(".post_layernorm." in name or ".encoder.layers." in name for name in left_out)


def test_index_and_format(converted, tmp_path):
    export(converted, tmp_path / "exported")
    tensors = tensors_in(tmp_path / "exported")
    index = json.loads((tmp_path / "exported" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(array.nbytes for array in tensors.values())}
    assert index["weight_map"].keys() == tensors.keys()
    for file in set(index["weight_map"].values()):
        with safe_open(tmp_path / "exported" / file, "numpy") as shard:
            assert set(shard.keys()) == {name for name, place in index["weight_map"].items() if place == file}
            assert shard.metadata() == {"format": "pt"}  # transformers asks for it


def test_an_unknown_tower_is_written_beside_the_weights(converted, tmp_path):
    export(converted, tmp_path / "exported")
    assert config_of(tmp_path / "exported")["mm_vision_tower"] == "vision_tower"
    assert "vision_config" not in config_of(tmp_path / "exported")
    tower = config_of(tmp_path / "exported" / "vision_tower")
    assert tower["model_type"] == "clip_vision_model"
    assert tower == tower | config_of(converted)["vision_config"]
    processor = json.loads((tmp_path / "exported" / "vision_tower" / "preprocessor_config.json").read_text())
    assert processor["size"] == {"shortest_edge": tower["image_size"]}


def test_a_known_tower_is_only_named(tiny_folder, tmp_path, monkeypatch):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    name = "openai/clip-vit-large-patch14-336"
    keys = config_of(model) | {"mm_vision_tower": name}
    (model / "config.json").write_text(json.dumps(keys))
    for module in ("avg_mlx.weights.exporting", "avg_mlx.weights.source"):
        monkeypatch.setattr(f"{module}.KNOWN_TOWERS", {name: keys["vision_config"]})
    export(model, tmp_path / "exported")
    assert not (tmp_path / "exported" / "vision_tower").exists()
    assert config_of(tmp_path / "exported")["mm_vision_tower"] == name
    convert(tmp_path / "exported", tmp_path / "again")
    assert same_tensors(tmp_path / "again", model)


def test_shards_may_split_what_the_router_stacks(tiny_folder, tmp_path, monkeypatch):
    write_folder = exporting.write_folder
    monkeypatch.setattr(exporting, "write_folder", functools.partial(write_folder, shard_bytes=30_000))
    export(tiny_folder, tmp_path / "exported")
    assert len(list((tmp_path / "exported").glob("*.safetensors"))) > 5
    convert(tmp_path / "exported", tmp_path / "again")
    assert same_tensors(tmp_path / "again", tiny_folder)


def test_progress_ends_at_the_whole(tiny_four_bits, tmp_path):
    steps = []
    export(tiny_four_bits, tmp_path / "exported", progress=lambda *step: steps.append(step))
    size = sum(array.nbytes for array in tensors_in(tmp_path / "exported").values())
    assert steps[-1] == (size, size)
    assert steps == sorted(set(steps))


def test_a_checkpoint_of_the_authors_is_refused(tmp_path):
    with pytest.raises(InputError, match="is in PyTorch's layout already; give a converted folder"):
        export(CHECKPOINT, tmp_path / "exported")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_save_path_is_refused(tiny_folder, tmp_path):
    (tmp_path / "exported").write_text("mine")
    with pytest.raises(InputError, match="exported exists already; choose another"):
        export(tiny_folder, tmp_path / "exported")
    assert (tmp_path / "exported").read_text() == "mine"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no room")])
def test_interruption_leaves_nothing(error, tiny_folder, tmp_path):
    def stop(done, total):
        if done > total / 2:
            raise error

    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else AvgMlxError):
        export(tiny_folder, tmp_path / "exported", progress=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_progress_counts_the_bytes_that_are_written(dtype, tiny_checkpoint, tmp_path):
    convert(tiny_checkpoint, tmp_path / "model", dtype=dtype)
    steps = []
    export(tmp_path / "model", tmp_path / "exported", progress=lambda done, total: steps.append((done, total)))
    written = sum(array.nbytes for array in tensors_in(tmp_path / "exported").values())
    assert steps[-1] == (written, written)
