"""The authors' layout: every name and shape of the golden checkpoint, and shards wherever they lie."""

import json
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import CHECKPOINT, write_checkpoint, write_pickle
from safetensors.numpy import load_file, save_file

from avg_mlx import AvgMlxError, InputError, convert, load
from avg_mlx.model.inventory import shapes_of, tensors_of
from avg_mlx.weights.pytorch import AUTHORS_LAYOUT, TOWER, Origin
from avg_mlx.weights.shards import SafetensorsShards, open_shards
from avg_mlx.weights.source import open_source

WEIGHT_MAP = json.loads((CHECKPOINT / "model.safetensors.index.json").read_text())["weight_map"]
INDEX = {name: CHECKPOINT / file for name, file in WEIGHT_MAP.items()}
STACKED = "model.router.merger.self_attn.in_proj_"
UNUSED = {  # the tower's last layer, after the one that LLaVA reads
    name for name in WEIGHT_MAP if ".encoder.layers.3." in name or ".post_layernorm." in name
}


@pytest.fixture(scope="module")
def golden():
    """{name: array} of the golden checkpoint, as its files have them."""
    return {name: array for file in sorted(set(INDEX.values())) for name, array in load_file(file).items()}


def test_every_golden_tensor_has_one_use_and_stacked_ones_three(model):
    uses: dict[str, list] = {}
    for name in shapes_of(model):
        uses.setdefault(AUTHORS_LAYOUT.origin(name).name, []).append(AUTHORS_LAYOUT.origin(name).part)
    assert uses.keys() == WEIGHT_MAP.keys() - UNUSED
    assert all(parts == [0, 1, 2] if name.startswith(STACKED) else parts == [None] for name, parts in uses.items())


def test_every_golden_tensor_has_the_shape_that_is_expected(model, golden):
    for name, shape in shapes_of(model).items():
        assert AUTHORS_LAYOUT.origin(name).shape(shape) == golden[AUTHORS_LAYOUT.origin(name).name].shape


def test_every_golden_tensor_is_found_again(model, golden):
    ours = {name: np.array(array) for name, array in tensors_of(model).items()}
    for name, array in golden.items():
        if name.startswith(STACKED):
            kind = name.removeprefix(STACKED)
            parts = [f"router.crop_mixer.attention.{part}_proj.{kind}" for part in ("query", "key", "value")]
            assert np.array_equal(np.concatenate([ours.pop(part) for part in parts]), array)
        elif name.endswith("patch_embedding.weight"):
            assert np.array_equal(ours.pop("vision_tower.patch_embedding.weight").transpose(0, 3, 1, 2), array)
        elif name not in UNUSED:
            (mine,) = (ours_name for ours_name in ours if AUTHORS_LAYOUT.origin(ours_name).name == name)
            assert np.array_equal(ours.pop(mine), array)
    assert not ours


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("image_newline", "model.image_newline"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("language_model.model.layers.11.self_attn.q_proj.weight", "model.layers.11.self_attn.q_proj.weight"),
        ("projector.layers.0.bias", "model.mm_projector.0.bias"),
        ("projector.layers.1.weight", "model.mm_projector.2.weight"),
        ("projector.layers.2.weight", "model.mm_projector.4.weight"),
        ("router.crop_mixer.attention.out_proj.bias", "model.router.merger.self_attn.out_proj.bias"),
        ("router.crop_mixer.attention.key_proj.bias", "model.router.merger.self_attn.in_proj_bias"),
        ("router.crop_mixer.linear1.weight", "model.router.merger.linear1.weight"),
        ("router.scorer.linear1.weight", "model.router.router.0.weight"),
        ("router.scorer.linear2.bias", "model.router.router.2.bias"),
        ("router.voter", "model.router.voter"),
        ("router.logit_norm.weight", "model.router.norm.weight"),
        ("vision_tower.class_embedding", f"{TOWER}vision_model.embeddings.class_embedding"),
        ("vision_tower.position_embedding", f"{TOWER}vision_model.embeddings.position_embedding.weight"),
        ("vision_tower.pre_layernorm.bias", f"{TOWER}vision_model.pre_layrnorm.bias"),
        (
            "vision_tower.layers.22.attention.query_proj.bias",
            f"{TOWER}vision_model.encoder.layers.22.self_attn.q_proj.bias",
        ),
        (
            "vision_tower.layers.1.attention.out_proj.bias",
            f"{TOWER}vision_model.encoder.layers.1.self_attn.out_proj.bias",
        ),
        ("vision_tower.layers.0.layer_norm1.weight", f"{TOWER}vision_model.encoder.layers.0.layer_norm1.weight"),
        ("vision_tower.layers.0.fc2.weight", f"{TOWER}vision_model.encoder.layers.0.mlp.fc2.weight"),
    ],
)
def test_names(ours, theirs):
    assert AUTHORS_LAYOUT.origin(ours).name == theirs


@pytest.mark.parametrize(
    ("place", "there", "shape"),
    [
        (Origin("plain"), (5, 7), (5, 7)),
        (Origin("stacked", part=0), (9, 4), (3, 4)),
        (Origin("stacked bias", part=2), (9,), (3,)),
        (Origin("convolution", convolution=True), (8, 3, 2, 5), (8, 2, 5, 3)),
    ],
)
def test_take_gives_the_shape_whose_origin_has_the_files_shape(place, there, shape):
    assert place.take(mx.zeros(there)).shape == shape
    assert place.shape(shape) == there


def test_take_cuts_query_key_and_value_in_turn():
    stacked = mx.arange(9).reshape(9, 1)
    assert [Origin("", part=part).take(stacked)[:, 0].tolist() for part in range(3)] == [
        [0, 1, 2],
        [3, 4, 5],
        [6, 7, 8],
    ]


@pytest.mark.parametrize("place", [Origin("plain"), Origin("convolution", convolution=True)])
def test_give_undoes_take(place):
    there = mx.random.normal((4, 3, 2, 5))
    assert mx.array_equal(place.give(place.take(there)), there)


def equal_models(folder: Path, other: Path) -> bool:
    ours, theirs = (tensors_of(load(f)[0]) for f in (folder, other))
    return ours.keys() == theirs.keys() and all(mx.array_equal(ours[name], theirs[name]) for name in ours)


def test_shards_without_an_index_are_found(checkpoint, converted, tmp_path):
    (checkpoint / "model.safetensors.index.json").unlink()
    convert(checkpoint, tmp_path / "model")
    assert equal_models(tmp_path / "model", converted)


def test_files_that_the_index_does_not_name_are_left_alone(checkpoint):
    save_file({"stray": np.zeros(1)}, checkpoint / "stray.safetensors")
    assert "stray" not in open_shards(checkpoint).shapes
    (checkpoint / "model.safetensors.index.json").unlink()
    assert "stray" in open_shards(checkpoint).shapes


def test_safetensors_win_over_pickles(checkpoint):
    (checkpoint / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert isinstance(open_shards(checkpoint), SafetensorsShards)


def test_shards_know_shapes_and_read_one_tensor(golden):
    shards = open_shards(CHECKPOINT)
    assert shards.shapes == {name: array.shape for name, array in golden.items()}
    assert np.array_equal(np.array(shards.read("model.router.voter")), golden["model.router.voter"])


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"has no weights; expected \*\.safetensors or pytorch_model\*\.bin"):
        open_shards(tmp_path)


@pytest.mark.parametrize("index", ["{}", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "not JSON"])
def test_a_damaged_index_is_refused(checkpoint, index):
    (checkpoint / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json"):
        open_shards(checkpoint)


def test_all_absent_files_of_an_index_are_listed(checkpoint):
    for file in checkpoint.glob("*.safetensors"):
        file.unlink()
    absent = "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors"
    with pytest.raises(InputError, match=f"names absent files: {absent}; download them into"):
        open_shards(checkpoint)


@pytest.mark.parametrize("keep", [0, 7, 1000, -1])
def test_a_truncated_shard_is_refused(checkpoint, keep):
    file = checkpoint / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"model-00002-of-00002\.safetensors is truncated or damaged"):
        open_shards(checkpoint)


def test_pickles_without_pytorch_say_what_to_install(checkpoint, monkeypatch):
    for file in checkpoint.glob("model*"):
        file.unlink()
    write_pickle(checkpoint / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(AvgMlxError, match=r"need PyTorch.*pip install 'avg-mlx\[torch\]'") as error:
        convert(checkpoint, checkpoint / "model")
    assert error.value.exit_status == 1


def without_tower(checkpoint: Path) -> dict[str, np.ndarray]:
    """Take the tower's tensors out of a single-file checkpoint; returns them by CLIP's own names."""
    tensors = load_file(checkpoint / "model.safetensors")
    save_file({n: a for n, a in tensors.items() if not n.startswith(TOWER)}, checkpoint / "model.safetensors")
    return {n.removeprefix(TOWER): a for n, a in tensors.items() if n.startswith(TOWER)}


TEXT_TOWER = {
    "text_model.embeddings.token_embedding.weight": np.zeros((3, 2), np.float32),
    "text_model.final_layer_norm.weight": np.zeros(2, np.float32),
    "visual_projection.weight": np.zeros((2, 2), np.float32),
    "text_projection.weight": np.zeros((2, 2), np.float32),
    "logit_scale": np.zeros((), np.float32),
}
LEFTOVERS = {
    "vision_model.embeddings.position_ids": np.arange(17)[None],
    "vision_model.post_layernorm.weight": np.ones(32, np.float32),
    "vision_model.encoder.layers.2.layer_norm1.weight": np.ones(32, np.float32),
}


@pytest.mark.parametrize("extra", [{}, TEXT_TOWER | LEFTOVERS], ids=["vision model", "whole CLIP"])
def test_the_towers_weights_come_from_its_own_folder_where_shards_lack_them(
    tiny_checkpoint, tiny_folder, tmp_path, extra
):
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    save_file(without_tower(checkpoint) | extra, checkpoint / "clip" / "model.safetensors")
    convert(checkpoint, tmp_path / "model")
    assert equal_models(tmp_path / "model", tiny_folder)


def test_the_checkpoints_own_tower_wins(tiny_checkpoint, tiny_folder, tmp_path):
    """The authors tune the tower: the one that CLIP came with is not the same."""
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    tower = {n: a for n, a in load_file(checkpoint / "model.safetensors").items() if n.startswith(TOWER)}
    untuned = {name.removeprefix(TOWER): np.zeros_like(array) for name, array in tower.items()}
    save_file(untuned, checkpoint / "clip" / "model.safetensors")
    convert(checkpoint, tmp_path / "model")
    assert equal_models(tmp_path / "model", tiny_folder)


def test_a_towers_shards_carry_the_checkpoints_names(tmp_path):
    save_file({"vision_model.x": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    shards = open_shards(tmp_path, TOWER)
    assert shards.shapes == {f"{TOWER}vision_model.x": (3,)}
    assert shards.read(f"{TOWER}vision_model.x").tolist() == [1, 1, 1]


def test_a_tower_with_neither_weights_nor_folder_is_refused(tiny_checkpoint, tmp_path):
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    without_tower(checkpoint)
    with pytest.raises(InputError, match=r"clip has no weights"):
        convert(checkpoint, tmp_path / "model")
    shutil.rmtree(checkpoint / "clip")
    with pytest.raises(InputError, match=r"unknown vision tower clip: .*openai/clip-vit-large-patch14-336"):
        convert(checkpoint, tmp_path / "model")


def test_buffers_of_older_checkpoints_are_ignored(tiny_checkpoint, tiny_folder, tmp_path):
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    buffers = {
        f"{TOWER}vision_model.embeddings.position_ids": np.arange(17)[None],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(16, np.float32),
        "model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(16, np.float64),  # MLX has none
    }
    save_file(load_file(checkpoint / "model.safetensors") | buffers, checkpoint / "model.safetensors")
    convert(checkpoint, tmp_path / "model")
    assert equal_models(tmp_path / "model", tiny_folder)


def test_all_tensors_that_do_not_fit_are_listed_at_once(tiny_checkpoint, tmp_path):
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.image_newline"], tensors["lm_head.weight"]
    tensors["model.norm.weight"] = np.ones(7, np.float32)
    tensors["model.surprise"] = np.ones(1, np.float32)
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(InputError) as error:
        convert(checkpoint, tmp_path / "model")
    assert "2 missing (lm_head.weight, model.image_newline)" in str(error.value)
    assert "1 unexpected (model.surprise)" in str(error.value)
    assert "1 misshapen (model.norm.weight is (7,), expected (64,))" in str(error.value)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("statistics", [{}, {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}])
def test_the_towers_config_comes_with_its_pixel_statistics(checkpoint, statistics):
    processor = json.loads((checkpoint / "clip" / "preprocessor_config.json").read_text()) | statistics
    (checkpoint / "clip" / "preprocessor_config.json").write_text(json.dumps(processor))
    keys = open_source(checkpoint).keys["vision_config"]
    assert keys["hidden_size"] == 48
    assert keys["image_mean"] == processor["image_mean"]
    assert keys["image_std"] == processor["image_std"]


def test_the_vision_half_of_a_whole_clip_config_is_taken(checkpoint, converted, tmp_path):
    file = checkpoint / "clip" / "config.json"
    whole = {"model_type": "clip", "text_config": {"hidden_size": 7}, "vision_config": json.loads(file.read_text())}
    file.write_text(json.dumps(whole))
    convert(checkpoint, tmp_path / "model")
    assert equal_models(tmp_path / "model", converted)


def test_another_kind_of_tower_is_refused(checkpoint):
    file = checkpoint / "clip" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "siglip_vision_model"}))
    with pytest.raises(InputError, match=r"vision tower .*clip is a 'siglip_vision_model'; give .* CLIP"):
        open_source(checkpoint)


def test_a_known_tower_needs_no_folder(tmp_path):
    write_checkpoint(tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "config.json"
    known = {"mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    file.write_text(json.dumps(json.loads(file.read_text()) | known))
    keys = open_source(tmp_path / "checkpoint").keys["vision_config"]
    assert (keys["hidden_size"], keys["num_hidden_layers"], keys["image_size"]) == (1024, 24, 336)


@pytest.mark.parametrize("router", [True, False])
def test_the_router_is_where_its_tensors_are(tiny_checkpoint, tmp_path, router):
    """Stage-3 configs say router_select too, or say nothing: the tensors decide."""
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"router_select": not router}))
    if not router:
        tensors = load_file(checkpoint / "model.safetensors")
        kept = {name: array for name, array in tensors.items() if not name.startswith("model.router.")}
        save_file(kept, checkpoint / "model.safetensors")
    assert open_source(checkpoint).keys["router_select"] is router
