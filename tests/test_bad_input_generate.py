"""What `generate.py` says to input that it cannot use: one line, exit status 2, and nothing on stdout."""

import io
import json
import re
import struct
import sys
import zlib

import mlx.core as mx
import numpy as np
import pytest
from conftest import CASES, CHECKPOINT, GOLDEN, PHOTO

from avg_mlx.cli import convert as convert_cli
from avg_mlx.cli.generate import main

IMAGE = GOLDEN / CASES[0]["image"]


@pytest.fixture
def ask(refused, converted):
    """`ask(*arguments)`: the line with which the golden model refuses them; a prompt is added if there is none."""

    def run(*arguments, model=converted, status=2) -> str:
        prompt = [] if "-p" in arguments else ["-p", "What is it?"]
        line = refused(main, "--model", model, *prompt, *arguments, status=status)
        assert line.startswith("generate.py: ")
        return line.removeprefix("generate.py: ")

    return run


def change_keys(file, **changes) -> None:
    """Set keys of a JSON file; None takes one away."""
    keys = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in keys.items() if value is not None}))


# The model's folder


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/no/where/at-all", "a/b/c", "../owner/name"])
def test_no_such_folder(ask, name):
    assert ask(model=name) == f"there is no folder {name}; give a folder, a Hub repository such as owner/name, or demo"


def test_hub_that_does_not_answer(ask, monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    line = ask(model="owner/name", status=1)
    assert line == "there is no folder owner/name, and the Hub did not deliver it (no route)"


def test_file_instead_of_a_folder(ask):
    assert ask(model=IMAGE) == f"{IMAGE} is a file; give the model's folder"


def test_folder_that_is_no_model(ask, tmp_path):
    assert ask(model=tmp_path) == f"{tmp_path} is not a model folder: it has no config.json; check the path"


@pytest.mark.parametrize("keys", [{"model_type": "llama"}, {"model_type": "llavanext"}, {"model_type": 5}, {}])
def test_model_of_another_type(ask, tmp_path, keys):
    (tmp_path / "config.json").write_text(json.dumps(keys))
    line = ask(model=tmp_path)
    assert line == f"model_type is {keys.get('model_type')!r}, but only 'llava_llama' and its like can be run"


def test_pytorch_checkpoint(ask):
    line = ask(model=CHECKPOINT)
    assert "this is a PyTorch checkpoint" in line
    assert line.endswith("convert it first: avg-mlx convert --hf-path FOLDER")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "is not valid JSON"),
        (b'{"model_type": "llava_llama",', "is not valid JSON"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"[1, 2]", "holds a list, expected an object"),
        (b'"llava_llama"', "holds a str, expected an object"),
        (b"null", "holds a NoneType, expected an object"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_malformed_json(ask, model_folder, name, content, found):
    (model_folder / name).write_bytes(content)
    line = ask(model=model_folder)
    assert line.startswith(f"{model_folder / name} {found}")
    assert line.endswith("; download it again")


def test_all_missing_keys_are_listed(ask, model_folder):
    change_keys(model_folder / "config.json", hidden_size=None, vocab_size=None, rms_norm_eps=None)
    line = ask(model=model_folder)
    assert line.startswith("config.json lacks hidden_size, vocab_size, rms_norm_eps; ")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("hidden_size", "64", "a whole number above 0"),
        ("hidden_size", 64.0, "a whole number above 0"),
        ("hidden_size", [64], "a whole number above 0"),
        ("num_hidden_layers", True, "a whole number above 0"),
        ("num_attention_heads", 0, "a whole number above 0"),
        ("vocab_size", -512, "a whole number above 0"),
        ("num_key_value_heads", "4", "a whole number above 0"),
        ("tokenizer_model_max_length", "4096", "a number"),
        ("filtered_text_num", "32", "a whole number from 0"),
        ("filtered_text_num", -1, "a whole number from 0"),
        ("rms_norm_eps", "1e-5", "a number"),
        ("rope_theta", [10000], "a number"),
        ("router_select", "true", "true or false"),
        ("tie_word_embeddings", 0, "true or false"),
        ("image_aspect_ratio", ["anyres"], "a text"),
        ("mm_projector_type", 2, "a text"),
        ("rope_scaling", "linear", "an object"),
        ("quantization", 4, "an object"),
        ("vision_config", "clip", "an object"),
    ],
)
def test_value_of_another_type(ask, model_folder, key, value, expected):
    change_keys(model_folder / "config.json", **{key: value})
    line = ask(model=model_folder)
    assert line.startswith(f"config.json is damaged: {key} is {value!r}, expected {expected}")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("hidden_size", "48", "a whole number above 0"),
        ("patch_size", 0, "a whole number above 0"),
        ("layer_norm_eps", "1e-5", "a number"),
        ("hidden_act", 1, "a text"),
        ("image_mean", 0.5, "a list of three numbers"),
        ("image_std", ["a", "b", "c"], "a list of three numbers"),
    ],
)
def test_value_of_another_type_in_the_towers_config(ask, model_folder, key, value, expected):
    file = model_folder / "config.json"
    change_keys(file, vision_config=json.loads(file.read_text())["vision_config"] | {key: value})
    line = ask(model=model_folder)
    assert line.startswith(f"the vision tower's config is damaged: {key} is {value!r}, expected {expected}")
    assert line.endswith("; download it again")


def test_all_values_of_another_type_are_listed(ask, model_folder):
    change_keys(model_folder / "config.json", hidden_size="64", vocab_size="512")
    line = ask(model=model_folder)
    assert "hidden_size is '64', expected a whole number above 0" in line
    assert "; vocab_size is '512', expected" in line


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("quantization", {"bits": 4}, "group_size"),
        ("rope_scaling", {"type": "spiral"}, "spiral"),
        ("hidden_size", 60, "divisible"),
    ],
)
def test_config_that_mlx_refuses(ask, model_folder, key, value, found):
    change_keys(model_folder / "config.json", **{key: value})
    line = ask(model=model_folder)
    assert line.startswith("config.json describes no model (")
    assert found in line
    assert line.endswith("; download it again")


# Its weights


def test_missing_unexpected_and_misshapen_tensors_are_listed_at_once(ask, model_folder):
    file = model_folder / "model.safetensors"
    tensors = dict(mx.load(str(file)))
    del tensors["image_newline"], tensors["router.voter"]
    tensors["language_model.model.norm.weight"] = mx.zeros(65)
    tensors["vision_tower.class_embedding"] = mx.zeros((48, 1))
    tensors["extra.weight"] = tensors["more"] = mx.zeros(3)
    mx.save_safetensors(str(file), tensors)
    line = ask(model=model_folder)
    assert line.startswith(f"the tensors of {model_folder} do not fit its config: ")
    assert "2 missing (image_newline, router.voter); 2 unexpected (extra.weight, more); 2 misshapen (" in line
    assert "language_model.model.norm.weight is (65,), expected (64,)" in line
    assert "vision_tower.class_embedding is (48, 1), expected (48,)" in line


def test_no_weights(ask, model_folder):
    for file in model_folder.glob("model*.safetensors*"):
        file.unlink()
    assert ask(model=model_folder) == f"{model_folder} has no weights; expected *.safetensors or pytorch_model*.bin"


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[:100],
        lambda data: data[:5],
        lambda data: b"",
        lambda data: data + b"\0",
        lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1000\n",
        lambda data: struct.pack("<Q", 1 << 60) + data[8:],
    ],
    ids=["half", "but a byte", "header cut", "length cut", "empty", "too long", "pointer to a file", "endless header"],
)
def test_truncated_or_damaged_shard(ask, model_folder, damage):
    file = model_folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    line = ask(model=model_folder)
    assert line.startswith(f"{file} is truncated or damaged (")
    assert line.endswith("; download it again")


def test_index_that_names_absent_files(ask, model_folder):
    change_keys(
        model_folder / "model.safetensors.index.json",
        weight_map={"a": "model.safetensors", "b": "gone-2", "c": "gone-1", "d": "gone-2"},
    )
    line = ask(model=model_folder)
    assert line.endswith(f"names absent files: gone-1, gone-2; download them into {model_folder}")


@pytest.mark.parametrize("weight_map", [None, [], "model.safetensors", {"a": 5}, {"a": 5, "b": "c"}, {"a": ["b"]}])
def test_index_without_file_names(ask, model_folder, weight_map):
    change_keys(model_folder / "model.safetensors.index.json", weight_map=weight_map)
    assert "no weight_map of file names; download it again" in ask(model=model_folder)


def test_tensors_of_a_type_that_mlx_has_not(ask, model_folder):
    from safetensors.numpy import save_file

    file = model_folder / "model.safetensors"
    arrays = {name: np.array(array) for name, array in mx.load(str(file)).items()}
    save_file(arrays | {"image_newline": np.zeros(64)}, file)
    line = ask(model=model_folder)
    assert line.startswith(
        f"1 of the tensors of {model_folder} cannot be computed with (the first: image_newline is float64"
    )
    assert line.endswith("; convert the checkpoint again")


# Its tokenizer


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[]"),
        ("tokenizer_config.json", None),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast"}'),
    ],
)
def test_missing_or_broken_tokenizer(ask, model_folder, name, content):
    if content is None:
        (model_folder / name).unlink()
    else:
        (model_folder / name).write_text(content)
    line = ask(model=model_folder)
    assert re.match(rf"{model_folder}( has no usable tokenizer \(|/{name} )", line)
    assert line.endswith(" again")


# The image


def test_image_that_cannot_be_used(ask, tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "notes.png").write_text("not an image")
    (tmp_path / "half.jpg").write_bytes(PHOTO.read_bytes()[:10_000])
    (tmp_path / "flipped.png").write_bytes(IMAGE.read_bytes()[:400] + bytes(400) + IMAGE.read_bytes()[800:])
    for image, found in {
        tmp_path / "none.png": "no image at {}; give a path, an http(s) URL, a data URI or -",
        tmp_path: "{} is a folder; give an image file",
        tmp_path / "empty.png": "{} is empty; give an image file",
        tmp_path / "notes.png": "{} is not an image that can be read here",
        tmp_path / "half.jpg": "{} is damaged and cannot be decoded (",
        tmp_path / "flipped.png": "{} is damaged and cannot be decoded (",
        "http://127.0.0.1:1/a.png": "{} cannot be read (",
        "file:///etc/hosts": "no image at {}; give a path",
        "data:image/png;base64,****": "the data URI is not valid base64 (",
    }.items():
        assert ask("--image", image).startswith(found.format(image))


def test_second_image_that_cannot_be_used(ask, tmp_path):
    assert ask("--image", IMAGE, tmp_path / "none.png").startswith(f"no image at {tmp_path}/none.png")


def test_image_above_the_pixel_limit(ask):
    line = ask("--image", PHOTO, "--max-pixels", 100_000)
    assert re.fullmatch(
        rf"{PHOTO} is too large: \d+×\d+ = 0\.1 megapixels, above the limit of 0\.1 megapixels; "
        "make it smaller or raise the limit with --max-pixels",
        line,
    )


def test_decompression_bomb(ask, tmp_path):
    bomb = bytearray(IMAGE.read_bytes())
    bomb[16:24] = struct.pack(">II", 60_000, 60_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    (tmp_path / "bomb.png").write_bytes(bomb)
    line = ask("--image", tmp_path / "bomb.png")
    assert line.startswith(f"{tmp_path}/bomb.png is too large: ")
    assert "60000×60000 = 3600.0 megapixels" in line
    assert line.endswith("above the limit of 64 megapixels; make it smaller or raise the limit with --max-pixels")


# The prompt and standard input


@pytest.fixture
def stdin(monkeypatch):
    return lambda data: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.mark.parametrize("prompt", ["", " ", "\n\t ", "<image>", " <image>\n"])
@pytest.mark.parametrize("images", [0, 1])
def test_empty_prompt(ask, prompt, images):
    assert ask("-p", prompt, *["--image", IMAGE][: 2 * images]) == "the prompt is empty; ask something"


def test_empty_prompt_on_standard_input(ask, stdin):
    stdin(b"\n")
    assert ask("-p", "-") == "the prompt is empty; ask something"


def test_prompt_that_is_not_text(ask, stdin):
    stdin(b"What is \xff?")
    assert ask("-p", "-") == "the prompt on standard input is not UTF-8 text; save it as UTF-8"
    for flag in ("-p", "--system-prompt", "--extra-eos-token"):
        assert ask(flag, "What is \udcff?").endswith(": this is not UTF-8 text; see generate.py --help")


@pytest.mark.parametrize(
    ("prompt", "placeholders", "images"),
    [("<image> what?", 1, 0), ("<image> and <image>?", 2, 1), ("<image> and <image>?", 2, 0), ("<image> what?", 1, 2)],
)
def test_placeholders_that_are_not_as_many_as_images(ask, prompt, placeholders, images):
    line = ask("-p", prompt, *(["--image", *[IMAGE] * images] if images else []))
    assert line.startswith(f"the prompt has {placeholders} <image>, but {images} images were given; ")


def test_standard_input_given_twice(ask):
    for arguments in (("-p", "-", "--image", "-"), ("--image", "-", "-"), ("--image", "-", "--image", "-")):
        line = ask(*arguments)
        assert line == "standard input can be read once; give - for the prompt or for one image"


def test_empty_standard_input_as_image(ask, stdin):
    stdin(b"")
    assert ask("--image", "-") == "the image is empty; give an image file"


def test_prompt_over_the_context_length(ask):
    line = ask("-p", "what " * 5000)
    expected = (
        r"the prompt takes (\d+) positions \(\1 for text, the rest for images\) but the model has 4096; shorten it"
    )
    assert re.match(expected, line)


def test_image_and_prompt_over_the_context_length(ask):
    case = CASES[0]
    room = 4096 - case["sequence_lengths"][-1]
    line = ask("--image", IMAGE, "--granularity", 576, "-p", case["prompt"] + " \n" * room)
    assert "positions (" in line
    assert "look less closely with granularity or --max-visual-tokens" in line


# Granularity


@pytest.mark.parametrize("granularity", ["37", "0", "-36", "1152"])
def test_granularity_that_the_model_has_not(ask, granularity):
    line = ask("--image", IMAGE, "--granularity", granularity)
    assert line == f"granularity is {granularity}; choose auto or one of this model's: 36, 72, 144, 288, 576"


@pytest.mark.parametrize("granularity", ["finest", "36.0", "", "36,72"])
def test_granularity_that_is_no_number(ask, granularity):
    line = ask("--granularity", granularity)
    assert f"{granularity} is neither auto nor a number of visual tokens per crop" in line


def test_forced_granularity_with_a_budget(ask):
    line = ask("--image", IMAGE, "--granularity", 36, "--max-visual-tokens", 100)
    assert line == "granularity 36 forces a choice and --max-visual-tokens limits the router's; give one"


def test_budget_too_small_for_any_granularity(ask):
    case = CASES[0]
    smallest = case["sequence_lengths"][0] - case["prompt_tokens"]
    line = ask("--image", IMAGE, "--max-visual-tokens", smallest - 1)
    assert line == f"no granularity fits into {smallest - 1} visual tokens; this image takes at least {smallest}"


@pytest.fixture
def stage3_folder(checkpoint, tmp_path, capfd):
    """A converted checkpoint from before the router was trained: its shards and index do not know it."""
    index = checkpoint / "model.safetensors.index.json"
    for shard in checkpoint.glob("*.safetensors"):
        tensors = {name: array for name, array in mx.load(str(shard)).items() if not name.startswith("model.router.")}
        mx.eval(tensors)
        shard.unlink()
        mx.save_safetensors(str(shard), tensors)
    weight_map = json.loads(index.read_text())["weight_map"]
    change_keys(index, weight_map={k: v for k, v in weight_map.items() if not k.startswith("model.router.")})
    folder = tmp_path / "stage3"
    assert convert_cli.main(["--hf-path", str(checkpoint), "--mlx-path", str(folder)]) == 0
    capfd.readouterr()
    return folder


def test_model_without_a_router(ask, stage3_folder):
    line = ask("--image", IMAGE, "--granularity", 16, model=stage3_folder)
    assert line == "granularity is 16; choose auto or one of this model's: 36, 72, 144, 288, 576"
    line = ask("--image", IMAGE, "--max-visual-tokens", 3, model=stage3_folder)
    assert line.startswith("no granularity fits into 3 visual tokens")


# Options


COUNT = "is not a whole number from 1 up to 2147483647"


@pytest.mark.parametrize(
    ("flag", "values", "expected"),
    [
        ("--max-tokens", ["0", "-2", "1.5", "many", "nan", 2**31], COUNT),
        ("-m", ["0"], COUNT),
        ("--max-visual-tokens", ["0", "-5", "x", 2**31], COUNT),
        ("--token-cost", ["-1", "inf", "nan", "x"], "is not a number from 0 upwards"),
        ("--max-pixels", ["0", "-1", "1e6", "x", 2**31], COUNT),
        ("--prefill-step-size", ["0", "-1", "x", 2**31], COUNT),
        ("--repetition-context-size", ["0", "x", 2**31], COUNT),
        ("--max-kv-size", ["4", "-1", "x"], "is not a whole number from 5 upwards"),
        ("--quantized-kv-start", ["-1", "x"], "is not a whole number from 0 upwards"),
        ("--top-k", ["-1", "0.5", "x"], "is not a whole number from 0 upwards"),
        ("--seed", ["-1", "x", 2**64], "is not a whole number from 0 up to 18446744073709551615"),
        ("--temp", ["-0.1", "inf", "nan", "hot"], "is not a number from 0 upwards"),
        ("--temperature", ["-1"], "is not a number from 0 upwards"),
        ("--top-p", ["0", "-0.1", "1.01", "nan", "x"], "is not a number above 0 up to 1"),
        ("--min-p", ["-0.1", "1.01", "nan", "x"], "is not a number from 0 up to 1"),
        ("--repetition-penalty", ["0", "-1", "inf", "nan", "x"], "is not a number above 0 upwards"),
        ("--kv-bits", ["1", "7", "9", "0", "-4"], "choose from 2, 3, 4, 5, 6, 8"),
        ("--kv-bits", ["x", "4.0"], "invalid int value"),
        ("--kv-group-size", ["0", "16", "96"], "choose from 32, 64, 128"),
        ("--kv-group-size", ["x"], "invalid int value"),
    ],
)
def test_option_out_of_its_range(ask, flag, values, expected):
    for value in values:
        line = ask(flag, value)
        assert re.match(rf"argument \S*{flag}[\S]*: ", line)
        assert str(value) in line
        assert expected in line
        assert line.endswith("; see generate.py --help")


def test_top_k_beyond_the_vocabulary(ask):
    line = ask("--temp", 1, "--top-k", 512)
    assert line.startswith("--top-k is 512, but this model has 512 tokens; ")


@pytest.mark.parametrize("token", ["no such token", "512", "-1", ""])
def test_unknown_extra_eos_token(ask, token):
    line = ask("--extra-eos-token", "</s>", token)
    assert line == f"{token!r} is not a token of this model; --extra-eos-token takes tokens or their numbers"


def test_rotating_cache_that_is_quantized(ask):
    line = ask("--kv-bits", 4, "--max-kv-size", 64)
    assert "(--max-kv-size) cannot be quantized (--kv-bits)" in line


@pytest.mark.parametrize("size", [32, 64, 128])
def test_kv_group_size_that_does_not_divide_the_head_size(ask, size):
    line = ask("--kv-bits", 4, "--kv-group-size", size)
    assert line.startswith(f"--kv-group-size {size} does not divide this model's head size 16; ")


def test_kv_bits_where_no_group_fits(ask):
    line = ask("--kv-bits", 4)
    assert line.startswith("--kv-group-size 64 or 32 does not divide this model's head size 16; ")


def test_paths_that_are_spelled_like_options_are_left_alone(ask):
    assert "no image at max_tokens.png" in ask("--image", "max_tokens.png")
    assert "no image at x/kv_bits" in ask("--image", "x/kv_bits")


def test_output_without_batch(ask, tmp_path):
    assert "--output is for the answers of --batch" in ask("--output", tmp_path / "answer.txt")
    assert list(tmp_path.iterdir()) == []


def test_missing_and_unknown_flags(refused, capfd):
    assert refused(main) == "generate.py: one of the arguments --prompt/-p --batch is required; see generate.py --help"
    assert refused(main, "-p", "a", "--colour", "red").startswith(
        "generate.py: unrecognized arguments: --colour red; see"
    )
    assert "--max-tokns 3; did you mean --max-tokens?" in refused(main, "-p", "a", "--max-tokns", 3)
    assert refused(main, "-p", "a", "") == "generate.py: unrecognized arguments:; see generate.py --help"
    assert "expected at least one argument; see generate.py --help" in refused(main, "-p", "a", "--image")
    assert "expected one argument; see generate.py --help" in refused(main, "-p")


def test_errors_of_several_lines_are_said_in_one(ask):
    assert ask("--granularity", "a\nb").startswith("argument --granularity: a b is neither")
    assert ask("--image", "a\nb.png").startswith("no image at a b.png; ")


# Everything else


def test_verbose_shows_where(converted, capfd):
    status = main(["--model", str(converted), "-p", "", "--verbose"])
    out, err = capfd.readouterr()
    assert (status, out) == (2, "")
    assert err.startswith("BLAS on the CPU: ")
    assert err.splitlines()[1] == "Traceback (most recent call last):"
    assert err.splitlines()[-1] == "generate.py: the prompt is empty; ask something"


def test_unexpected_error(ask, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("the GPU\nis on fire")

    monkeypatch.setattr("avg_mlx.weights.checkpoint.load", fail)
    assert ask(status=1) == "unexpected RuntimeError: the GPU is on fire (--verbose tells where)"


def test_interrupt(ask, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("avg_mlx.weights.checkpoint.load", interrupt)
    assert ask(status=130) == "interrupted"


def test_json_prints_nothing_when_it_fails(ask):
    assert ask("--json", "-p", "") == "the prompt is empty; ask something"


def test_the_verb_calls_itself_by_its_name(capfd):
    assert main(["--model", "nowhere", "-p", "a"], prog="avg-mlx generate") == 2
    assert capfd.readouterr().err.startswith("avg-mlx generate: there is no folder nowhere; ")


def test_model_folder_is_never_written(ask, converted):
    before = {file.name: file.read_bytes() for file in converted.iterdir()}
    ask("-p", "")
    ask("--image", "none.png")
    assert {file.name: file.read_bytes() for file in converted.iterdir()} == before


def test_more_tokens_kept_than_there_are(ask):
    assert "--min-tokens-to-keep is 600, but this model has 512 tokens" in ask("--min-tokens-to-keep", 600)
