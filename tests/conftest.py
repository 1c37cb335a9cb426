"""The golden checkpoint, converted once a session, the reference's numbers for it, and other checkpoints at random."""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # tests run side by side
import hypothesis
import numpy as np
import pytest

import avg_mlx  # noqa: F401  # before any test imports MLX, so that OpenBLAS is used where there is one

# What the tests in these folders need comes with make test-lmms and make test-page.
NEEDED = {"lmms": "lmms_eval", "page": "playwright"}
collect_ignore = [folder for folder, package in NEEDED.items() if importlib.util.find_spec(package) is None]

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINT = GOLDEN / "checkpoint"
PHOTO = Path(__file__).parent / "photos" / "chelsea.jpg"
ROOT = Path(__file__).parent.parent

CASES = json.loads((GOLDEN / "cases.json").read_text())["cases"]
GRANULARITIES = (36, 72, 144, 288, 576)

hypothesis.settings.register_profile("avg-mlx", deadline=None, database=None)  # nothing is timed
hypothesis.settings.load_profile("avg-mlx")

# Another model than the golden one in all its sizes, and many times cheaper: crops of 4×4 patches.
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "mm_vision_select_layer": -2,
    "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]],
    "vis_token_granularity": [1, 2, 4, 8, 16],
    "filtered_text_num": 5,
}
TINY_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
    "hidden_act": "gelu",
}


class Reference:
    """The reference's arrays of one case: `reference("router_logits")`."""

    arrays = np.load(GOLDEN / "reference.npz")

    def __init__(self, case: int):
        self.case = case

    def __call__(self, name: str) -> np.ndarray:
        return self.arrays[f"case{self.case}_{name}"]


@pytest.fixture(scope="session")
def converted(tmp_path_factory) -> Path:
    """The golden checkpoint as a converted folder, in float32."""
    from avg_mlx import convert

    folder = tmp_path_factory.mktemp("converted") / "model"
    convert(CHECKPOINT, folder)
    return folder


@pytest.fixture(scope="session")
def loaded(converted):
    """(model, tokenizer) of the converted folder."""
    from avg_mlx import load

    return load(converted)


@pytest.fixture(scope="session")
def model(loaded):
    return loaded[0]


@pytest.fixture(scope="session")
def tokenizer(loaded):
    return loaded[1]


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A copy of the golden checkpoint, to be spoiled."""
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "checkpoint"))


@pytest.fixture
def model_folder(tmp_path, converted) -> Path:
    """A copy of the converted folder, to be spoiled."""
    return Path(shutil.copytree(converted, tmp_path / "model"))


def write_checkpoint(folder: Path, changes=None, tower=None, dtype=np.float32) -> dict[str, np.ndarray]:
    """Write a random checkpoint in the authors' layout: TINY, but for `changes` to its config and its tower's.

    Returns its tensors by our names.
    """
    from safetensors.numpy import save_file

    from avg_mlx.model.inventory import shapes_of
    from avg_mlx.weights.checkpoint import build_model
    from avg_mlx.weights.pytorch import AUTHORS_LAYOUT

    shutil.copytree(CHECKPOINT, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    for file, new in (("config.json", TINY | (changes or {})), ("clip/config.json", TINY_TOWER | (tower or {}))):
        keys = json.loads((folder / file).read_text()) | new
        (folder / file).write_text(json.dumps(keys))
    keys = json.loads((folder / "config.json").read_text())
    vision_config = json.loads((folder / "clip" / "config.json").read_text())
    shapes = shapes_of(build_model(keys | {"vision_config": vision_config}, ()))

    random = np.random.default_rng(0)
    ours = {name: random.normal(0, 0.3, shape).astype(dtype) for name, shape in shapes.items()}
    theirs: dict[str, list[np.ndarray]] = {}
    for name, array in ours.items():
        if "norm" in name and name.endswith("weight"):
            array += 1
        if name == "vision_tower.patch_embedding.weight":
            array = array.transpose(0, 3, 1, 2)
        theirs.setdefault(AUTHORS_LAYOUT.origin(name).name, []).append(array)
    stacked = {name: np.ascontiguousarray(np.concatenate(arrays)) for name, arrays in theirs.items()}
    save_file(stacked, folder / "model.safetensors")
    return ours


def retype(file: Path, name: str, dtype: str, data: bytes | None = None) -> None:
    """Store a tensor of a safetensors file in another type, by safetensors' name; zeros unless there are `data`."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    pieces = {n: content[slice(*(start + at for at in t["data_offsets"]))] for n, t in header.items() if n[:2] != "__"}
    bits = int(re.search(r"\d+|$", dtype)[0] or 8)  # BOOL has 8
    pieces[name] = data or bytes(int(np.prod(header[name]["shape"])) * bits // 8)
    header[name]["dtype"] = dtype
    ends = np.cumsum([len(piece) for piece in pieces.values()]).tolist()
    for (n, piece), end in zip(pieces.items(), ends, strict=True):
        header[n]["data_offsets"] = [end - len(piece), end]
    head = json.dumps(header).encode()
    file.write_bytes(len(head).to_bytes(8, "little") + head + b"".join(pieces.values()))


def write_pickle(file: Path, *asked: str, name: str = "lm_head.weight", compression: int = zipfile.ZIP_STORED) -> None:
    """Write an archive as torch.save does, whose pickle asks for functions ("module name") to make a tensor `name`."""
    key = b"X" + len(name).to_bytes(4, "little") + name.encode()
    made = b"".join(b"c" + each.replace(" ", "\n").encode() + b"\n)R" for each in asked)
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}" + (key + made + b"s" if asked else b"") + b".")
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A random checkpoint of TINY sizes in the authors' layout."""
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    write_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tiny_checkpoint) -> Path:
    """The same, converted."""
    from avg_mlx import convert

    folder = tiny_checkpoint.parent / "model"
    convert(tiny_checkpoint, folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    """(model, tokenizer) of the same."""
    from avg_mlx import load

    return load(tiny_folder)


@pytest.fixture
def no_spare_buffers():
    """Every array in memory of just its size: a buffer used again may be larger than what it is used for."""
    import mlx.core as mx

    limit = mx.set_cache_limit(0)
    mx.clear_cache()
    yield
    mx.set_cache_limit(limit)


def fetch_wheel(requirement: str, folder: Path) -> zipfile.ZipFile:
    """A package's wheel, of any platform: it is only read."""
    options = ["--no-deps", "--only-binary=:all:", "--python-version", "3.12", "--quiet", "--dest", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement], check=True)
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel)


class SentencePieceTokenizer:
    """How transformers' LlamaTokenizer used SentencePiece until its version 5, as the reference does."""

    def __init__(self, model_file: Path, legacy: bool = False):
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

        proto = sentencepiece_model_pb2.ModelProto()
        proto.ParseFromString(model_file.read_bytes())
        proto.normalizer_spec.add_dummy_prefix = legacy
        self.pieces = SentencePieceProcessor(model_proto=proto.SerializeToString())
        self.legacy = legacy
        self.unknown = self.pieces.encode("<unk>")

    def encode(self, text: str) -> list[int]:
        """The ids of a text, BOS first."""
        if text and not self.legacy:
            text = " " + text.replace("▁", " ")
        ids: list[int] = []
        for stretch in re.split("(<unk>|<s>|</s>)", text):
            ids += self._encode_stretch(stretch) if stretch else []
        if not self.legacy and len(ids) > 1 and ids[0] == self.pieces.piece_to_id("▁") and ids[1] < 3:
            ids = ids[1:]  # the text began with a special token
        return [self.pieces.bos_id(), *ids]

    def _encode_stretch(self, stretch: str) -> list[int]:
        if stretch in ("<unk>", "<s>", "</s>"):
            return [self.pieces.piece_to_id(stretch)]
        if self.legacy or not stretch.startswith((" ", "▁")):
            return self.pieces.encode(stretch)
        return self.pieces.encode("<unk>" + stretch)[len(self.unknown) :]


@pytest.fixture(scope="session")
def data_root(tmp_path_factory) -> Path:
    """Copies of the datasets of the paper's benchmarks, with made-up questions, for the tests in lmms."""
    from made_up import write_all

    root = tmp_path_factory.mktemp("data")
    write_all(root)
    return root


@pytest.fixture(scope="session")
def llama2_file(tmp_path_factory) -> Path:
    """Llama-2's tokenizer.model, out of a package that carries it."""
    folder = tmp_path_factory.mktemp("llama2")
    with fetch_wheel("maxtext==0.2.5", folder) as archive:
        (folder / "tokenizer.model").write_bytes(archive.read("maxtext/assets/tokenizers/tokenizer.llama2"))
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def llama2(llama2_file):
    """The tokenizer as the product writes and loads it."""
    from avg_mlx.weights.checkpoint import load_tokenizer
    from avg_mlx.weights.sentencepiece import tokenizer_files
    from avg_mlx.weights.writing import write_folder

    shutil.copyfile(CHECKPOINT / "tokenizer_config.json", llama2_file.with_name("tokenizer_config.json"))
    destination = llama2_file.with_name("converted")
    write_folder(destination, tokenizer_files(llama2_file.parent), tensors=(), sizes={})
    return load_tokenizer(destination, {})


@pytest.fixture(scope="session")
def llama2_reference(llama2_file) -> SentencePieceTokenizer:
    """The same as the reference uses it."""
    return SentencePieceTokenizer(llama2_file)


@pytest.fixture
def refused(capfd):
    """`refused(main, *arguments)` runs a command that must fail in one line on stderr, and returns that line."""

    def run(main, *arguments, status: int = 2) -> str:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = exit.code
        out, err = capfd.readouterr()
        lines = [line for line in err.splitlines() if line]
        assert (code, out, len(lines)) == (status, "", 1), err
        assert "Traceback" not in err
        return lines[0]

    return run


def free_ports(count: int) -> int:
    """The first of as many neighbouring ports; where it looks first is each process's own, since they run together."""
    for first in range(20000 + os.getpid() * 97 % 10000, 60000, 97):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
    raise AssertionError("no free ports")


RUN_FILE = """
import avg_mlx, os, runpy, sys  # avg_mlx before MLX, as in the tests, so that both compute with the same BLAS
del sys.argv[0]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def launch_two(*arguments) -> None:
    """Run a Python file with arguments in two processes of one group, over MLX's ring on this machine."""
    launch = [Path(sys.executable).with_name("mlx.launch"), "-n", 2, "--backend", "ring", "--starting-port"]
    command = [*launch, free_ports(2), "--", sys.executable, "-c", RUN_FILE, *arguments]
    reader, writer = os.pipe()  # mlx.launch spins once its standard input has ended
    try:
        done = subprocess.run(list(map(str, command)), stdin=reader, capture_output=True, text=True, timeout=300)
    finally:
        os.close(reader)
        os.close(writer)
    assert "[WARN]" not in done.stderr, done.stdout + done.stderr  # its exit status tells nothing of the processes'


def conversation(*turns: str) -> list[dict[str, str]]:
    """LLaVA's turns: human and gpt alternate."""
    return [{"from": ("human", "gpt")[n % 2], "value": turn} for n, turn in enumerate(turns)]


def write_samples(folder: Path, records: list) -> Path:
    """Write training data to a new file in `folder`, and the noise images it names beside it."""
    from PIL import Image

    random = np.random.default_rng(0)
    for name, (width, height) in IMAGES.items():
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    file = folder / "data.json"
    file.write_text(json.dumps(records))
    return file


IMAGES = {"wide.png": (100, 50), "tall.png": (40, 90), "large.png": (112, 112), "small.png": (30, 30)}
RECORDS = [
    {"id": "one", "image": "wide.png", "conversations": conversation("<image>\nWhat is this?", "A cat.")},
    {"id": "turns", "image": "tall.png", "conversations": conversation("<image>\nA dog?", "no", "A car?", "Yes, two.")},
    {"id": "late", "image": "large.png", "conversations": conversation("Hello", "Hi there", "See <image>", "A sign.")},
    {"id": "two", "image": ["small.png", "wide.png"], "conversations": conversation("Are they the same?", "Hardly.")},
    {"id": "text", "conversations": conversation("Tell me a story of the sea.", "There is none.")},
    {"id": "last", "image": "small.png", "conversations": conversation("Describe.", "Noise and noise again.")},
]


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A training file of RECORDS, images beside it."""
    return write_samples(tmp_path_factory.mktemp("data"), RECORDS)


@pytest.fixture
def own_tiny(tiny_folder):
    """(model, tokenizer) of TINY sizes, to be trained."""
    from avg_mlx import load

    return load(tiny_folder)


def without_router(checkpoint: Path, folder: Path) -> Path:
    """Copy a checkpoint in the authors' layout to `folder` as it was before its router was trained."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(checkpoint, folder)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({name: a for name, a in tensors.items() if not name.startswith("model.router.")}, file)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    return folder


@pytest.fixture(scope="session")
def tiny_stage3(tiny_checkpoint, tmp_path_factory) -> Path:
    """The tiny checkpoint without its router, converted."""
    from avg_mlx import convert

    home = tmp_path_factory.mktemp("tiny_stage3")
    convert(without_router(tiny_checkpoint, home / "checkpoint"), home / "model")
    return home / "model"


@pytest.fixture(scope="session")
def tiny_four_bits(tiny_checkpoint, tmp_path_factory) -> Path:
    """The tiny checkpoint converted, its language model in 4 bits and its router in 8."""
    from avg_mlx import Quantization, convert

    folder = tmp_path_factory.mktemp("tiny_four_bits") / "model"
    convert(tiny_checkpoint, folder, quantization=Quantization(bits=4, group_size=32, router_bits=8))
    return folder


def make_adapters(model_folder: Path, folder: Path, kind: str) -> Path:
    """Adapters of a `kind` ("lora", "dora", "full" or "router") as training saves them, moved at random instead."""
    import mlx.core as mx

    from avg_mlx import load
    from avg_mlx.model.inventory import fingerprint
    from avg_mlx.training import instruct, rglf
    from avg_mlx.weights.adapters import AdapterConfig, save_adapters, trained_tensors

    model, _ = load(model_folder)
    mx.random.seed(0)
    if kind == "router":
        config = AdapterConfig(num_layers=0, base_model=fingerprint(model))
        rglf.prepare(model, fresh=True)
    else:
        lora = None if kind == "full" else {"rank": 2, "scale": 2.0, "dropout": 0.0}
        config = AdapterConfig(kind, -1, lora, fingerprint(model))
        instruct.prepare(model, config, instruct.Trainable(projector=True, newline=True), grad_checkpoint=False)
    moved = {name: array + 0.05 * mx.random.normal(array.shape) for name, array in trained_tensors(model).items()}
    save_adapters(folder, config, moved)
    return folder


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """The crops of each pass through the vision tower, as they come."""
    from avg_mlx.model.vision import VisionTower

    seen: list[int] = []
    tower = VisionTower.__call__
    monkeypatch.setattr(VisionTower, "__call__", lambda self, pixels: seen.append(len(pixels)) or tower(self, pixels))
    return seen


@pytest.fixture
def encoded(tiny, monkeypatch) -> list[int]:
    """The lengths of the texts that are tokenized, as they come."""
    kind, lengths = type(tiny[1]._tokenizer), []  # within mlx-lm's wrapper
    encode = kind.encode
    monkeypatch.setattr(
        kind, "encode", lambda self, text, **how: lengths.append(len(text)) or encode(self, text, **how)
    )
    return lengths
