"""Fusing: the written model computes what the model with its adapters computes, and appears whole or not at all."""

import json
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import make_adapters

from avg_mlx import AvgMlxError, InputError, load
from avg_mlx.weights.fusing import fuse

KINDS = ("lora", "dora", "full", "router")


def tensors_in(folder: Path) -> dict[str, mx.array]:
    return {name: array for file in folder.glob("*.safetensors") for name, array in mx.load(str(file)).items()}


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def folders(tiny_folder, tiny_four_bits, tiny_stage3) -> dict[str, Path]:
    return {"plain": tiny_folder, "quantized": tiny_four_bits, "stage3": tiny_stage3}


@pytest.fixture(scope="module")
def adapters_for(folders, tmp_path_factory):
    """`adapters_for(base, kind)`: adapters of a kind for one of `folders`."""
    home = tmp_path_factory.mktemp("adapters")

    def make(base: str, kind: str) -> Path:
        folder = home / f"{base}-{kind}"
        return folder if folder.exists() else make_adapters(folders[base], folder, kind)

    return make


def outputs(model) -> list[mx.array]:
    """What the language model, the projector, the newline and the router make of the same random input."""
    config, random = model.config, mx.random.key(0)
    features = model.projector(mx.random.normal((3, 16, config.vision.hidden_size), key=random))
    text = model.embed_text(range(20))
    results = [model(text[None]), features, model.image_newline]
    return results + ([model.route(features, text)] if config.has_router else [])


def same(ours, theirs, tolerance: float = 1e-4) -> bool:
    return len(ours) == len(theirs) and all(
        mx.abs(a - b).max().item() <= tolerance * mx.abs(b).max().item() for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize(
    ("base", "kind", "dequantize"),
    [
        *(("plain", kind, False) for kind in KINDS),
        ("plain", "lora", True),
        ("stage3", "lora", False),
        ("stage3", "router", False),
        *(("quantized", kind, True) for kind in ("lora", "dora", "router")),
        ("quantized", "router", False),
    ],
)
def test_fused_computes_what_unfused_does(base, kind, dequantize, folders, adapters_for, tmp_path):
    adapters = adapters_for(base, kind)
    fuse(folders[base], adapters, tmp_path / "fused", dequantize=dequantize)
    plain, unfused, fused = (
        load(folders[base])[0],
        load(folders[base], adapter_path=adapters)[0],
        load(tmp_path / "fused")[0],
    )
    assert same(outputs(fused), outputs(unfused))
    assert not same(outputs(fused), outputs(plain), tolerance=0.05)


def adapted_layers(tensors) -> list[str]:
    """The linear layers of the language model's blocks: those that get adapters."""
    stems = [name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")]
    return [stem for stem in stems if stem.startswith("language_model.")]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_quantized_layers_are_quantized_again(kind, folders, adapters_for, tmp_path):
    base, adapters = folders["quantized"], adapters_for("quantized", kind)
    fuse(base, adapters, tmp_path / "fused")
    fuse(base, adapters, tmp_path / "exact", dequantize=True)
    before, after, exact = (tensors_in(folder) for folder in (base, tmp_path / "fused", tmp_path / "exact"))
    assert {name: array.shape for name, array in after.items()} == {name: array.shape for name, array in before.items()}
    assert config_of(tmp_path / "fused")["quantization"] == config_of(base)["quantization"]
    touched = {f"{name}.weight" for name in adapted_layers(exact)}
    for name in (name for name in before if name.startswith("language_model.") and name.endswith(".weight")):
        stem = name.removesuffix(".weight")
        if name in touched:
            parts = mx.quantize(exact[name], group_size=32, bits=4)
        else:
            parts = [before.get(f"{stem}.{part}") for part in ("weight", "scales", "biases")]
        for part, array in zip(("weight", "scales", "biases"), parts, strict=True):
            assert array is None or mx.array_equal(after[f"{stem}.{part}"], array), name
        assert (name in touched) == (not mx.array_equal(after[name], before[name]))


def test_dequantize_leaves_nothing_quantized(folders, adapters_for, tmp_path):
    parts = fuse(folders["quantized"], adapters_for("quantized", "lora"), tmp_path / "fused", dequantize=True)
    written, plain = tensors_in(tmp_path / "fused"), tensors_in(folders["plain"])
    assert {name: array.shape for name, array in written.items()} == {n: a.shape for n, a in plain.items()}
    assert {array.dtype for array in written.values()} == {mx.float32}
    assert config_of(tmp_path / "fused").keys().isdisjoint({"quantization", "quantization_config"})
    assert sum(part.bytes for part in parts) == sum(array.nbytes for array in written.values())


@pytest.mark.parametrize(
    ("base", "kind", "routes"), [("plain", "lora", True), ("stage3", "lora", False), ("stage3", "router", True)]
)
def test_config_says_whether_there_is_a_router(base, kind, routes, folders, adapters_for, tmp_path):
    fuse(folders[base], adapters_for(base, kind), tmp_path / "fused")
    assert config_of(tmp_path / "fused")["router_select"] is routes
    expected = config_of(folders[base]) | {"router_select": routes}
    assert config_of(tmp_path / "fused") == expected
    assert any(name.startswith("router.") for name in tensors_in(tmp_path / "fused")) is routes
    assert load(tmp_path / "fused")[0].config.has_router is routes


def test_the_rest_of_the_folder_comes_along(folders, adapters_for, tmp_path):
    fuse(folders["plain"], adapters_for("plain", "lora"), tmp_path / "fused")
    before, after = folders["plain"], tmp_path / "fused"
    assert {file.name for file in after.iterdir()} == {file.name for file in before.iterdir()}
    weights = {"README.md", "config.json", "model.safetensors", "model.safetensors.index.json"}
    for file in before.iterdir():
        assert file.name in weights or (after / file.name).read_bytes() == file.read_bytes()


def test_progress_counts_every_byte_once(folders, adapters_for, tmp_path):
    steps = []
    fuse(folders["plain"], adapters_for("plain", "lora"), tmp_path / "fused", progress=lambda *step: steps.append(step))
    size = sum(array.nbytes for array in tensors_in(tmp_path / "fused").values())
    done = [step[0] for step in steps]
    assert {total for _, total in steps} == {size}
    assert done == sorted(set(done))
    assert done[-1] == size


def test_an_existing_save_path_is_refused(folders, adapters_for, tmp_path):
    (tmp_path / "fused").mkdir()
    with pytest.raises(InputError, match="fused exists already; choose another"):
        fuse(folders["plain"], adapters_for("plain", "lora"), tmp_path / "fused")
    assert list((tmp_path / "fused").iterdir()) == []


def test_adapters_of_another_model_leave_nothing(folders, adapters_for, tmp_path):
    with pytest.raises(InputError, match="was trained on another model"):
        fuse(folders["quantized"], adapters_for("plain", "lora"), tmp_path / "fused")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no room")])
def test_interruption_leaves_nothing(error, folders, adapters_for, tmp_path):
    before = {file.name: file.read_bytes() for file in folders["plain"].iterdir()}

    def stop(done, total):
        if done > total / 2:
            raise error

    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else AvgMlxError):
        fuse(folders["plain"], adapters_for("plain", "full"), tmp_path / "fused", progress=stop)
    assert list(tmp_path.iterdir()) == []
    assert {file.name: file.read_bytes() for file in folders["plain"].iterdir()} == before
