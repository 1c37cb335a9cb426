"""Checkpoints in `pytorch_model*.bin`. They need PyTorch: pip install 'avg-mlx[torch]'."""

import json
import os
import pickle
import zipfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import CHECKPOINT

from avg_mlx import InputError, convert, generate, load
from avg_mlx.model.inventory import tensors_of
from avg_mlx.weights.pytorch import TOWER
from avg_mlx.weights.shards import open_shards

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow

FILES = sorted(CHECKPOINT.glob("*.safetensors"))


def pickled(checkpoint: Path, dtype, shards: bool) -> Path:
    """Rewrite a copy of the golden checkpoint with pickled weights."""
    from safetensors.torch import load_file

    weight_map = {}
    whole = {}
    for i, file in enumerate(FILES, 1):
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
        whole |= tensors
        weight_map |= dict.fromkeys(tensors, f"pytorch_model-{i:05d}-of-{len(FILES):05d}.bin")
        if shards:
            torch.save(tensors, checkpoint / f"pytorch_model-{i:05d}-of-{len(FILES):05d}.bin")
    if shards:
        (checkpoint / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(whole, checkpoint / "pytorch_model.bin")
    for file in checkpoint.glob("model*safetensors*"):
        file.unlink()
    set_dtype(checkpoint, str(dtype).removeprefix("torch."))
    return checkpoint


def set_dtype(checkpoint: Path, dtype: str) -> None:
    file = checkpoint / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"torch_dtype": dtype}))


def change_pickle(checkpoint: Path, forms: dict) -> dict:
    """Pickle a copy of the golden checkpoint, some of its tensors in other forms; returns them all."""
    file = pickled(checkpoint, torch.float32, shards=False) / "pytorch_model.bin"
    tensors = torch.load(file, weights_only=True)
    tensors |= {name: form(tensors[name]) for name, form in forms.items()}
    torch.save(tensors, file)
    return tensors


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "two shards"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_pickles_convert_to_the_same_tensors_as_safetensors(checkpoint, tmp_path, dtype, shards):
    convert(pickled(checkpoint, getattr(torch, dtype), shards), tmp_path / "pickled")
    convert(CHECKPOINT, tmp_path / "safetensors", dtype=dtype)
    ours, theirs = (tensors_of(load(tmp_path / name)[0]) for name in ("pickled", "safetensors"))
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert ours[name].dtype == array.dtype == getattr(mx, dtype)
        assert mx.array_equal(ours[name], array)


def test_tensors_that_are_views_are_read_as_they_look(checkpoint, tmp_path):
    """A pickled tensor may be a transposed or sliced view of its storage."""
    pickled(checkpoint, torch.float32, shards=False)
    tensors = torch.load(checkpoint / "pytorch_model.bin", weights_only=True)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T.contiguous().T
    tensors["model.image_newline"] = torch.stack([tensors["model.image_newline"]] * 2, dim=1)[:, 0]
    torch.save(tensors, checkpoint / "pytorch_model.bin")
    convert(checkpoint, tmp_path / "model")
    model, _ = load(tmp_path / "model")
    assert np.array_equal(np.array(model.language_model.lm_head.weight), tensors["lm_head.weight"].numpy())
    assert np.array_equal(np.array(model.image_newline), tensors["model.image_newline"].numpy())


class Tensor(torch.Tensor):
    """A tensor by another name."""


def stored(tensor):
    """Return a parameter with a state of its own."""
    parameter = torch.nn.Parameter(tensor)
    parameter.tag = "tied"
    return parameter


@pytest.mark.parametrize(
    "form",
    [
        torch.nn.Parameter,
        stored,
        lambda tensor: tensor.clone().requires_grad_(),
        lambda tensor: tensor.double(),
        lambda tensor: torch._neg_view(-tensor),
        lambda tensor: torch.cat([tensor, tensor])[: len(tensor)],
        lambda tensor: tensor[:1].expand_as(tensor),
    ],
    ids=[
        "parameter",
        "parameter with a state",
        "with a gradient",
        "float64",
        "negated",
        "part of a storage",
        "expanded",
    ],
)
def test_every_dense_tensor_of_floats_is_read(checkpoint, tmp_path, form):
    tensors = change_pickle(checkpoint, dict.fromkeys(("lm_head.weight", "model.norm.weight"), form))
    convert(checkpoint, tmp_path / "model")
    model, _ = load(tmp_path / "model")
    for name, array in (
        ("lm_head.weight", model.language_model.lm_head.weight),
        ("model.norm.weight", model.language_model.model.norm.weight),
    ):
        assert array.dtype == mx.float32
        assert np.array_equal(np.array(array), tensors[name].detach().resolve_neg().numpy())


def test_tensors_that_share_a_storage_are_read(checkpoint, tmp_path):
    pickled(checkpoint, torch.float32, shards=False)
    tensors = torch.load(checkpoint / "pytorch_model.bin", weights_only=True)
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    pieces = zip(tensors.items(), flat.split([tensor.numel() for tensor in tensors.values()]), strict=True)
    torch.save({name: piece.view(tensor.shape) for (name, tensor), piece in pieces}, checkpoint / "pytorch_model.bin")
    shards = open_shards(checkpoint)
    assert all(np.array_equal(np.array(shards.read(name)), tensor.numpy()) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("form", "found"),
    [
        (lambda tensor: tensor.to(torch.complex64), "complex64"),
        (lambda tensor: tensor.long(), "int64"),
        (lambda tensor: tensor.to(torch.uint16), "uint16"),
        (lambda tensor: tensor.bool(), "bool"),
        (lambda tensor: tensor.to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (lambda tensor: tensor.to(torch.float8_e5m2), "float8_e5m2"),
    ],
)
def test_weights_that_cannot_be_computed_with_are_refused(checkpoint, tmp_path, form, found):
    change_pickle(checkpoint, {"model.norm.weight": form})
    with pytest.raises(
        InputError, match=rf"^1 of the tensors of .* model\.norm\.weight is {found}, expected float16 or "
    ):
        convert(checkpoint, tmp_path / "model")
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(
    ("form", "found"),
    [
        (lambda tensor: tensor.to_sparse(), "a sparse tensor"),
        (lambda tensor: tensor.to_sparse_csr(), "a sparse tensor"),
        (lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), "a quantized tensor"),
        (
            lambda tensor: torch.quantize_per_channel(tensor, torch.ones(512), torch.zeros(512), 0, torch.qint8),
            "a quant",
        ),
        (lambda tensor: tensor.to("meta"), "on the meta device, without data"),
        (lambda tensor: torch.nested.nested_tensor([tensor[0], tensor[1, :2]]), "a nested tensor"),
        (lambda tensor: tensor.as_subclass(Tensor), "of a subclass of Tensor"),
        (lambda tensor: torch.nn.Parameter(tensor.to_sparse()), "a sparse tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_of_other_kinds_are_named(checkpoint, tmp_path, form, found):
    change_pickle(checkpoint, {"lm_head.weight": form})
    with pytest.raises(InputError, match=rf"as plain tensors \(lm_head\.weight is {found}"):
        convert(checkpoint, tmp_path / "model")


def test_integers_that_are_no_weights_are_ignored(checkpoint, tmp_path):
    tensors = change_pickle(checkpoint, {})
    position_ids = f"{TOWER}vision_model.embeddings.position_ids"
    torch.save(tensors | {position_ids: torch.arange(577)[None]}, checkpoint / "pytorch_model.bin")
    convert(checkpoint, tmp_path / "model")


def test_a_file_from_before_pytorch_1_6_is_to_be_saved_again(checkpoint):
    tensors = change_pickle(checkpoint, {})
    torch.save(tensors, checkpoint / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"not a whole archive.*load and save it with a newer PyTorch"):
        open_shards(checkpoint)


def change_entries(archive_file: Path, change) -> None:
    """Replace the content of every entry of an archive by `change(name, content)`."""
    with zipfile.ZipFile(archive_file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(archive_file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, change(name, content))


def test_big_endian_tensors_are_read(checkpoint):
    def swap(name: str, content: bytes) -> bytes:
        if name.endswith("byteorder"):
            return b"big"
        return np.frombuffer(content, np.float32).byteswap().tobytes() if "/data/" in name else content

    tensors = change_pickle(checkpoint, {})
    change_entries(checkpoint / "pytorch_model.bin", swap)
    shards = open_shards(checkpoint)
    assert all(np.array_equal(np.array(shards.read(name)), tensor.numpy()) for name, tensor in tensors.items())


def test_a_tensor_beyond_its_storage_is_refused(checkpoint):
    change_pickle(checkpoint, {"model.norm.weight": lambda _: torch.arange(77.0)})
    many = b"J\xff\xff\xff\x7f"  # 2³¹ - 1 elements, where there are 77
    change_entries(checkpoint / "pytorch_model.bin", lambda _, content: content.replace(b"K\x4d", many))
    with pytest.raises(InputError, match="cannot be read as plain tensors") as error:
        open_shards(checkpoint)
    assert "weights_only" not in str(error.value)  # which PyTorch advises to leave out


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_state_dict_in_something_else_is_refused(checkpoint, key):
    tensors = change_pickle(checkpoint, {})
    torch.save({key: tensors}, checkpoint / "pytorch_model.bin")
    with pytest.raises(
        InputError, match=rf"'{key}' is a dict, expected a tensor\); save a model's state_dict\(\) alone"
    ):
        open_shards(checkpoint)


def test_a_converted_pickle_answers(checkpoint, tmp_path, model, tokenizer):
    convert(pickled(checkpoint, torch.float32, shards=True), tmp_path / "model")
    answers = [generate(*loaded, "Why?", max_tokens=5) for loaded in (load(tmp_path / "model"), (model, tokenizer))]
    assert answers[0].token_ids == answers[1].token_ids


class Touch:
    """Unpickled by a careless reader, it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("form", ["archive", "bare pickle"])
def test_pickled_code_is_refused_and_not_run(checkpoint, tmp_path, form):
    pickled(checkpoint, torch.float32, shards=False)
    content = {"model.image_newline": Touch(tmp_path / "harm")}
    if form == "archive":
        torch.save(content, checkpoint / "pytorch_model.bin")
    else:
        (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=r"pytorch_model\.bin cannot be read as plain tensors") as error:
        convert(checkpoint, tmp_path / "model")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "harm").exists()
    assert not (tmp_path / "model").exists()
    pickle.loads(pickle.dumps(content))
    assert (tmp_path / "harm").exists()  # so much for careless readers


@pytest.mark.parametrize("keep", [0, 100, 0.5, -1])
def test_a_truncated_pickle_is_refused(checkpoint, tmp_path, keep):
    file = pickled(checkpoint, torch.float32, shards=False) / "pytorch_model.bin"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(InputError, match=r"pytorch_model\.bin cannot be read as plain tensors"):
        convert(checkpoint, tmp_path / "model")


@pytest.mark.parametrize("content", [[1, 2], {"step": 3}, {1: 2}], ids=str)
def test_a_pickle_of_something_else_is_refused(checkpoint, tmp_path, content):
    pickled(checkpoint, torch.float32, shards=False)
    torch.save(content, checkpoint / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin cannot be read as plain tensors"):
        convert(checkpoint, tmp_path / "model")


def test_absent_shards_are_listed(checkpoint, tmp_path):
    pickled(checkpoint, torch.float32, shards=True)
    (checkpoint / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(InputError, match=r"names absent files: pytorch_model-00002-of-00002\.bin"):
        convert(checkpoint, tmp_path / "model")
