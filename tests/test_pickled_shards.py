"""Checkpoints in `pytorch_model*.bin`. They need PyTorch: pip install 'avg-mlx[torch]'."""

import json
import os
import pickle
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import CHECKPOINT

from avg_mlx import InputError, convert, generate, load
from avg_mlx.model.inventory import tensors_of

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


@pytest.mark.parametrize("content", [[1, 2], {"model": {"image_newline": 1}}, {"step": 3}], ids=str)
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
