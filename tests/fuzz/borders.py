"""What comes from outside, and how it is given to the package.

Each border prepares a folder, and returns the function that makes one hostile input and uses it as a caller would.
"""

import base64
import io
import json
import shutil
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from mutation import damaged_bytes, damaged_json, with_odd_value
from PIL import Image
from templates import hostile_template
from workers import Attempt, Border

from avg_mlx import InputError

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "golden" / "checkpoint"
HUB_CHECKPOINT = ROOT / "golden_llava" / "next" / "checkpoint"
PHOTO = ROOT / "photos" / "chelsea.jpg"

JSON = {"Content-Type": "application/json"}
EVIL = "raise SystemExit(open('EXECUTED', 'w').write('code of the folder was run'))\n"


def images(folder: Path) -> Attempt:
    """Damaged images of every format, as bytes and as files, cut into the crops of a model."""
    from avg_mlx.config import Config
    from avg_mlx.inputs.image import make_crops
    from avg_mlx.inputs.image_io import read_image, read_image_size

    seeds = list(_encoded_images())
    configs = [Config.from_dict(_keys() | {"image_aspect_ratio": way}) for way in ("anyres", "pad", "crop")]

    def attempt(random: Random) -> None:
        kind, content = random.choice(seeds)
        data = damaged_bytes(content, random) if random.random() < 0.97 else random.randbytes(random.randrange(200))
        source: Any = data
        if random.random() < 0.3:
            source = folder / f"picture.{random.choice([kind, 'png', 'eps', ''])}"
            source.write_bytes(data)
        read_image_size(source)
        make_crops(read_image(source), random.choice(configs))

    return attempt


def responses(folder: Path) -> Attempt:
    """Answers of a server that an image is fetched from."""
    from avg_mlx.inputs.image_io import read_image

    body = PHOTO.read_bytes()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    odd = [b"99999999999999999999", b"-1", b"ffffffffffffffff", b"\x1b[31m", b"\r\n", b"a" * 70_000, b"\x00", b": :"]
    lines = [b"Transfer-Encoding: chunked", b"Location: ftp://127.0.0.1/x", b"Location: file:///etc/passwd",
             b"Location: /again", b"Content-Encoding: gzip", b"Connection: keep-alive"]  # fmt: skip
    server = _Server()

    def attempt(random: Random) -> None:
        top = head
        for _ in range(random.randrange(3)):
            place = random.randrange(len(top))
            top = top[:place] + random.choice(odd) + top[place + random.randrange(3) :]
        if random.random() < 0.5:
            status = random.choice([b"200", b"301", b"302", b"404", b"500", b"999", b"-1", b"2" * 40])
            top = top.replace(b"200", status, 1).replace(b"\r\n", b"\r\n" + random.choice(lines) + b"\r\n", 1)
        server.answer = top + (body if random.random() < 0.7 else damaged_bytes(body, random)[: random.randrange(9999)])
        page = random.choice(["photo.jpg", "%00", "a b", "?key=secret"])
        read_image(f"http://127.0.0.1:{server.port}/{page}", timeout=2)

    attempt.address = ("127.0.0.1", server.port)
    return attempt


def configs(folder: Path) -> Attempt:
    """Damaged config.json of a converted model, which answers if it loads."""
    model, keys = _converted(folder), json.loads((folder / "model" / "config.json").read_text())

    def attempt(random: Random) -> None:
        (model / "config.json").write_bytes(damaged_json(keys, random))
        _answer(model)

    return attempt


def sources(folder: Path) -> Attempt:
    """Damaged configs of a checkpoint that is converted, in the authors' layout."""
    return _sources(folder, CHECKPOINT, ("config.json", "clip/config.json", "tokenizer_config.json"))


def hub_sources(folder: Path) -> Attempt:
    """The same in the Hub's layout."""
    names = ("config.json", "processor_config.json", "generation_config.json", "tokenizer_config.json")
    return _sources(folder, HUB_CHECKPOINT, names)


def _sources(folder: Path, original: Path, names: Sequence[str]) -> Attempt:
    from avg_mlx import convert

    checkpoint = folder / "checkpoint"
    shutil.copytree(original, checkpoint)
    files = [checkpoint / name for name in names]
    whole = {file: file.read_bytes() for file in files}
    convert(checkpoint, folder / "first")  # what is imported for it is not counted

    def attempt(random: Random) -> None:
        for file, content in whole.items():
            file.write_bytes(content)
        file = random.choice(files)
        file.write_bytes(damaged_json(json.loads(whole[file]), random))
        try:
            convert(checkpoint, folder / "new")
        finally:
            shutil.rmtree(folder / "new", ignore_errors=True)

    return attempt


def indexes(folder: Path) -> Attempt:
    """Damaged indexes of weight files, and damaged headers of the files themselves."""
    import mlx.core as mx

    model = _converted(folder)
    tensors = mx.load(str(model / "model.safetensors"))
    names = sorted(tensors)
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, some in parts.items():
        mx.save_safetensors(str(model / file), {name: tensors[name] for name in some})
        (model / f"{file}.whole").write_bytes((model / file).read_bytes())
    (model / "model.safetensors").rename(folder / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {name: file for file, some in parts.items() for name in some}}
    elsewhere = [
        "../outside.safetensors",
        str(folder / "outside.safetensors"),
        "config.json",
        ".",
        "",
        "/dev/zero",
        "x",
    ]

    def attempt(random: Random) -> None:
        for file in parts:
            (model / file).write_bytes((model / f"{file}.whole").read_bytes())
        changed = json.loads(json.dumps(index))
        content = json.dumps(changed).encode()
        match random.randrange(4):
            case 0:
                content = damaged_json(changed, random)
            case 1:
                place = random.choice(elsewhere)
                some = random.choice([names, names[: random.randrange(1, 9)]])
                changed["weight_map"] |= dict.fromkeys(some, place)
                content = json.dumps(changed).encode()
            case 2:
                file = model / random.choice(list(parts))
                file.write_bytes(_with_damaged_header(file.read_bytes(), random))
            case 3:
                (model / "one.safetensors").write_bytes((model / "two.safetensors").read_bytes())
        index_file = model / "model.safetensors.index.json"
        index_file.write_bytes(content)
        if random.random() < 0.3:
            index_file.unlink()
        _answer(model)

    return attempt


def chat_templates(folder: Path) -> Attempt:
    """Chat templates that are other people's programs."""
    model = _converted(folder)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    jinja = model / "chat_template.jinja"

    def attempt(random: Random) -> None:
        template = hostile_template(random, str(settings.get("chat_template", "")))
        jinja.unlink(missing_ok=True)
        if random.random() < 0.3:
            jinja.write_text(template, errors="replace")
        else:
            changed = json.dumps(settings | {"chat_template": template})
            (model / "tokenizer_config.json").write_text(changed)
        _answer(model)

    return attempt


def tokenizers(folder: Path) -> Attempt:
    """Damaged tokenizer.json and tokenizer_config.json."""
    model = _converted(folder)
    files = [model / "tokenizer.json", model / "tokenizer_config.json"]
    whole = {file: json.loads(file.read_text()) for file in files}
    growing = [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * size} for size in (2, 100, 10**5)]

    def attempt(random: Random) -> None:
        for file, content in whole.items():
            file.write_text(json.dumps(content))
        file = random.choice(files)
        content = json.loads(json.dumps(whole[file]))
        if file.name == "tokenizer.json" and random.random() < 0.5:
            del content["model"]  # most of its values: damages go to the rest
            rest = with_odd_value(content, random) if random.random() < 0.7 else content
            steps = [random.choice(growing) for _ in range(random.randrange(1, 9))]
            if isinstance(rest, dict):
                if random.random() < 0.5:
                    rest["normalizer"] = {"type": "Sequence", "normalizers": steps}
                file.write_text(json.dumps(rest | {"model": whole[file]["model"]}))
        else:
            file.write_bytes(damaged_json(content, random))
        _answer(model)

    return attempt


def adapters(folder: Path) -> Attempt:
    """Damaged adapters: their config, and their tensors' headers."""
    from avg_mlx import load
    from avg_mlx.model.inventory import fingerprint
    from avg_mlx.training import instruct
    from avg_mlx.weights.adapters import AdapterConfig, save_adapters, trained_tensors

    folder_of_model = _converted(folder)
    model, _ = load(folder_of_model)
    config = AdapterConfig("lora", -1, {"rank": 2, "scale": 2.0, "dropout": 0.0}, fingerprint(model))
    instruct.prepare(model, config, instruct.Trainable(projector=True), grad_checkpoint=False)
    trained = folder / "adapters"
    save_adapters(trained, config, trained_tensors(model))
    keys = json.loads((trained / "adapter_config.json").read_text())
    weights = (trained / "adapters.safetensors").read_bytes()

    def attempt(random: Random) -> None:
        header = random.random() < 0.4
        changed = json.dumps(keys).encode() if header else damaged_json(keys, random)
        (trained / "adapter_config.json").write_bytes(changed)
        (trained / "adapters.safetensors").write_bytes(_with_damaged_header(weights, random) if header else weights)
        _answer(folder_of_model, adapter_path=trained)

    return attempt


def data_files(folder: Path) -> Attempt:
    """Training data, questions, feedback and conversations, as lists and as lines."""
    from avg_mlx import load
    from avg_mlx.evaluation.questions import read_questions
    from avg_mlx.inference.batch import Request
    from avg_mlx.inference.batch_file import read_requests
    from avg_mlx.journal import Journal
    from avg_mlx.training.data import read_samples

    model, tokenizer = load(_converted(folder))
    shutil.copy(PHOTO, folder / "photo.jpg")
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]
    sample = {"id": "one", "image": "photo.jpg", "conversations": [*turns, *turns[:0]]}
    question = {"id": "one", "image": "photo.jpg", "question": "What is this?", "answers": ["cat"], "category": "a"}
    request = {"image": "photo.jpg", "prompt": "What is this?", "granularity": 4, "max_tokens": 3}

    def attempt(random: Random) -> None:
        record = random.choice([sample, question, request])
        records = [record] * random.choice([1, 2, 3])
        if random.random() < 0.5:
            content = damaged_json(records, random)
        else:
            content = b"\n".join(
                damaged_json(one, random) if random.random() < 0.5 else json.dumps(one).encode() for one in records
            )
        file = folder / random.choice(["data.json", "data.jsonl"])
        file.write_bytes(content)
        if record is sample:
            read_samples(file, None, tokenizer, model.config)
        elif record is question:
            read_questions(file, None, skip_bad=random.random() < 0.5)
        elif random.random() < 0.5:
            read_requests("the requests", content, folder, Request("Why?"))
        else:
            Journal(file).close()

    return attempt


def recipes(folder: Path) -> Attempt:
    """YAML files of options."""
    import yaml

    from avg_mlx.cli.options import read_yaml, values_of
    from avg_mlx.training.checked import options_of
    from avg_mlx.training.options import RglfOptions

    recipe = {
        "model": "model", "data": "data.json", "adapter-path": "out", "batch-size": 2, "learning-rate": 1e-3,
        "iters": 3, "fine-tune-type": "lora", "lora-parameters": {"rank": 2}, "router-epochs": 1,
    }  # fmt: skip
    required = {name: recipe[name.replace("_", "-")] for name in ("model", "data", "adapter_path")}
    laughs = "a0: &a0 [x]\n" + "".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(30))
    odd = ["!!python/object/apply:os.system ['touch EXECUTED']", "&a [*a]", "*b", "2024-13-45", "!!binary 'x'", ": :",
           "{" * 5000, "[" * 5000, "? " * 3000, "9" * 5000, "\t", "'", "!!timestamp x", "0o9", "<<: 3"]  # fmt: skip

    def attempt(random: Random) -> None:
        content = yaml.safe_dump(json.loads(json.dumps(recipe)))
        match random.randrange(4):
            case 0:
                content = damaged_json(recipe, random).decode(errors="surrogateescape")  # nearly all JSON is YAML
            case 1:
                content = damaged_bytes(content.encode(), random).decode(errors="surrogateescape")
            case 2:
                lines = content.splitlines()
                lines[random.randrange(len(lines))] = random.choice(["", "data: ", "- ", "  x: "]) + random.choice(odd)
                content = "\n".join(lines)
            case 3:
                content += laughs if random.random() < 0.5 else f"extra: {random.choice(odd)}\n"
        (folder / "recipe.yaml").write_bytes(content.encode(errors="surrogateescape"))
        given = values_of("recipe.yaml", read_yaml("recipe.yaml"), options_of(RglfOptions), "train rglf")
        RglfOptions(**required | given)

    return attempt


def pickles(folder: Path) -> Attempt:
    """Pickled checkpoints: programs, damaged archives, and tensors that are no plain weights."""
    from hostile_pickles import hostile_pickle

    from avg_mlx import convert

    checkpoint = folder / "checkpoint"
    shutil.copytree(CHECKPOINT, checkpoint, ignore=shutil.ignore_patterns("*.safetensors*"))

    def attempt(random: Random) -> None:
        (checkpoint / "pytorch_model.bin").write_bytes(hostile_pickle(random))
        try:
            convert(checkpoint, folder / "new")
        finally:
            shutil.rmtree(folder / "new", ignore_errors=True)

    return attempt


def requests(folder: Path) -> Attempt:
    """Bodies that clients send to the server, in all of its forms, streamed and whole."""
    from starlette.testclient import TestClient

    from avg_mlx import load
    from avg_mlx.inference.options import Looking
    from avg_mlx.serving.app import build_app
    from avg_mlx.serving.asking import Defaults
    from avg_mlx.serving.engine.thread import Engine
    from avg_mlx.serving.service import Options, Service

    model, media = _converted(folder), folder / "media"
    media.mkdir()
    shutil.copy(PHOTO, media)
    engine = Engine(lambda: load(model))
    engine.start()
    defaults = Defaults(Looking(max_pixels=10**6), max_tokens=3)
    app = build_app(Service(engine, Options("tiny", defaults, media_path=media, url_hosts=())))
    client = TestClient(app, "http://127.0.0.1", raise_server_exceptions=False)
    bodies = list(_bodies((media / PHOTO.name).as_uri()))

    def attempt(random: Random) -> None:
        path, body = random.choice(bodies)
        answer = client.post(f"/v1/{path}", content=damaged_json(body, random), headers=JSON)
        if answer.status_code >= 500:
            raise RuntimeError(f"status {answer.status_code}: {answer.text[:200]}")
        if answer.status_code >= 400:
            raise InputError(answer.json()["error"]["message"])
        if '"server_error"' in answer.text:
            raise RuntimeError(f"an event failed: {answer.text[-200:]}")

    return attempt


# What `make fuzz` gives to each, at least as many as docs/reliability.md promises.
BORDERS: dict[Border, int] = {
    images: 20_000,
    responses: 500,
    configs: 2_000,
    sources: 500,
    hub_sources: 500,
    indexes: 500,
    chat_templates: 500,
    tokenizers: 500,
    adapters: 500,
    data_files: 2_000,
    recipes: 500,
    pickles: 200,
    requests: 2_000,
}


def _keys() -> dict[str, Any]:
    keys = json.loads((CHECKPOINT / "config.json").read_text())
    return keys | {"vision_config": json.loads((CHECKPOINT / "clip" / "config.json").read_text())}


def _converted(folder: Path) -> Path:
    """The golden checkpoint as a model folder in one file, with Python beside it that nobody may run."""
    import mlx.core as mx

    from avg_mlx import convert

    model = folder / "model"
    convert(CHECKPOINT, model)
    parts = [mx.load(str(file)) for file in sorted(model.glob("*.safetensors"))]
    whole = {name: array for part in parts for name, array in part.items()}
    mx.eval(whole)
    for file in model.glob("*safetensors*"):
        file.unlink()
    mx.save_safetensors(str(model / "model.safetensors"), whole, metadata={"format": "mlx"})
    for name in ("a.py", "tokenization_a.py", "modeling_a.py"):
        (model / name).write_text(EVIL)
    return model


def _answer(model_folder: Path, **options: Any) -> None:
    """Load a model folder, and let it answer in two tokens."""
    from avg_mlx import generate, load

    model, tokenizer = load(model_folder, **options)
    generate(model, tokenizer, "What is this?", Image.new("RGB", (40, 30)), max_tokens=2)
    if Path("EXECUTED").exists():
        raise RuntimeError("code of the folder was run")


def _bodies(near: str):
    """(endpoint, a body that it answers) about a picture, or about one that lies near the server."""
    picture = io.BytesIO()
    Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 50).save(picture, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
    drawing = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3, "stop": ["a", "b"]}
    penalties = {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1, "logit_bias": {"5": -3}}
    text, shown = {"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": uri}}
    here = {"type": "image_url", "image_url": {"url": near, "detail": "low"}}
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [text, shown]},
        {"role": "assistant", "content": "A photo."},
        {"role": "user", "content": "Of what?"},
    ]
    for stream in (False, True):
        yield "chat/completions", {"model": "tiny", "messages": talk, "max_tokens": 2, "stream": stream, **drawing}
        options = {"logprobs": True, "top_logprobs": 2, "stream_options": {"include_usage": True}}
        yield "chat/completions", {"messages": [{"role": "user", "content": [here, text]}], "stream": stream, **options}
        asked = [{"type": "input_text", "text": "What?"}, {"type": "input_image", "image_url": uri, "detail": "high"}]
        message = {"type": "message", "role": "user", "content": asked}
        yield "responses", {"input": [message], "max_output_tokens": 2, "stream": stream, **penalties}
        yield "responses", {"input": "Hello", "instructions": "Be brief.", "stream": stream, "top_logprobs": 2}
    yield "route", {"messages": talk[1:2], "explain": True, "max_visual_tokens": 100, "max_tokens": 2}
    yield "route", {"messages": talk[1:2], "granularity": 36}


def _encoded_images():
    """(format's suffix, content) of small images in every format and mode."""
    Image.init()
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (37, 53, 4), dtype=np.uint8)
    rgb, rgba = Image.fromarray(pixels[..., :3]), Image.fromarray(pixels)
    deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    real = Image.fromarray(pixels[..., 0].astype(np.float32) / 255)
    with Image.open(PHOTO) as photo:
        small = photo.resize((120, 80))
    exif = Image.Exif()
    exif[0x0112] = 6
    for image, kind, options in (
        (rgb, "png", {}), (rgba, "png", {}), (deep, "png", {}), (rgb.quantize(9), "png", {"transparency": 3}),
        (rgb.convert("1"), "png", {}), (small, "jpeg", {"exif": exif}), (small, "jpeg", {"progressive": True}),
        (small.convert("CMYK"), "jpeg", {}), (rgb, "webp", {}), (rgba, "webp", {"lossless": True}),
        (rgb, "gif", {"save_all": True, "append_images": [rgb.rotate(90)]}), (rgb, "tiff", {}), (real, "tiff", {}),
        (deep, "tiff", {"compression": "tiff_lzw"}), (rgb, "tiff", {"compression": "jpeg"}), (rgb, "bmp", {}),
        (rgb.quantize(200), "bmp", {}), (rgb, "ppm", {}),
        (rgba.resize((32, 32)), "ico", {"sizes": [(16, 16), (32, 32)]}), (small, "jpeg2000", {}), (small, "avif", {}),
    ):  # fmt: skip
        if kind.upper() in Image.SAVE:  # AVIF is left out where Pillow comes without it
            file = io.BytesIO()
            image.save(file, kind, **options)
            yield kind, file.getvalue()


def _with_damaged_header(weights: bytes, random: Random) -> bytes:
    """A safetensors file whose header tells something else."""
    size = int.from_bytes(weights[:8], "little")
    header, arrays = json.loads(weights[8 : 8 + size]), weights[8 + size :]
    if random.random() < 0.3:
        return damaged_bytes(weights[: 8 + size], random) + arrays
    changed = damaged_json(header, random)
    told = random.choice([len(changed)] * 5 + [0, 1, 2**31, 2**63])
    return told.to_bytes(8, "little") + changed + (arrays if random.random() < 0.8 else arrays[: len(arrays) // 2])


class _Server:
    """Sends `answer` to whoever connects."""

    def __init__(self) -> None:
        self.answer = b""
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        threading.Thread(target=self._serve, args=(listener,), daemon=True).start()

    def _serve(self, listener: socket.socket) -> None:
        while True:
            connection, _ = listener.accept()
            with connection:
                try:
                    connection.recv(65536)
                    connection.sendall(self.answer)
                except OSError:
                    pass
