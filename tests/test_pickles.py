"""Pickled weight files are looked through before PyTorch sees them: none of this needs PyTorch."""

import pickle
import sys
import zipfile
from types import SimpleNamespace

import pytest
from conftest import write_pickle

from avg_mlx import AvgMlxError, InputError
from avg_mlx.weights.pickles import PICKLE_BYTES, PickledShards


@pytest.fixture(autouse=True)
def torch(monkeypatch):
    """A PyTorch that must not be reached."""
    torch = SimpleNamespace(__version__="2.13.0", load=lambda *_, **__: pytest.fail("it was loaded"))
    monkeypatch.setitem(sys.modules, "torch", torch)
    return torch


@pytest.fixture
def file(tmp_path):
    return tmp_path / "pytorch_model.bin"


def refused(file) -> str:
    """The message that refuses a file."""
    with pytest.raises(InputError) as error:
        PickledShards([file])
    assert str(error.value).startswith(f"{file} cannot be read as plain tensors (")
    assert str(error.value).isprintable()
    return str(error.value)


@pytest.mark.parametrize(
    ("asked", "found", "remedy"),
    [
        ("torch._utils _rebuild_sparse_tensor", "a sparse tensor", "tensor.to_dense()"),
        ("torch._utils _rebuild_qtensor", "a quantized tensor", "tensor.dequantize()"),
        ("torch._utils _rebuild_nested_tensor", "a nested tensor", "its parts"),
        ("torch._utils _rebuild_meta_tensor_no_storage", "on the meta device, without data", "with its weights"),
        ("torch._utils _rebuild_wrapper_subclass", "of a subclass", "a plain tensor"),
        ("torch._tensor _rebuild_from_type_v2", "of a subclass", "tensor.as_subclass(torch.Tensor)"),
    ],
)
def test_tensors_of_other_kinds_are_named_with_what_to_save_instead(file, asked, found, remedy):
    write_pickle(file, "torch._utils _rebuild_parameter", asked, name="model.norm.weight")
    line = refused(file)
    assert f"(model.norm.weight is {found}" in line
    assert line.endswith(f"{remedy}, or get it in safetensors form")


@pytest.mark.parametrize(
    "asked",
    [
        "os mkdir",
        "builtins eval",
        "builtins bytearray",
        "collections Counter",
        "torch Tensor",
        "torch load",
        "torch.nn x",
    ],
)
def test_whatever_else_a_pickle_asks_for_is_refused(file, asked):
    write_pickle(file, asked)
    assert f"it asks for {asked.replace(' ', '.')}, which no dense tensor needs" in refused(file)


@pytest.mark.parametrize(
    "asked",
    [
        "collections OrderedDict",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_tensor_v3",
        "torch._utils _rebuild_parameter",
        "torch._utils _rebuild_parameter_with_state",
        "torch BFloat16Storage",
        "torch.storage UntypedStorage",
        "torch float8_e4m3fn",
        "torch bool",
    ],
)
def test_what_dense_tensors_need_is_left_to_pytorch(file, asked, monkeypatch):
    write_pickle(file, asked)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(AvgMlxError, match=r"need PyTorch to read them; pip install 'avg-mlx\[torch\]'"):
        PickledShards([file])


def test_what_is_compressed_is_not_unpacked(file):
    """PyTorch would unpack 2 GB of a 2 MB file."""
    write_pickle(file, name="x" * 10**6, compression=zipfile.ZIP_DEFLATED)
    assert "compresses nothing" in refused(file)


def test_a_pickle_beyond_any_model_is_refused(file):
    write_pickle(file, "torch BoolStorage", name="x" * PICKLE_BYTES)
    assert f"{PICKLE_BYTES} at most" in refused(file)


@pytest.mark.parametrize("name", ["archive/data.pkl", "other/data.pkl", "archive/DATA.PKL"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_second_pickle_is_refused(file, name):
    """PyTorch might read the one that was not looked through."""
    write_pickle(file)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(name, b"cos\nmkdir\n.")
    assert "a single data.pkl" in refused(file)


@pytest.mark.parametrize("content", [b"", b"PK", pickle.dumps({}), b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."])
def test_what_is_not_a_whole_archive_is_refused(file, content):
    """The last is how files of PyTorch before 1.6 begin."""
    file.write_bytes(content)
    assert "download it again, or load and save it with a newer PyTorch" in refused(file)


@pytest.mark.parametrize("byte", [30, 50])
def test_a_damaged_archive_is_refused(file, byte):
    """In the name of an entry, and in the pickle."""
    write_pickle(file, "torch BoolStorage")
    content = bytearray(file.read_bytes())
    content[byte] ^= 0xFF
    file.write_bytes(content)
    refused(file)


def test_an_archive_without_a_pickle_is_refused(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/version", "3\n")
    assert "a single data.pkl" in refused(file)


@pytest.mark.parametrize("version", ["1.13.1", "2.5.1+cu124"])
def test_a_pytorch_that_could_be_made_to_run_code_is_not_used(file, torch, version):
    write_pickle(file)
    torch.__version__ = version
    with pytest.raises(AvgMlxError) as error:
        PickledShards([file])
    assert error.value.exit_status == 1
    assert f"need PyTorch 2.6 or newer, and this is {version}; pip install 'avg-mlx[torch]'" in str(error.value)


@pytest.mark.parametrize("version", ["2.6.0", "2.13.0+cpu", "3.0"])
def test_a_newer_pytorch_is(file, torch, version):
    write_pickle(file)
    torch.__version__ = version
    torch.load = lambda *_, weights_only, **__: {} if weights_only else pytest.fail("code would run")
    assert PickledShards([file]).shapes == {}
