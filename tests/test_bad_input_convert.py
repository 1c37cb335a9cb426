"""What `convert.py` says to input that it cannot use: one line, an exit status, and nothing left on disk."""

import errno
import json
import os
import re
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import CHECKPOINT, retype, write_pickle

from avg_mlx import InputError, convert
from avg_mlx.cli.convert import main


@pytest.fixture
def parent(tmp_path):
    """The folder below which conversions are to appear."""
    folder = tmp_path / "parent"
    folder.mkdir()
    return folder


@pytest.fixture
def refuse(refused, parent):
    """`refuse(folder, *arguments)`: the line with which its conversion is refused. Nothing may be left."""

    def run(folder, *arguments, status=2) -> str:
        line = refused(main, "--hf-path", folder, "--mlx-path", parent / "new" / "model", *arguments, status=status)
        assert list(parent.iterdir()) == []
        assert line.startswith("convert.py: ")
        return line.removeprefix("convert.py: ")

    return run


@pytest.fixture(scope="session")
def quantized(tmp_path_factory) -> Path:
    """The golden checkpoint, converted to 4 bits."""
    from avg_mlx import Quantization

    folder = tmp_path_factory.mktemp("quantized") / "model"
    convert(CHECKPOINT, folder, quantization=Quantization())
    return folder


def change_keys(file: Path, **changes) -> None:
    """Set keys of a JSON file; None takes one away."""
    keys = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in keys.items() if value is not None}))


def change_tensors(folder: Path, changes: dict[str, mx.array | None]) -> None:
    """Set tensors where they are, or in the first shard; None takes one away."""
    shards = {file: dict(mx.load(str(file))) for file in sorted(folder.glob("*.safetensors"))}
    for name, array in changes.items():
        tensors = next((tensors for tensors in shards.values() if name in tensors), next(iter(shards.values())))
        tensors[name] = array
    for file, tensors in shards.items():
        kept = {name: array for name, array in tensors.items() if array is not None}
        mx.eval(kept)
        file.unlink()
        mx.save_safetensors(str(file), kept)


# The checkpoint's folder


def test_no_such_folder(refuse):
    line = refuse("nowhere")
    assert "no folder nowhere;" in line
    assert "owner/name" in line


def test_hub_that_does_not_answer(refuse, monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    line = refuse("owner/name", "--revision", "v1", status=1)
    assert "no folder owner/name" in line
    assert line.endswith("(no route)")


def test_folder_that_is_no_model(refuse, tmp_path):
    assert refuse(tmp_path).startswith(f"{tmp_path} is not a model folder: it has no config.json; ")
    assert refuse(CHECKPOINT / "config.json").startswith(f"{CHECKPOINT}/config.json is a file; ")


@pytest.mark.parametrize("model_type", ["llama", "paligemma", None, "llava_onevision", "llava_next_video"])
def test_model_of_another_type(refuse, checkpoint, model_type):
    change_keys(checkpoint / "config.json", model_type=model_type, text_config={"model_type": "llama"})
    line = refuse(checkpoint)
    assert line.startswith(f"{checkpoint} is a model of type {model_type!r}; give a LLaVA checkpoint: llava_next, ")
    assert "llava_llama" in line


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"7"])
@pytest.mark.parametrize(
    "name", ["config.json", "clip/config.json", "clip/preprocessor_config.json", "model.safetensors.index.json"]
)
def test_malformed_json(refuse, checkpoint, name, content):
    (checkpoint / name).write_bytes(content)
    line = refuse(checkpoint)
    assert line.startswith(f"{checkpoint / name} ")
    assert re.search(r"is not (valid JSON|UTF-8 text) \(|holds a \w+, expected an object", line)
    assert line.endswith("; download it again")


def test_all_missing_keys_are_listed(refuse, checkpoint):
    change_keys(checkpoint / "config.json", hidden_size=None, max_position_embeddings=None)
    assert refuse(checkpoint).startswith("config.json lacks hidden_size, max_position_embeddings; ")


def test_all_missing_keys_of_the_tower_are_listed(refuse, checkpoint):
    change_keys(checkpoint / "clip" / "config.json", hidden_size=None, patch_size=None)
    assert refuse(checkpoint).startswith("the vision tower's config lacks hidden_size, patch_size; ")


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size"])
@pytest.mark.parametrize("value", ["64", 64.5, [64], {}, True, 0, -1])
def test_value_of_another_type(refuse, checkpoint, key, value):
    change_keys(checkpoint / "config.json", **{key: value})
    line = refuse(checkpoint)
    assert line.startswith(f"config.json is damaged: {key} is {value!r}, expected a whole number above 0")


@pytest.mark.parametrize("keys", [{"vision_config": 5}, {"image_size": "336"}, {"patch_size": 0}])
def test_value_of_another_type_in_the_towers_config(refuse, checkpoint, keys):
    change_keys(checkpoint / "clip" / "config.json", **keys)
    (key, value), *_ = keys.items()
    assert refuse(checkpoint).startswith(f"the vision tower's config is damaged: {key} is {value!r}, expected ")


def test_config_that_mlx_refuses(refuse, checkpoint):
    change_keys(checkpoint / "clip" / "config.json", num_attention_heads=5)
    line = refuse(checkpoint)
    assert line.startswith("config.json describes no model (ValueError: ")
    assert line.endswith("; download it again")


# The vision tower


def test_no_tower_is_named(refuse, checkpoint):
    for value in (None, 5, ["clip"]):
        change_keys(checkpoint / "config.json", mm_vision_tower=value)
        line = refuse(checkpoint)
        assert line.startswith(f"{checkpoint}/config.json has no mm_vision_tower")


def test_unknown_tower(refuse, checkpoint, monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    for name, reason in (
        ("clop", "no folder clop; give"),
        ("/no/such/clip", "no folder /no/such/clip; give"),
        ("owner/clop", "(no route to host)"),
    ):
        change_keys(checkpoint / "config.json", mm_vision_tower=name)
        line = refuse(checkpoint)
        assert line.startswith(f"unknown vision tower {name}: ")
        assert all(words in line for words in (f"not a folder in {checkpoint}", "openai/clip-vit-", reason))


@pytest.mark.parametrize(
    "keys",
    [
        {"model_type": "siglip_vision_model"},
        {"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152}},
    ],
)
def test_tower_of_another_type(refuse, checkpoint, keys):
    change_keys(checkpoint / "clip" / "config.json", **keys)
    line = refuse(checkpoint)
    assert line.startswith(f"the vision tower {checkpoint}/clip is a 'siglip_vision_model'; ")
    assert "CLIP" in line


def test_tower_whose_weights_are_nowhere(refuse, checkpoint):
    for shard in checkpoint.glob("*.safetensors"):
        change_tensors(checkpoint, {name: None for name in mx.load(str(shard)) if "vision_tower" in name})
    assert refuse(checkpoint).startswith(f"{checkpoint}/clip has no weights; expected *.safetensors or ")


# The weights


def test_missing_unexpected_and_misshapen_tensors_are_listed_at_once(refuse, checkpoint):
    attention = "model.router.merger.self_attn.in_proj_bias"
    changes = {
        "lm_head.weight": None,
        "model.norm.weight": None,
        "model.extra": mx.zeros(1),
        "model.embed_tokens.weight": mx.zeros((500, 64)),
        attention: mx.zeros(191),
    }
    change_tensors(checkpoint, changes)
    line = refuse(checkpoint)
    assert line.startswith(f"the tensors of {checkpoint} do not fit its config: ")
    assert "2 missing (lm_head.weight, model.norm.weight); 1 unexpected (model.extra); 2 misshapen (" in line
    assert "model.embed_tokens.weight is (500, 64), expected (512, 64)" in line
    assert f"{attention} is (191,), expected (192,)" in line


def test_missing_tensors_of_a_converted_folder(refuse, model_folder):
    change_tensors(model_folder, {"image_newline": None, "more": mx.zeros(1)})
    line = refuse(model_folder, "--dtype", "float16")
    assert "1 missing (image_newline); 1 unexpected (more); download it again" in line


def test_no_weights(refuse, checkpoint):
    for file in checkpoint.glob("model*.safetensors*"):
        file.unlink()
    assert refuse(checkpoint) == f"{checkpoint} has no weights; expected *.safetensors or pytorch_model*.bin"


@pytest.mark.parametrize("size", [0, 5, 100, 20_000, -1])
def test_truncated_shard(refuse, checkpoint, size):
    file = checkpoint / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    line = refuse(checkpoint)
    assert line.startswith(f"{file} is truncated or damaged (")
    assert line.endswith("; download it again")


def test_index_that_names_absent_files(refuse, checkpoint):
    for file in checkpoint.glob("*.safetensors"):
        file.unlink()
    line = refuse(checkpoint)
    absent = "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors"
    assert line.endswith(f"index.json names absent files: {absent}; download them into {checkpoint}")


def test_index_without_file_names(refuse, checkpoint):
    for weight_map in (None, ["a"], {"lm_head.weight": 1}):
        change_keys(checkpoint / "model.safetensors.index.json", weight_map=weight_map)
        line = refuse(checkpoint)
        assert line.startswith(f"{checkpoint}/model.safetensors.index.json is not an index of shards")
        assert "weight_map" in line


@pytest.mark.parametrize(
    ("dtype", "found"),
    [
        ("C64", "complex64"),
        ("I64", "int64"),
        ("I8", "int8"),
        ("U32", "uint32"),
        ("BOOL", "bool"),
        ("F8_E4M3", "float8_e4m3"),
        ("F8_E5M2", "float8_e5m2"),
        ("F8_E8M0", "float8_e8m0"),
        ("F4", "float4"),
    ],
)
def test_weights_that_cannot_be_computed_with(refuse, checkpoint, dtype, found):
    file = checkpoint / "model-00001-of-00002.safetensors"
    names = sorted(name for name in mx.load(str(file)) if name.endswith("proj.weight"))
    for name in names:
        retype(file, name, dtype)
    line = refuse(checkpoint)
    assert line.startswith(f"{len(names)} of the tensors of {checkpoint} cannot be computed with (the first: ")
    assert any(f"{name} is {found}, expected float16 or bfloat16 or float32 or float64)" in line for name in names)
    assert line.endswith("; get it in float16 or bfloat16 or float32")


@pytest.mark.parametrize("dtype", ["F32", "I32"])
def test_packed_weights_of_another_type(refuse, quantized, tmp_path, dtype):
    folder = Path(shutil.copytree(quantized, tmp_path / "quantized"))
    name = "language_model.lm_head.weight"
    retype(folder / "model.safetensors", name, dtype)
    line = refuse(folder, "--dtype", "float16")
    assert line.startswith(f"1 of the tensors of {folder} cannot be computed with (the first: {name} is ")
    assert line.endswith("32, expected uint32); convert the checkpoint again")


@pytest.mark.parametrize("asked", ["torch._utils _rebuild_sparse_tensor", "os mkdir"])
def test_pickles_of_more_than_dense_tensors(refuse, checkpoint, asked):
    for file in checkpoint.glob("model*.safetensors*"):
        file.unlink()
    write_pickle(checkpoint / "pytorch_model.bin", asked)
    assert refuse(checkpoint).startswith(f"{checkpoint}/pytorch_model.bin cannot be read as plain tensors (")


def test_pickled_shards_without_pytorch(refuse, checkpoint, monkeypatch):
    for file in checkpoint.glob("model*.safetensors*"):
        file.unlink()
    write_pickle(checkpoint / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    line = refuse(checkpoint, status=1)
    assert "PyTorch" in line
    assert "pip install 'avg-mlx[torch]'" in line


# The tokenizer


def test_no_tokenizer(refuse, checkpoint):
    (checkpoint / "tokenizer.model").unlink()
    assert refuse(checkpoint) == f"{checkpoint} has no tokenizer; expected tokenizer.model or tokenizer.json"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"\xff" * 1000, "is not a SentencePiece model ("),
        ((CHECKPOINT / "tokenizer.model").read_bytes()[:4000], "is not a SentencePiece model ("),
        (b"", "is not a byte-fallback BPE model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1000\n", "is not a SentencePiece model ("),
    ],
    ids=["noise", "half", "empty", "pointer to a file"],
)
def test_broken_tokenizer_model(refuse, checkpoint, content, found):
    (checkpoint / "tokenizer.model").write_bytes(content)
    assert refuse(checkpoint).startswith(f"{checkpoint}/tokenizer.model {found}")


@pytest.mark.parametrize("content", ["{", "[]"])
def test_malformed_tokenizer_config(refuse, checkpoint, content):
    (checkpoint / "tokenizer_config.json").write_text(content)
    line = refuse(checkpoint)
    assert line.startswith(f"{checkpoint}/tokenizer_config.json ")
    assert line.endswith("; download it again")


@pytest.mark.parametrize(
    "keys",
    [{"added_tokens_decoder": []}, {"added_tokens_decoder": {"0": {}}}, {"bos_token": "<none>"}, {"bos_token": 7}],
)
def test_tokenizer_config_of_other_types(refuse, checkpoint, keys):
    change_keys(checkpoint / "tokenizer_config.json", **keys)
    line = refuse(checkpoint)
    assert line.startswith(f"the tokenizer of {checkpoint} is damaged (")
    assert line.endswith("; download its files again")


# The disk


def test_too_little_space_is_noticed_before_anything_is_written(refuse, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    monkeypatch.setattr(mx, "save_safetensors", None)
    line = refuse(CHECKPOINT, status=1)
    assert line.endswith("new/model needs 0.00 GB but its disk has 0.00 GB free; make room")


def test_disk_that_fills_up_while_weights_are_written(refuse, monkeypatch):
    def fail(file, *_, **__):
        Path(file).write_bytes(b"half of it")
        raise RuntimeError("[write] Unable to write 1000 bytes to file.")

    monkeypatch.setattr(mx, "save_safetensors", fail)
    line = refuse(CHECKPOINT, status=1)
    assert line.startswith("cannot write into ")
    assert line.endswith("([write] Unable to write 1000 bytes to file.); is the disk full?")


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "tokenizer_config.json", "README.md", "config.json"])
def test_disk_that_fills_up_while_other_files_are_written(refuse, monkeypatch, name):
    write_text = Path.write_text

    def fail(path, *arguments, **options):
        if path.name.endswith(name):  # a partial file, which takes that name when it is complete
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write_text(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", fail)
    line = refuse(CHECKPOINT, status=1)
    assert line.startswith("cannot write ")
    assert line.endswith("new/model (No space left on device); nothing was left there")


def test_output_below_a_file(refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    line = refused(main, "--hf-path", CHECKPOINT, "--mlx-path", tmp_path / "file" / "model", status=1)
    assert line == f"convert.py: cannot write {tmp_path}/file/model (Not a directory); nothing was left there"
    assert (tmp_path / "file").read_text() == "mine"


# The output path


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "dangling link", "link to a folder"])
def test_output_that_exists(refused, tmp_path, monkeypatch, kind):
    output, elsewhere = tmp_path / "mlx_model", tmp_path / "elsewhere"
    elsewhere.mkdir()
    if "link" in kind:
        output.symlink_to(tmp_path / "nothing" if kind == "dangling link" else elsewhere)
    elif kind == "file":
        output.write_text("mine")
    else:
        output.mkdir()
        if kind == "folder":
            (output / "config.json").write_text("mine")
    before = snapshot(tmp_path)
    line = refused(main, "--hf-path", CHECKPOINT, "--mlx-path", output)
    assert line == f"convert.py: {output} exists already; choose another path, or remove it yourself"
    monkeypatch.chdir(tmp_path)
    assert refused(main, "--hf-path", CHECKPOINT).startswith("convert.py: mlx_model exists already; ")
    assert snapshot(tmp_path) == before


def snapshot(folder: Path) -> dict[str, str]:
    """What every path below a folder is or holds."""
    return {
        str(path): os.readlink(path) if path.is_symlink() else path.read_text() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_output_that_appears_during_the_conversion(parent, kind):
    output = parent / "model"

    def someone_else(done, total):
        if not output.exists():
            output.write_text("mine") if kind == "file" else output.mkdir()

    with pytest.raises(InputError, match="model exists already; choose another path"):
        convert(CHECKPOINT, output, progress=someone_else)
    assert snapshot(parent) == {str(output): "mine" if kind == "file" else "folder"}


def test_folders_of_other_conversions_are_left_alone(parent, monkeypatch):
    (parent / ".model.12345.partial").mkdir()
    (parent / ".model.12345.partial" / "1.safetensors").write_text("of another run")
    before = snapshot(parent)
    monkeypatch.setattr(mx, "save_safetensors", None)
    assert main(["--hf-path", str(CHECKPOINT), "--mlx-path", str(parent / "model")]) == 1
    assert snapshot(parent) == before


# Options


BITS, GROUPS = "2, 3, 4, 5, 6, 8", "32, 64, 128"


@pytest.mark.parametrize(
    ("arguments", "choices"),
    [
        ("--q-bits 7", BITS),
        ("--q-bits 0", BITS),
        ("--q-bits -4", BITS),
        ("--q-bits 16", BITS),
        ("--q-group-size 16", GROUPS),
        ("--q-group-size 0", GROUPS),
        ("--q-mode mxfp4 --q-bits 8", "4"),
        ("--q-mode mxfp8 --q-bits 4", "8"),
        ("--q-mode nvfp4 --q-group-size 32", "16"),
        ("--q-vision 7", BITS),
        ("--q-router 1", BITS),
    ],
)
def test_quantization_that_mlx_has_not(refuse, arguments, choices):
    *_, flag, value = arguments.split()
    line = refuse(CHECKPOINT, "-q", *arguments.split())
    assert line.startswith(f"{flag}={value} is not supported")
    assert ("in mode " in line) == (flag in ("--q-bits", "--q-group-size"))
    assert line.endswith(f"; choose from {choices}")


@pytest.mark.parametrize("details", ["--q-bits 4", "--q-mode mxfp4"])
def test_recipe_with_bits_or_mode(refuse, details):
    line = refuse(CHECKPOINT, "-q", "--quant-predicate", "mixed_3_4", *details.split())
    assert line.startswith("--quant-predicate=mixed_3_4 sets its own bits")
    assert line.endswith(f"leave out {details.replace(' ', '=')}")


@pytest.mark.parametrize(
    "details",
    [
        "--q-bits 4",
        "--q-group-size 64",
        "--q-mode affine",
        "--quant-predicate mixed_2_6",
        "--q-vision 8",
        "--q-router 8",
    ],
)
@pytest.mark.parametrize("others", ["", "-d"])
def test_details_of_a_quantization_that_is_not_asked_for(refuse, details, others):
    flag, value = details.split()
    assert refuse(CHECKPOINT, flag, value, *others.split()) == f"{flag} says how to quantize; add -q to quantize"


def test_quantizing_and_dequantizing(refuse):
    assert refuse(CHECKPOINT, "-q", "-d").startswith("quantizing and dequantizing exclude each other; ")


def test_group_size_that_fits_no_layer(refuse):
    line = refuse(CHECKPOINT, "-q", "--q-group-size", 128)
    assert "no layer's width is a multiple of --q-group-size=128; choose a smaller one" in line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("-q --q-bits four", "argument --q-bits: invalid int value: 'four'"),
        ("-q --q-group-size 6.4", "argument --q-group-size: invalid int value: '6.4'"),
        ("-q --q-mode int4", "argument --q-mode: invalid choice: 'int4' (choose from"),
        ("-q --quant-predicate mixed_1_2", "argument --quant-predicate: invalid choice: 'mixed_1_2' (choose from"),
        ("-q --q-vision x", "argument --q-vision: invalid int value: 'x'"),
        ("--dtype int8", "argument --dtype: invalid choice: 'int8' (choose from"),
        ("--dtype", "argument --dtype: expected one argument"),
        ("--colour red", "unrecognized arguments: --colour red"),
    ],
)
def test_malformed_options(refuse, arguments, expected):
    line = refuse(CHECKPOINT, *arguments.split())
    assert line.startswith(expected)
    assert line.endswith("; see convert.py --help")


def test_missing_checkpoint_option(refused):
    expected = "convert.py: the following arguments are required: --hf-path/--model; see convert.py --help"
    assert refused(main) == expected


def test_quantizing_what_is_quantized(refuse, quantized):
    for options in ((), ("--q-bits", 8)):
        line = refuse(quantized, "-q", *options)
        assert line.startswith(f"{quantized} is quantized already; ")
        assert "dequantize" in line


def test_dequantizing_what_is_not_quantized(refuse, converted):
    for folder in (CHECKPOINT, converted):
        assert refuse(folder, "-d").startswith(f"{folder} is not quantized; give a quantized ")


# Everything else


def test_interrupt(refuse, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(mx, "save_safetensors", interrupt)
    assert refuse(CHECKPOINT, status=130) == "interrupted"


def test_unexpected_error(refuse, monkeypatch):
    def fail(*_, **__):
        raise LookupError("out of\nluck")

    monkeypatch.setattr(mx, "save_safetensors", fail)
    assert refuse(CHECKPOINT, status=1) == "unexpected LookupError: out of luck (--verbose tells where)"


def test_verbose_shows_where(capfd, parent):
    status = main(["--hf-path", "nowhere", "--mlx-path", str(parent / "model"), "--verbose"])
    out, err = capfd.readouterr()
    assert (status, out) == (2, "")
    assert "Traceback (most recent call last):" in err.splitlines()
    assert err.splitlines()[-1].startswith("convert.py: there is no folder nowhere; ")


def test_upload_that_fails_leaves_the_converted_folder(capfd, parent, monkeypatch):
    class Hub:
        def create_repo(self, *_, **__):
            raise PermissionError("log in\nfirst")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    output = parent / "model"
    status = main(["--hf-path", str(CHECKPOINT), "--mlx-path", str(output), "--upload-repo", "owner/name"])
    err = capfd.readouterr().err
    assert (status, err.count("\n")) == (1, 1)
    assert err.startswith(f"convert.py: cannot upload to owner/name (log in); {output} is complete")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in output.iterdir()}


def test_checkpoint_is_never_written(refuse, checkpoint, parent, capfd):
    before = {str(file): file.read_bytes() for file in checkpoint.rglob("*") if file.is_file()}
    refuse(checkpoint, "-d")
    assert main(["--hf-path", str(checkpoint), "--mlx-path", str(parent / "model"), "-q"]) == 0
    assert {str(file): file.read_bytes() for file in checkpoint.rglob("*") if file.is_file()} == before
