"""A checkpoint → a converted folder: what is written, and that it is written whole or not at all."""

import gc
import itertools
import json
import shutil
from pathlib import Path

import huggingface_hub
import mlx.core as mx
import numpy as np
import pytest
from conftest import CHECKPOINT, retype, write_checkpoint
from PIL import Image
from safetensors.numpy import load_file, save_file

from avg_mlx import AvgMlxError, InputError, convert, generate, load
from avg_mlx.config import Config
from avg_mlx.weights.conversion import upload
from avg_mlx.weights.quantization import Quantization
from avg_mlx.weights.side_files import model_card

FOUR_BITS = Quantization(bits=4, group_size=32)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, by its name there."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def tensors_in(folder: Path) -> dict[str, mx.array]:
    return {name: array for file in folder.glob("*.safetensors") for name, array in mx.load(str(file)).items()}


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def four_bits(tiny_checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "model"
    convert(tiny_checkpoint, folder, quantization=FOUR_BITS)
    return folder


@pytest.fixture(scope="module")
def stage3(tiny_checkpoint, tmp_path_factory) -> Path:
    """The same checkpoint before its router is trained."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("stage3") / "checkpoint"))
    tensors = load_file(folder / "model.safetensors")
    kept = {name: array for name, array in tensors.items() if not name.startswith("model.router.")}
    save_file(kept, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_every_tensor_arrives_as_it_was(tmp_path, dtype):
    tensors = write_checkpoint(tmp_path / "checkpoint", {"torch_dtype": np.dtype(dtype).name}, dtype=dtype)
    convert(tmp_path / "checkpoint", tmp_path / "model")
    written = load_file(tmp_path / "model" / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, array in tensors.items():
        assert written[name].dtype == array.dtype
        assert np.array_equal(written[name], array)


def test_converting_twice_gives_the_same_bytes(tiny_checkpoint, tiny_folder, tmp_path):
    convert(tiny_checkpoint, tmp_path / "model")
    assert contents(tmp_path / "model") == contents(tiny_folder)


def test_a_single_file_has_the_plain_name_and_an_index(tiny_folder):
    assert [file.name for file in tiny_folder.glob("*.safetensors")] == ["model.safetensors"]
    tensors = tensors_in(tiny_folder)
    assert json.loads((tiny_folder / "model.safetensors.index.json").read_text()) == {
        "metadata": {"total_size": sum(array.nbytes for array in tensors.values())},
        "weight_map": dict.fromkeys(tensors, "model.safetensors"),
    }


@pytest.mark.parametrize("shard_bytes", [1, 30_000, 100_000])
def test_shards_hold_their_limit_or_one_tensor(tiny_checkpoint, tiny_folder, tmp_path, shard_bytes):
    convert(tiny_checkpoint, tmp_path / "model", shard_bytes=shard_bytes)
    files = sorted(file.name for file in (tmp_path / "model").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    weight_map = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())["weight_map"]
    sizes = []
    for file in files:
        shard = mx.load(str(tmp_path / "model" / file))
        assert shard.keys() == {name for name, place in weight_map.items() if place == file}
        sizes.append(sum(array.nbytes for array in shard.values()))
        assert sizes[-1] <= shard_bytes or len(shard) == 1
    assert all(one + other > shard_bytes for one, other in itertools.pairwise(sizes))  # as few as possible
    ours, theirs = tensors_in(tmp_path / "model"), tensors_in(tiny_folder)
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[name], array) for name, array in theirs.items())
    load(tmp_path / "model")


@pytest.mark.parametrize("quantization", [None, FOUR_BITS], ids=["cast", "quantized"])
def test_memory_holds_one_shard(tmp_path, quantization):
    """Peak memory does not grow with the checkpoint: this one is eight shards long."""
    write_checkpoint(tmp_path / "checkpoint", {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 12})
    size = (tmp_path / "checkpoint" / "model.safetensors").stat().st_size
    largest = 512 * 128 * 4  # bytes of the embeddings
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    convert(tmp_path / "checkpoint", tmp_path / "model", quantization=quantization, shard_bytes=size // 8)
    assert mx.get_peak_memory() - before < size // 8 + 2 * largest < size // 4


def test_progress_counts_every_byte_once(tiny_checkpoint, tmp_path):
    steps = []
    convert(tiny_checkpoint, tmp_path / "model", quantization=FOUR_BITS, progress=lambda *step: steps.append(step))
    size = sum(array.nbytes for array in tensors_in(tmp_path / "model").values())
    done = [step[0] for step in steps]
    assert {total for _, total in steps} == {size}
    assert done == sorted(set(done))
    assert done[-1] == size


@pytest.mark.parametrize(("dtype", "bits"), [("float32", 32), ("bfloat16", 16)])
def test_parts_add_up(tiny_checkpoint, tmp_path, dtype, bits):
    totals = set()
    options = {"quantization": FOUR_BITS, "dtype": dtype, "progress": lambda done, total: totals.add(total)}
    parts = {part.name: part for part in convert(tiny_checkpoint, tmp_path / "model", **options)}
    tensors = tensors_in(tmp_path / "model")
    assert parts.keys() == {"language_model", "vision_tower", "projector", "router", "image_newline"}
    for name, part in parts.items():
        assert part.bytes == sum(a.nbytes for n, a in tensors.items() if n.partition(".")[0] == name)
    assert totals == {sum(part.bytes for part in parts.values())}
    original = load_file(tiny_checkpoint / "model.safetensors")
    assert sum(part.parameters for part in parts.values()) == sum(array.size for array in original.values())
    assert parts["router"].bits_per_weight == bits
    assert parts["image_newline"].parameters == 64
    assert 4 < parts["language_model"].bits_per_weight < 8


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_all_floats_are_cast(tiny_checkpoint, tiny_folder, tmp_path, dtype):
    convert(tiny_checkpoint, tmp_path / "model", dtype=dtype)
    ours, original = tensors_in(tmp_path / "model"), tensors_in(tiny_folder)
    for name, array in original.items():
        assert ours[name].dtype == getattr(mx, dtype)
        assert mx.array_equal(ours[name], array.astype(getattr(mx, dtype)))
    assert config_of(tmp_path / "model")["torch_dtype"] == dtype


def test_an_undeclared_dtype_is_that_of_the_tensors(tmp_path):
    write_checkpoint(tmp_path / "checkpoint", {"torch_dtype": None}, dtype=np.float16)
    convert(tmp_path / "checkpoint", tmp_path / "model")
    assert config_of(tmp_path / "model")["torch_dtype"] == "float16"
    assert {array.dtype for array in tensors_in(tmp_path / "model").values()} == {mx.float16}


def test_float64_becomes_float32(tmp_path):
    tensors = write_checkpoint(tmp_path / "checkpoint", {"torch_dtype": "float64"}, dtype=np.float64)
    convert(tmp_path / "checkpoint", tmp_path / "model")
    written = load_file(tmp_path / "model" / "model.safetensors")
    assert config_of(tmp_path / "model")["torch_dtype"] == "float32"
    assert all(np.array_equal(written[name], array.astype(np.float32)) for name, array in tensors.items())
    assert {array.dtype for array in written.values()} == {np.dtype(np.float32)}


def test_one_float64_tensor_leaves_the_others_readable(tiny_checkpoint, tmp_path):
    """MLX refuses the whole file."""
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    tensors = {
        name: array.astype(mx.bfloat16) for name, array in mx.load(str(checkpoint / "model.safetensors")).items()
    }
    tensors["model.image_newline"] = tensors["model.image_newline"].astype(mx.float16)
    mx.eval(tensors)
    mx.save_safetensors(str(checkpoint / "model.safetensors"), tensors)
    convert(checkpoint, tmp_path / "expected")
    norm = np.array(tensors["model.norm.weight"].astype(mx.float32))
    retype(checkpoint / "model.safetensors", "model.norm.weight", "F64", norm.astype(np.float64).tobytes())
    convert(checkpoint, tmp_path / "model")
    assert contents(tmp_path / "model") == contents(tmp_path / "expected")


@pytest.mark.parametrize(("bits", "group_size"), [(8, 32), (4, 64), (2, 32)])
def test_dequantizing_undoes_quantizing_to_a_step(tiny_checkpoint, tiny_folder, tmp_path, bits, group_size):
    convert(tiny_checkpoint, tmp_path / "quantized", quantization=Quantization(bits=bits, group_size=group_size))
    convert(tmp_path / "quantized", tmp_path / "model", dequantize=True)
    original, back = tensors_in(tiny_folder), tensors_in(tmp_path / "model")
    quantized = tensors_in(tmp_path / "quantized")
    assert back.keys() == original.keys()
    for name, array in original.items():
        if name.removesuffix("weight") + "scales" in quantized:
            groups = np.array(array).reshape(-1, group_size)
            steps = (groups.max(axis=1) - groups.min(axis=1)) / (2**bits - 1)
            errors = np.abs(np.array(back[name]).reshape(-1, group_size) - groups).max(axis=1)
            assert (errors <= 1.1 * steps).all()
        else:
            assert mx.array_equal(back[name], array)
    assert "quantization" not in config_of(tmp_path / "model")
    assert "quantization_config" not in config_of(tmp_path / "model")


def test_quantizing_a_converted_folder_equals_quantizing_directly(tiny_folder, four_bits, tmp_path):
    convert(tiny_folder, tmp_path / "model", quantization=FOUR_BITS)
    ours, theirs = contents(tmp_path / "model"), contents(four_bits)
    assert ours == theirs


def test_a_quantized_folder_is_copied_as_it_is(four_bits, tmp_path):
    convert(four_bits, tmp_path / "model")
    assert contents(tmp_path / "model") == contents(four_bits)


def test_a_converted_folder_keeps_its_tokenizer(tiny_folder, tmp_path):
    """It may have been edited, template and all."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "edited"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    edited = settings["chat_template"].replace("USER: ", "HUMAN: ")
    assert edited != settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": edited}))
    convert(folder, tmp_path / "model", dtype="float16")
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / "model" / name).read_bytes() == (folder / name).read_bytes()


def test_a_quantized_folder_can_change_its_other_dtype(four_bits, tmp_path):
    convert(four_bits, tmp_path / "model", dtype="float16")
    ours, theirs = tensors_in(tmp_path / "model"), tensors_in(four_bits)
    for name, array in theirs.items():
        assert ours[name].dtype == (mx.uint32 if array.dtype == mx.uint32 else mx.float16)
        assert mx.array_equal(ours[name], array.astype(ours[name].dtype))
    load(tmp_path / "model")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quantization": FOUR_BITS}, "is quantized already; convert the original, or dequantize it"),
        ({"quantization": FOUR_BITS, "dequantize": True}, "exclude each other"),
        ({"dtype": "int8"}, "dtype is 'int8'; choose from float16, bfloat16, float32"),
    ],
)
def test_contradictions_are_refused(four_bits, tmp_path, options, words):
    with pytest.raises(InputError, match=words):
        convert(four_bits, tmp_path / "model", **options)
    assert not list(tmp_path.iterdir())


def test_there_must_be_something_to_dequantize(tiny_folder, tmp_path):
    with pytest.raises(InputError, match="model is not quantized; give a quantized"):
        convert(tiny_folder, tmp_path / "model", dequantize=True)
    assert not list(tmp_path.iterdir())


def test_the_config_holds_the_whole_architecture(checkpoint, converted):
    """What the PyTorch config says, and the vision tower's beside it: nothing else needs to be asked again."""
    keys = config_of(converted)
    assert keys.items() >= json.loads((checkpoint / "config.json").read_text()).items()
    tower = json.loads((checkpoint / "clip" / "config.json").read_text())
    assert keys["vision_config"].items() >= tower.items()
    assert keys["vision_config"]["image_mean"] == [0.48145466, 0.4578275, 0.40821073]
    assert "quantization" not in keys
    assert Config.from_dict(keys).vision_layers == 3


def test_quantization_is_recorded_as_mlx_lm_reads_it(four_bits):
    keys = config_of(four_bits)
    assert keys["quantization"] == keys["quantization_config"]
    assert {k: keys["quantization"][k] for k in ("group_size", "bits", "mode")} == {
        "group_size": 32,
        "bits": 4,
        "mode": "affine",
    }


def test_a_converted_folder_has_all_its_files(converted):
    assert set(contents(converted)) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }


def test_the_image_processor_of_other_tools(tmp_path):
    write_checkpoint(tmp_path / "checkpoint")
    processor = tmp_path / "checkpoint" / "clip" / "preprocessor_config.json"
    processor.write_text(json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]}))
    convert(tmp_path / "checkpoint", tmp_path / "model")
    written = json.loads((tmp_path / "model" / "preprocessor_config.json").read_text())
    assert written["image_processor_type"] == "CLIPImageProcessor"
    assert written["crop_size"] == {"height": 56, "width": 56}
    assert (written["image_mean"], written["image_std"]) == ([0.5, 0.4, 0.3], [0.1, 0.2, 0.3])
    assert load(tmp_path / "model")[0].config.vision.image_mean == (0.5, 0.4, 0.3)


CARD_KEYS = {"router_select": True, "torch_dtype": "bfloat16", "vis_token_granularity": [36, 576, 144]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ["weights in bfloat16", "A router picks 36, 144, 576 visual tokens per crop"]),
        ({"vis_token_granularity": "[36, 576]"}, ["A router picks 36, 576 visual tokens per crop"]),
        ({"quantization": {"bits": 4, "group_size": 64}}, ["quantized to 4 bits in groups of 64"]),
        ({"router_select": False}, ["with 576 visual tokens per crop", "no router yet: choose 36, 144, 576 with"]),
        ({"router_select": False, "vis_token_granularity": [144]}, ["# LLaVA for", "with 144 visual tokens per crop."]),
    ],
)
def test_the_model_card_says_what_the_folder_is(converted, changes, said):
    card = model_card(str(CHECKPOINT), config_of(converted) | CARD_KEYS | changes)
    assert all(words in card for words in said)
    assert card.startswith("---\nlibrary_name: mlx\n")


def test_the_model_card_links_a_hub_repository_and_no_local_folder(tiny_checkpoint, converted, monkeypatch):
    monkeypatch.chdir(tiny_checkpoint.parent.parent)
    for origin in (str(tiny_checkpoint), f"{tiny_checkpoint.parent.name}/checkpoint"):
        card = model_card(origin, config_of(converted))
        assert "Converted from a local checkpoint with avg-mlx" in card
        assert origin not in card
    card = model_card("owner/name", config_of(converted))
    assert "\nbase_model: owner/name\n" in card
    assert "Converted from owner/name with avg-mlx" in card


@pytest.mark.parametrize("after", [1, 20, "all"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_an_interrupted_conversion_leaves_nothing(tiny_checkpoint, tmp_path, after, error):
    steps = []

    def progress(done: int, total: int) -> None:
        steps.append(done)
        if done == total if after == "all" else len(steps) == after:
            raise error

    with pytest.raises(error):
        convert(tiny_checkpoint, tmp_path / "deep" / "model", progress=progress, shard_bytes=30_000)
    assert not list(tmp_path.iterdir())


def test_a_conversion_is_hidden_until_it_is_complete(tiny_checkpoint, tmp_path):
    seen = []
    convert(tiny_checkpoint, tmp_path / "model", progress=lambda *_: seen.append([f.name for f in tmp_path.iterdir()]))
    assert all(len(names) == 1 and names[0].startswith(".model.") for names in seen)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "dangling link"])
@pytest.mark.parametrize("meanwhile", [False, True])
def test_what_exists_is_never_overwritten(tiny_checkpoint, tmp_path, kind, meanwhile):
    destination = tmp_path / "model"

    def occupy() -> None:
        if kind == "file":
            destination.write_text("precious")
        elif kind == "dangling link":
            destination.symlink_to(tmp_path / "nowhere")
        else:
            destination.mkdir()
            if kind == "folder":
                (destination / "notes.txt").write_text("precious")

    def progress(done: int, total: int) -> None:
        if done == total:
            occupy()

    if not meanwhile:
        occupy()
    before = None if meanwhile else contents(tmp_path)
    with pytest.raises(InputError, match="model exists already; choose another path"):
        convert(tiny_checkpoint, destination, progress=progress)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert meanwhile or contents(tmp_path) == before
    if kind in ("folder", "file"):
        assert (destination if kind == "file" else destination / "notes.txt").read_text() == "precious"


def test_parent_folders_are_made(tiny_checkpoint, tiny_folder, tmp_path):
    convert(tiny_checkpoint, tmp_path / "a" / "b" / "model")
    assert contents(tmp_path / "a" / "b" / "model") == contents(tiny_folder)
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_a_full_disk_is_noticed_before_anything_is_written(tiny_checkpoint, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(AvgMlxError, match=r"needs 0\.00 GB but its disk has 0\.00 GB free; make room") as error:
        convert(tiny_checkpoint, tmp_path / "model", progress=lambda *_: pytest.fail("it was written to"))
    assert error.value.exit_status == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("spoil", ["tokenizer.model", "model.safetensors"])
def test_a_spoiled_checkpoint_leaves_nothing(tiny_checkpoint, tmp_path, spoil):
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    (checkpoint / spoil).write_bytes(b"\x0f" * 50)
    with pytest.raises(InputError, match=spoil):
        convert(checkpoint, tmp_path / "model")
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]


def test_a_checkpoint_before_router_training_converts_and_answers(stage3, tiny, tmp_path):
    parts = convert(stage3, tmp_path / "model")
    assert "router" not in {part.name for part in parts}
    assert config_of(tmp_path / "model")["router_select"] is False
    assert "no router yet" in (tmp_path / "model" / "README.md").read_text()

    model, tokenizer = load(tmp_path / "model")
    photo = Image.effect_mandelbrot((64, 48), (-2, -1, 1, 1), 50).convert("RGB")
    for granularity in model.config.granularities:
        options = {"granularity": granularity, "max_tokens": 4}
        answer = generate(model, tokenizer, "Why?", photo, **options)
        assert answer.token_ids == generate(*tiny, "Why?", photo, **options).token_ids
        assert answer.views[0].routing is None
    assert generate(model, tokenizer, "Why?", photo, max_tokens=1).views[0].source == "finest"
    text_only = [generate(*loaded, "Why?", max_tokens=4).token_ids for loaded in ((model, tokenizer), tiny)]
    assert text_only[0] == text_only[1]


def test_upload_makes_the_repository_and_gives_its_address(tiny_folder, monkeypatch):
    calls = []

    class HfApi:
        def create_repo(self, repo, **options):
            calls.append(("create_repo", repo, options))
            return f"https://example.org/{repo}"

        def upload_folder(self, **options):
            calls.append(("upload_folder", options))

    monkeypatch.setattr(huggingface_hub, "HfApi", HfApi)
    assert upload(tiny_folder, "owner/name") == "https://example.org/owner/name"
    assert calls == [
        ("create_repo", "owner/name", {"exist_ok": True}),
        ("upload_folder", {"repo_id": "owner/name", "folder_path": tiny_folder}),
    ]


@pytest.mark.parametrize("failing", ["create_repo", "upload_folder"])
def test_an_upload_that_fails_keeps_the_folder(tiny_folder, monkeypatch, failing):
    class HfApi:
        def create_repo(self, *_, **__):
            if failing == "create_repo":
                raise ConnectionError("no route to host\nsecond line")

        def upload_folder(self, *_, **__):
            raise PermissionError("not yours")

    monkeypatch.setattr(huggingface_hub, "HfApi", HfApi)
    before = contents(tiny_folder)
    reason = "no route to host" if failing == "create_repo" else "not yours"
    with pytest.raises(AvgMlxError, match=rf"cannot upload to owner/name \({reason}\); .* is complete") as error:
        upload(tiny_folder, "owner/name")
    assert error.value.exit_status == 1
    assert contents(tiny_folder) == before
