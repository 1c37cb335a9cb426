"""`avg-mlx models`, and what huggingface-hub has downloaded: caches are laid out here as it lays them out."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CHECKPOINT, GOLDEN

from avg_mlx.cli import convert, generate, models
from avg_mlx.config import form_of
from avg_mlx.errors import AvgMlxError
from avg_mlx.weights.checkpoint import load
from avg_mlx.weights.library import find_checkpoints
from avg_mlx.weights.source import find_folder, open_source

NEXT, LLAVA15 = (GOLDEN.with_name("golden_llava") / name / "checkpoint" for name in ("next", "llava15"))
MAIN, OTHER = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the Hub, with nothing else around."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "hub"


@pytest.fixture
def offline(monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def put(cache: Path, repo: str, source: Path, commit=MAIN, ref: str | None = "main", without=(), **changes) -> Path:
    """Put a folder's files into a cache: content in blobs, links in the snapshot. A change to None removes a key."""
    home = cache / f"models--{repo.replace('/', '--')}"
    snapshot = home / "snapshots" / commit
    (home / "blobs").mkdir(parents=True, exist_ok=True)
    for file in (file for file in source.rglob("*") if file.is_file() and file.name not in without):
        content = file.read_bytes()
        if file == source / "config.json":
            keys = json.loads(content) | changes
            content = json.dumps({name: value for name, value in keys.items() if value is not None}).encode()
        blob = home / "blobs" / f"{commit}-{file.name}-{file.parent.name}"
        blob.write_bytes(content)
        link = snapshot / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    if ref:
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / ref).write_text(commit)
    return snapshot


def list_tree(snapshot: Path, *names: str) -> None:
    """Note beside a snapshot which files its repository has, as snapshot_download does."""
    files = {name: {"size": 1, "blob_id": "0" * 40} for name in names}
    file = snapshot.parent.parent / "trees" / f"{snapshot.name}.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"format_version": 1, "files": files}))


@pytest.fixture
def listed(cache, capsys):
    """`listed(*folders)` → {name: what --json says of it}, without the demo; and the problems."""

    def run(*folders) -> tuple[dict[str, dict], list[str]]:
        assert models.main(["--json", *map(str, folders)]) == 0
        found = json.loads(capsys.readouterr().out)
        *others, demo = found["models"]
        assert (demo["model"], demo["router"]) == ("demo", True)
        return {model["model"]: model for model in others}, found["problems"]

    return run


@pytest.mark.parametrize(
    ("keys", "form"),
    [
        ({"model_type": "llava_next", "text_config": {}, "vision_config": {}}, "hub"),
        ({"model_type": "llava", "text_config": {}, "vision_config": {}}, "hub"),
        ({"model_type": "llava", "mm_vision_tower": "x"}, "authors"),
        ({"model_type": "llava", "mm_vision_tower": "x", "text_config": None, "vision_config": None}, "authors"),
        ({"model_type": "llava_mistral", "mm_vision_tower": "x"}, "authors"),
        ({"model_type": "llava_llama", "vision_config": {}}, "converted"),
        ({"model_type": "llava_qwen2", "vision_config": {}, "layout": "transformers"}, "converted"),
        ({"model_type": "llava_onevision", "text_config": {}, "vision_config": {}}, None),
        ({"model_type": "qwen2_vl", "vision_config": {}}, None),
        ({"model_type": ["llava"]}, None),
        ({}, None),
    ],
)
def test_a_config_tells_its_form(keys, form):
    assert form_of(keys) == form


def test_golden_checkpoints_have_the_form_that_they_are_converted_from(tiny_folder):
    forms = [form_of(json.loads((f / "config.json").read_text())) for f in (CHECKPOINT, NEXT, LLAVA15, tiny_folder)]
    assert forms == ["authors", "hub", "hub", "converted"]


SPARSE = {"model_type": "mistral", "torch_dtype": "float16"}
PLAIN = {"vis_token_granularity": None}
M3 = PLAIN | {"matryoshka_vis_token_scale": [16, 4, 1], "image_aspect_ratio": "pad"}


@pytest.mark.parametrize(
    ("source", "changes", "family", "text_model", "dtype"),
    [
        (CHECKPOINT, {}, "AVG-LLaVA", "llama", "float32"),
        (CHECKPOINT, M3, "Matryoshka M3", "llama", "float32"),
        (CHECKPOINT, PLAIN | {"model_type": "llava_mistral"}, "LLaVA-NeXT", "mistral", "float32"),
        (CHECKPOINT, PLAIN | {"image_aspect_ratio": "pad", "model_type": "llava"}, "LLaVA-1.5", "llama", "float32"),
        (NEXT, {"dtype": "bfloat16"}, "LLaVA-NeXT", "llama", "bfloat16"),
        (NEXT, {"dtype": None, "text_config": SPARSE}, "LLaVA-NeXT", "mistral", "float16"),
        (LLAVA15, {"dtype": ["float16"]}, "LLaVA-1.5", "llama", None),
        (LLAVA15, {"vis_token_granularity": [36, 9]}, "AVG-LLaVA", "llama", "float32"),
    ],
)
def test_a_cached_checkpoint_is_known_by_its_config(cache, listed, source, changes, family, text_model, dtype):
    put(cache, "owner/name", source, **changes)
    found, problems = listed()
    assert problems == []
    model = found["owner/name"]
    assert (model["family"], model["text_model"], model["dtype"]) == (family, text_model, dtype)
    assert (model["converted"], model["bits"], model["router"]) == (False, None, source == CHECKPOINT)
    assert model["bytes"] == sum(file.stat().st_size for file in source.glob("*.safetensors"))
    assert model["command"] == "avg-mlx convert --hf-path owner/name -q --mlx-path name-4bit"


def test_folders_here_and_below_are_listed_before_the_cache(cache, listed, tiny_folder, tiny_four_bits, tiny_stage3):
    for name, folder in {"mlx_model": tiny_folder, "my own": tiny_four_bits, "plain": tiny_stage3}.items():
        shutil.copytree(folder, name)
    shutil.copytree(tiny_folder, "deep/down")
    shutil.copytree(tiny_folder, ".mlx_model.partial")
    put(cache, "owner/converted", tiny_folder)
    found, problems = listed()
    assert problems == []
    assert list(found) == ["mlx_model", "my own", "plain", "owner/converted"]
    assert all(model["converted"] for model in found.values())
    assert [model["bits"] for model in found.values()] == [None, 4, None, None]
    assert [model["router"] for model in found.values()] == [True, True, False, True]
    assert list(listed("deep", "mlx_model", "deep/down")[0]) == ["deep/down", "mlx_model", "owner/converted"]


def test_the_current_folder_may_be_a_model(cache, listed, tiny_folder, tiny_checkpoint, monkeypatch):
    monkeypatch.chdir(tiny_checkpoint)
    assert listed()[0]["."]["command"] == "avg-mlx convert --hf-path . -q --mlx-path checkpoint-4bit"
    monkeypatch.chdir(tiny_folder)
    assert list(listed()[0]) == ["."]


@pytest.mark.parametrize("name", ["-x", "demo", "a b ", "it's | one "])
def test_every_command_is_one_that_can_be_typed(cache, listed, tiny_folder, tiny_checkpoint, name, capsys):
    shutil.copytree(tiny_folder, name)
    shutil.copytree(tiny_checkpoint, f"{name}source")
    put(cache, "owner/name", NEXT, OTHER, ref="v2")
    for model in listed()[0].values():
        program, verb, *options = shlex.split(model["command"])
        assert program == "avg-mlx"
        if model["converted"]:
            args = generate.build_parser("generate").parse_args(options)
            assert find_folder(args.model).samefile(name)
        else:
            args = convert.build_parser("convert").parse_args(options)
            assert verb == "convert"
            assert args.revision == model["revision"]
            assert model["folder"] == str(Path(args.hf_path).absolute()) or args.hf_path == "owner/name"


def test_each_snapshot_is_listed_with_its_revision(cache, listed, capsys):
    put(cache, "owner/name", NEXT, OTHER, ref=None)
    put(cache, "owner/name", NEXT, MAIN)
    both = [(c.place.name, c.place.revision) for c in find_checkpoints()[0][:-1]]
    assert both == [("owner/name", None), ("owner/name", OTHER)]
    models.main([])
    out = capsys.readouterr().out
    assert f"| owner/name@{OTHER[:8]} |" in out
    assert f"--hf-path owner/name --revision {OTHER} -q --mlx-path name-{OTHER[:8]}-4bit" in out


def test_other_models_are_passed_over(cache, listed):
    put(cache, "owner/text", NEXT, model_type="llama", text_config=None)
    put(cache, "owner/other", NEXT, model_type="qwen2_vl")
    put(cache, "owner/pixtral", LLAVA15, vision_config={"model_type": "pixtral"})
    put(cache, "owner/siglip", CHECKPOINT, mm_vision_tower="google/siglip-so400m-patch14-384")
    put(cache, "owner/gguf", NEXT, without=["config.json"])
    (cache / "datasets--owner--data" / "snapshots" / MAIN).mkdir(parents=True)
    (cache / ".locks").mkdir()
    assert listed() == ({}, [])


SHARD = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def config(content: str):
    """What writes another config."""
    return lambda at: (at / "config.json").write_text(content)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda at: (at / SHARD).unlink(), f"lacks {SHARD}; complete it with: hf download owner/llava"),
        (lambda at: (at / SHARD).resolve().unlink(), f"lacks {SHARD}; complete it with: hf download owner/llava"),
        (lambda at: os.truncate(at / SHARD, 5000), f"{SHARD} is truncated or damaged"),
        (lambda at: (at / "config.json").unlink(), "lacks config.json; complete it with: hf download owner/llava"),
        (lambda at: shutil.rmtree(at), "lacks config.json; complete it with: hf download owner/llava"),
        (config('{"model_type": '), "config.json is not valid JSON"),
        (config("[]"), "config.json holds a list, expected an object"),
        (config('{"model_type": "llava", "text_config": [1]}'), "text_config is [1]"),
        (config('{"model_type": "llava_llama", "vision_config": {}}'), "config.json lacks"),
        (lambda at: (at / INDEX).write_text("{}"), "not an index of shards"),
        (lambda at: [file.unlink() for file in at.glob("model*")], "lacks *.safetensors"),
    ],
)
def test_a_damaged_checkpoint_is_one_line_and_hides_no_other(cache, listed, spoil, told):
    spoil(put(cache, "owner/llava", CHECKPOINT))
    put(cache, "owner/whole", NEXT)
    found, [problem] = listed()
    assert list(found) == ["owner/whole"]
    assert problem.startswith("owner/llava: ")
    assert told in problem
    assert "\n" not in problem


def test_a_whole_snapshot_is_found_beside_an_interrupted_update(cache, listed):
    put(cache, "owner/llava", NEXT, OTHER, ref=None)
    (cache / "models--owner--llava" / "refs").mkdir()
    (cache / "models--owner--llava" / "refs" / "main").write_text(MAIN)
    found, [problem] = listed()
    assert found["owner/llava"]["revision"] == OTHER
    assert problem.startswith("owner/llava: it lacks config.json")


@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_what_others_have_quantized_is_told(cache, listed, key):
    put(cache, "owner/name", NEXT, **{key: {"bits": 4}})
    found, [problem] = listed()
    assert not found
    assert problem.startswith("owner/name: its weights are quantized by others; get the original")


def test_only_unpickling_would_tell_of_a_router(cache, listed, tmp_path):
    folder = shutil.copytree(CHECKPOINT, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors*"))
    (folder / "pytorch_model.bin").write_bytes(b"not looked at")
    put(cache, "owner/one", folder)
    index = {"weight_map": {"model.router.voter": "pytorch_model.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    put(cache, "owner/two", folder)
    assert [model["router"] for model in listed()[0].values()] == [None, True]


@pytest.mark.parametrize("folder", ["absent", "file", "\0", "x" * 300])
def test_what_is_no_folder_is_refused(cache, refused, folder):
    Path("file").touch()
    assert "is not a folder" in refused(models.main, folder)


def test_the_tables_fit_a_terminal(cache, tiny_folder, capsys):
    put(cache, "llava-hf/llava-v1.6-mistral-7b-hf", CHECKPOINT, **M3)
    put(cache, "owner/llava-damaged", NEXT, without=["config.json"])
    shutil.copytree(tiny_folder, "mlx_model")
    assert models.main([]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert all(len(line) <= 100 for line in lines if line.startswith("|"))
    assert [line for line in lines if line and line[0] not in "| "] == ["To convert:", "To run:"]
    assert lines[-2].startswith("    avg-mlx generate --model demo --image")
    assert err == "owner/llava-damaged: it lacks config.json; complete it with: hf download owner/llava-damaged\n"


def run(*arguments, **environment) -> subprocess.CompletedProcess:
    """Run the command line with other settings of the Hub."""
    settings = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=settings | environment, timeout=100)


@pytest.mark.parametrize("setting", ["HF_HOME", "HF_HUB_CACHE"])
def test_the_hubs_settings_are_honoured_and_mlx_is_not_loaded(cache, tmp_path, setting):
    put(cache, "owner/name", NEXT)
    home = tmp_path if setting == "HF_HOME" else cache
    done = run("-X", "importtime", "-m", "avg_mlx", "models", **{setting: str(home)})
    assert "--hf-path owner/name" in done.stdout
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "safetensors" in loaded
    assert not loaded & {"mlx", "mlx_lm", "transformers", "torch"}


@pytest.mark.parametrize("network", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_a_cached_repository_answers_without_a_network(cache, tiny_folder, network):
    put(cache, "owner/name", tiny_folder)
    network = network | {"HF_HUB_CACHE": str(cache)}
    question = ("--prompt", "Hi", "--max-tokens", 1)
    done = run("-m", "avg_mlx", "generate", "--model", "owner/name", *question, **network)
    assert done.returncode == 0, done.stderr
    done = run("-m", "avg_mlx", "generate", "--model", "owner/absent", *question, **network)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "there is no folder owner/absent, and the Hub did not deliver it" in done.stderr


def test_a_cached_repository_is_converted_without_a_network(cache, offline):
    put(cache, "owner/name", NEXT)
    assert convert.main(["--hf-path", "owner/name", "--mlx-path", "model"]) == 0
    assert form_of(json.loads(Path("model/config.json").read_text())) == "converted"


def test_a_revision_is_found_by_its_commit_and_by_its_branch(cache, offline):
    snapshot = put(cache, "owner/name", NEXT, OTHER, ref="v2")
    assert find_folder("owner/name", OTHER) == find_folder("owner/name", "v2") == snapshot
    with pytest.raises(AvgMlxError, match="the Hub did not deliver it"):
        find_folder("owner/name")


FILES = (SHARD, "config.json", "tokenizer.model")  # of which huggingface-hub knows


@pytest.mark.parametrize("open", [load, open_source])
@pytest.mark.parametrize(
    ("absent", "listing"),
    [("config.json", ()), (SHARD, ()), ("config.json", FILES), (SHARD, FILES), ("tokenizer.model", FILES)],
)
def test_an_incomplete_snapshot_is_told_in_one_line(cache, offline, open, listing, absent):
    snapshot = put(cache, "owner/name", CHECKPOINT, without=[absent])
    if listing:
        list_tree(snapshot, *listing)
    with pytest.raises(AvgMlxError) as error:
        open("owner/name")
    assert error.value.exit_status == 1
    assert "owner/name" in str(error.value)
    assert absent in str(error.value)
    assert listing or str(error.value).endswith(
        f"in {snapshot}; if its download was interrupted, run this again online"
    )


def test_a_snapshot_that_lacks_nothing_that_is_needed_is_used(cache, offline, tiny_folder):
    snapshot = put(cache, "owner/name", tiny_folder, without=["README.md"])
    list_tree(snapshot, "README.md", "config.json", "model.safetensors", "pytorch_model.bin", "training_args.bin")
    load("owner/name")


def test_pickles_that_are_needed_are_missed(cache, offline):
    snapshot = put(cache, "owner/name", CHECKPOINT, without=[SHARD, "model-00001-of-00002.safetensors", INDEX])
    list_tree(snapshot, "config.json", "pytorch_model.bin")
    with pytest.raises(AvgMlxError, match=r"owner/name lacks \*\.safetensors in"):
        open_source("owner/name")


def test_a_towers_config_alone_is_enough_where_that_is_asked_for(cache, offline):
    snapshot = put(cache, "owner/tower", CHECKPOINT / "clip", without=["model.safetensors"])
    assert find_folder("owner/tower", patterns=["*.json"]) == snapshot
    with pytest.raises(AvgMlxError, match=r"lacks \*\.safetensors"):
        find_folder("owner/tower")
