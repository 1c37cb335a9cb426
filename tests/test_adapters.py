"""Adapters: they go back into the model they were trained on, and into no other."""

import json
import shutil
import struct
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import make_adapters, write_checkpoint

from avg_mlx import InputError, convert, load
from avg_mlx.model.inventory import fingerprint, tensors_of
from avg_mlx.weights.adapters import AdapterConfig, load_adapters, save_adapters

KINDS = ("lora", "dora", "full", "router")


@pytest.fixture(scope="session")
def adapters_of(tiny_folder, tmp_path_factory) -> dict[str, Path]:
    """Adapters of every kind for the tiny model."""
    home = tmp_path_factory.mktemp("adapters")
    return {kind: make_adapters(tiny_folder, home / kind, kind) for kind in KINDS}


@pytest.fixture
def adapters(adapters_of, tmp_path) -> Path:
    """A copy of the LoRA adapters, to be spoiled."""
    return Path(shutil.copytree(adapters_of["lora"], tmp_path / "adapters"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_saved_comes_back(kind, adapters_of, tiny_folder):
    model, _ = load(tiny_folder, adapter_path=adapters_of[kind])
    ours, saved = tensors_of(model), mx.load(str(adapters_of[kind] / "adapters.safetensors"))
    assert saved.keys() <= ours.keys()
    assert all(mx.array_equal(ours[name], array) for name, array in saved.items())
    assert not model.training


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_other_weights_are_refused(kind, adapters_of, own_tiny):
    model, _ = own_tiny
    model.language_model.model.norm.weight = model.language_model.model.norm.weight + 1e-3
    before = dict(tensors_of(model))
    with pytest.raises(InputError, match=f"{kind} was trained on another model; give --model as in training"):
        load_adapters(model, adapters_of[kind])
    assert all(mx.array_equal(array, before[name]) for name, array in tensors_of(model).items())


@pytest.mark.parametrize(
    "changes",
    [{"num_hidden_layers": 3}, {"intermediate_size": 64}, {"hidden_size": 32}, {"vocab_size": 600}],
    ids=str,
)
def test_adapters_of_another_architecture_are_refused(changes, adapters_of, tmp_path):
    write_checkpoint(tmp_path / "checkpoint", changes)
    convert(tmp_path / "checkpoint", tmp_path / "model")
    with pytest.raises(InputError, match="was trained on another model"):
        load(tmp_path / "model", adapter_path=adapters_of["lora"])


def test_adapters_of_the_quantized_model_are_not_the_plain_ones(adapters_of, tiny_four_bits):
    with pytest.raises(InputError, match="was trained on another model"):
        load(tiny_four_bits, adapter_path=adapters_of["lora"])


def test_no_folder(tiny_folder, tmp_path):
    with pytest.raises(InputError, match=r"no adapter folder .*absent; give the folder that training wrote"):
        load(tiny_folder, adapter_path=tmp_path / "absent")


def change_config(**changes):
    def spoil(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return spoil


def drop_key(folder: Path) -> None:
    file = folder / "adapter_config.json"
    keys = json.loads(file.read_text())
    del keys["num_layers"]
    file.write_text(json.dumps(keys))


def truncate(folder: Path) -> None:
    file = folder / "adapters.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def change_tensors(change):
    def spoil(folder: Path) -> None:
        file = str(folder / "adapters.safetensors")
        tensors = mx.load(file)
        mx.eval(tensors)
        change(tensors)
        mx.save_safetensors(file, tensors)

    return spoil


def change_lora(**changes):
    return change_config(lora_parameters={"rank": 2, "scale": 2.0, "dropout": 0.0} | changes)


def write_header(header: bytes, length: int | None = None):
    length = len(header) if length is None else length
    return lambda folder: (folder / "adapters.safetensors").write_bytes(struct.pack("<Q", length) + header)


SOME = "language_model.model.layers.0.self_attn.q_proj.lora_a"
DAMAGE = {
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "lacks adapter_config.json or"),
    "config is not JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json"),
    "config is a list": (lambda folder: (folder / "adapter_config.json").write_text("[]"), "holds a list"),
    "config lacks a key": (drop_key, "does not hold adapters that avg-mlx wrote .*num_layers"),
    "unknown type": (change_config(fine_tune_type="prefix"), "fine_tune_type is 'prefix'"),
    "layers are text": (change_config(num_layers="all"), "describes no adapters"),
    "no rank": (change_config(lora_parameters={"scale": 1.0, "dropout": 0.0}), "describes no adapters"),
    "rank is text": (change_config(lora_parameters={"rank": "2", "scale": 1.0, "dropout": 0}), "describes no adapters"),
    "no parameters": (change_config(lora_parameters=None), "describes no adapters"),
    "no weights": (lambda folder: (folder / "adapters.safetensors").unlink(), "lacks .*adapters.safetensors; give"),
    "weights are cut": (truncate, "does not hold adapters"),
    "weights are text": (
        lambda folder: (folder / "adapters.safetensors").write_text("hello"),
        "does not hold adapters",
    ),
    "scale is text": (change_lora(scale="2"), "scale is '2'.*expected a number"),
    "scale is nothing": (change_lora(scale=None), "scale is None.*expected a number"),
    "scale is enormous": (change_lora(scale=10**30), "scale is 1000.*expected a number within 1,000,000"),
    "rank of a billion": (change_lora(rank=10**9), "rank is 1000000000.*expected a whole number"),
    "keys are text": (change_lora(keys="q_proj"), "keys is 'q_proj'.*expected a list"),
    "deep config": (lambda folder: (folder / "adapter_config.json").write_text('{"a":' + "[" * 10**5), "levels deep"),
    "endless header": (write_header(b"", 1 << 62), "a header of 4611686018427387904 bytes"),
    "deep header": (write_header(b'{"a":' + b"[" * 10**6), "does not hold adapters"),
    "half a character": (write_header(b'{"\\ud800": {}}'), "does not hold adapters"),
    "a number of 5,000 digits": (write_header(b'{"a": {"shape": [' + b"9" * 5000 + b"]}}"), "does not hold adapters"),
    "tensors beyond the file": (
        write_header(b'{"a": {"dtype": "F32", "shape": [1073741824], "data_offsets": [0, 4294967296]}}'),
        "does not hold adapters",
    ),
    "another rank": (change_config(lora_parameters={"rank": 3, "scale": 1.0, "dropout": 0.0}), f"do not fit.*{SOME}"),
    "fewer layers": (change_config(num_layers=1), f"do not fit the model: .*{SOME}"),
    "a strange tensor": (change_tensors(lambda t: t.update({"strange": mx.zeros(1)})), "do not fit the model: strange"),
    "a missing tensor": (change_tensors(lambda t: t.pop(SOME)), f"lacks.*{SOME}"),
    "a misshapen tensor": (
        change_tensors(lambda t: t.update({SOME: mx.zeros((1, 1))})),
        f"do not fit the model: {SOME}",
    ),
    "integers": (
        change_tensors(lambda t: t.update({SOME: t[SOME].astype(mx.int64)})),
        rf"1 of the tensors of .* {SOME} is int64, expected float32\); train them again",
    ),
    "complex numbers": (
        change_tensors(lambda t: t.update({SOME: t[SOME].astype(mx.complex64)})),
        f"{SOME} is complex64, expected float32",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_adapters_are_one_clear_error(damage, adapters, own_tiny):
    spoil, told = DAMAGE[damage]
    spoil(adapters)
    with pytest.raises(InputError, match=told) as caught:
        load_adapters(own_tiny[0], adapters)
    assert str(adapters) in str(caught.value)


def test_a_router_in_part_is_refused(adapters_of, own_tiny, tmp_path):
    folder = shutil.copytree(adapters_of["router"], tmp_path / "adapters")
    change_tensors(lambda tensors: tensors.pop("router.scorer.linear1.weight"))(folder)
    with pytest.raises(InputError, match=r"lacks.*router\.scorer\.linear1\.weight"):
        load_adapters(own_tiny[0], folder)


def test_fingerprint_ignores_the_router(tiny, tiny_stage3, own_tiny):
    model, _ = own_tiny
    model.router.voter = model.router.voter + 1
    assert fingerprint(model) == fingerprint(tiny[0]) == fingerprint(load(tiny_stage3)[0])


def test_fingerprint_sees_every_tensor_change(own_tiny):
    model, _ = own_tiny
    seen = {fingerprint(model)}
    names = [name for name in tensors_of(model) if not name.startswith("router.")]
    for name in names:
        model.load_weights([(name, tensors_of(model)[name] + 1e-3)], strict=False)
        seen.add(fingerprint(model))
    assert len(seen) == len(names) + 1


def test_fingerprint_sees_type_and_quantization(tiny, own_tiny, tiny_four_bits):
    model, _ = own_tiny
    model.set_dtype(mx.bfloat16)
    assert len({fingerprint(model), fingerprint(tiny[0]), fingerprint(load(tiny_four_bits)[0])}) == 3


@pytest.mark.parametrize("fails", ["mlx.core.save_safetensors", "avg_mlx.weights.adapters.write_json"])
@pytest.mark.parametrize("exists", [False, True])
def test_saving_is_all_or_nothing(exists, fails, tmp_path, monkeypatch):
    folder = tmp_path / "adapters"
    if exists:
        save_adapters(folder, AdapterConfig(base_model="before"), {"a": mx.zeros(3)})
    before = {file.name: file.read_bytes() for file in folder.glob("[!.]*")}

    def fail(*args, **kwargs):
        Path(args[0]).write_bytes(b"half")
        raise OSError("no room")

    monkeypatch.setattr(fails, fail)
    with pytest.raises(OSError, match="no room"):
        save_adapters(folder, AdapterConfig(base_model="after"), {"a": mx.ones(3)})
    assert {file.name: file.read_bytes() for file in folder.glob("[!.]*")} == before
    monkeypatch.undo()
    save_adapters(folder, AdapterConfig(base_model="after"), {"a": mx.ones(3)})
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapters.safetensors"]
    assert json.loads((folder / "adapter_config.json").read_text())["base_model"] == "after"
    assert mx.array_equal(mx.load(str(folder / "adapters.safetensors"))["a"], mx.ones(3))
