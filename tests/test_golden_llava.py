"""LLaVA-NeXT and LLaVA-1.5 in the Hub's layout, against transformers' numbers, after convert → load from disk."""

import functools
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT
from safetensors.numpy import load_file, save_file

from avg_mlx import convert, generate, load
from avg_mlx.inputs.image import make_crops
from avg_mlx.inputs.image_io import read_image
from avg_mlx.inputs.prompt import PLACEHOLDER_ID, build_messages, encode_messages, literal, render
from avg_mlx.model.inventory import tensors_of
from avg_mlx.weights.checkpoint import build_model, load_model
from avg_mlx.weights.exporting import export

GOLDEN = Path(__file__).parent / "golden_llava"
FAMILIES = ("next", "llava15")
TOLERANCE = 1e-3
STEPS = 16  # greedy tokens


@dataclass(frozen=True)
class Case:
    """A picture and a question, and what transformers made of them."""

    family: str
    number: int

    @property
    def said(self) -> dict:
        return json.loads((GOLDEN / self.family / "cases.json").read_text())["cases"][self.number]

    @property
    def image(self) -> Path:
        return GOLDEN / self.family / self.said["image"]

    def __call__(self, name: str) -> np.ndarray:
        return _arrays(self.family)[f"case{self.number}_{name}"]


@functools.cache
def _arrays(family: str):
    return np.load(GOLDEN / family / "reference.npz")


CASES = [Case(family, number) for family in FAMILIES for number in range(6)]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.family}-{case.number}")


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = {family: tmp_path_factory.mktemp("hub") / family for family in FAMILIES}
    for family, folder in made.items():
        convert(GOLDEN / family / "checkpoint", folder)
    return made


@pytest.fixture(scope="session")
def loaded(folders):
    return {family: load(folder) for family, folder in folders.items()}


def test_there_are_as_many_cases_as_were_recorded():
    for family in FAMILIES:
        assert len(json.loads((GOLDEN / family / "cases.json").read_text())["cases"]) == 6


@every_case
def test_every_stage(case, loaded):
    model, tokenizer = loaded[case.family]
    messages = build_messages(case.said["prompt"], images=1)
    assert render(tokenizer, messages, awaits_answer=True) == case.said["text"]
    ids = encode_messages(tokenizer, messages)
    assert ids == case.said["input_ids"]

    crops = make_crops(read_image(case.image), model.config)
    assert len(crops) == case.said["crops"]
    assert np.array_equal(crops.pixels.transpose(0, 3, 1, 2)[:, :, ::12, ::12], case("pixel_values_sub"))

    visual_tokens = model.pack(model.encode(crops), model.config.finest, crops)
    assert len(visual_tokens) == case.said["visual_tokens"]
    some = np.array(visual_tokens)[:: max(1, len(visual_tokens) // 40)]
    assert np.abs(some - case("image_features_sub")).max() < TOLERANCE

    embeddings = model.splice(ids, model.embed_text(ids), [visual_tokens])
    assert len(embeddings) == case.said["sequence_length"]
    logits = model(embeddings[None])[0]
    assert np.abs(np.array(logits[-1]) - case("last_logits")).max() < TOLERANCE
    assert np.array_equal(mx.argmax(logits, axis=-1), case("argmax"))


@every_case
def test_greedy_tokens(case, loaded):
    model, tokenizer = loaded[case.family]
    granularity = model.config.finest
    answer = generate(model, tokenizer, case.said["prompt"], case.image, granularity=granularity, max_tokens=STEPS)
    assert list(answer.token_ids) == case.said["token_ids"]
    assert answer.prompt_tokens == case.said["sequence_length"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_case_through_the_two_scripts(family, tmp_path):
    """One by itself, and all of them as a file of questions; a model without a router needs no flag."""
    cases = [case for case in CASES if case.family == family]

    def script(name: str, *arguments) -> str:
        command = [sys.executable, str(ROOT / name), *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
        assert name == "generate.py" or not done.stderr  # where there is no PyTorch, transformers would say so
        return done.stdout

    script("convert.py", "--hf-path", GOLDEN / family / "checkpoint")
    asked = [{"id": c.number, "image": str(c.image), "prompt": c.said["prompt"], "max_tokens": STEPS} for c in cases]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
    lines = script("generate.py", "--batch", "asked.jsonl", "--output", "-").splitlines()
    alone = ("--prompt", cases[0].said["prompt"], "--image", cases[0].image, "--max-tokens", STEPS, "--json")
    answers = {answer["id"]: answer for answer in map(json.loads, lines)}
    answers["alone"] = json.loads(script("generate.py", *alone))
    for key, case in [*((case.number, case) for case in cases), ("alone", cases[0])]:
        assert answers[key]["token_ids"] == case.said["token_ids"]
        assert answers[key]["prompt_tokens"] == case.said["sequence_length"]
        assert answers[key]["visual_tokens"] == case.said["visual_tokens"]
        assert answers[key]["granularity_source"] == "finest"


def tensors_in(folder: Path) -> dict[str, np.ndarray]:
    return {name: array for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}


def assert_same_model(one: Path, other: Path) -> None:
    ours, theirs = tensors_in(one), tensors_in(other)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(array, theirs[name]) for name, array in ours.items())
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert json.loads((one / name).read_text()) == json.loads((other / name).read_text()), name


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_is_converted_to_the_same_model(family, folders, tmp_path):
    export(folders[family], tmp_path / "exported")
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["text_config"]["model_type"] == "llama"
    convert(tmp_path / "exported", tmp_path / "again")
    assert_same_model(tmp_path / "again", folders[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_router_survives_the_export(family, folders, tmp_path):
    adaptive = Path(shutil.copytree(folders[family], tmp_path / "adaptive"))
    keys = json.loads((adaptive / "config.json").read_text())
    keys |= {"vis_token_granularity": [36, 9, 4], "filtered_text_num": 7, "router_select": True}
    (adaptive / "config.json").write_text(json.dumps(keys))
    model = build_model(keys, ())
    rng = np.random.default_rng(0)
    router = {n: rng.normal(size=a.shape).astype("f4") for n, a in tensors_of(model).items() if n[:6] == "router"}
    save_file(tensors_in(adaptive) | router, adaptive / "model.safetensors")
    load_model(adaptive, keys)
    export(adaptive, tmp_path / "exported")
    convert(tmp_path / "exported", tmp_path / "again")
    assert_same_model(tmp_path / "again", adaptive)


def renamed(checkpoint: Path, *rules) -> None:
    """Rename a checkpoint's tensors."""
    tensors = load_file(checkpoint / "model.safetensors")
    for old, new in rules:
        tensors = {name.replace(old, new, 1) if name.startswith(old) else name: a for name, a in tensors.items()}
    save_file(tensors, checkpoint / "model.safetensors")


def rewrite(file: Path, change) -> None:
    keys = json.loads(file.read_text())
    change(keys)
    file.write_text(json.dumps(keys))


def old_names(checkpoint: Path) -> None:
    """As transformers 4 wrote a checkpoint, without what its config classes have by default."""
    renamed(checkpoint, ("vision_tower.", "vision_tower.vision_model."))

    def older(keys: dict) -> None:
        keys["torch_dtype"] = keys.pop("dtype")
        text = keys["text_config"]
        text.pop("rope_parameters")  # 10,000 is the default
        for name in ("attention_bias", "attention_dropout", "bos_token_id", "eos_token_id", "head_dim", "hidden_act"):
            text.pop(name)
        for name in ("mlp_bias", "pad_token_id", "pretraining_tp", "tie_word_embeddings", "num_key_value_heads"):
            text.pop(name)
        for name in ("hidden_act", "layer_norm_eps", "num_channels"):
            keys["vision_config"].pop(name)
        for name in ("vision_feature_layer", "vision_feature_select_strategy", "projector_hidden_act"):
            keys.pop(name)

    rewrite(checkpoint / "config.json", older)
    processor = json.loads((checkpoint / "processor_config.json").read_text())
    (checkpoint / "preprocessor_config.json").write_text(json.dumps(processor.pop("image_processor")))
    (checkpoint / "processor_config.json").write_text(json.dumps(processor))
    template = (checkpoint / "chat_template.jinja").read_text()
    (checkpoint / "chat_template.jinja").unlink()
    (checkpoint / "chat_template.json").write_text(json.dumps({"chat_template": template}))


def names_in_memory(checkpoint: Path) -> None:
    """As transformers 5 calls its tensors."""
    renamed(
        checkpoint,
        ("language_model.lm_head.", "lm_head."),
        ("language_model.model.", "model.language_model."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
        ("image_newline", "model.image_newline"),
    )


def rope_theta_beside(checkpoint: Path) -> None:
    def change(keys: dict) -> None:
        keys["text_config"] |= {"rope_theta": keys["text_config"].pop("rope_parameters")["rope_theta"]}

    rewrite(checkpoint / "config.json", change)


def template_in_the_tokenizer_config(checkpoint: Path) -> None:
    template = (checkpoint / "chat_template.jinja").read_text()
    (checkpoint / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]
    rewrite(checkpoint / "tokenizer_config.json", lambda keys: keys.update(chat_template=named))


def template_in_the_processor_config(checkpoint: Path) -> None:
    template = (checkpoint / "chat_template.jinja").read_text()
    (checkpoint / "chat_template.jinja").unlink()
    rewrite(checkpoint / "processor_config.json", lambda keys: keys.update(chat_template=template))


def no_generation_config(checkpoint: Path) -> None:
    """Then the text model says where answers end."""
    (checkpoint / "generation_config.json").unlink()


SPELLINGS = (
    *(old_names, names_in_memory, rope_theta_beside),
    *(template_in_the_tokenizer_config, template_in_the_processor_config, no_generation_config),
)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_spelling_of_a_checkpoint_is_the_same_model(family, spelling, folders, tmp_path):
    checkpoint = Path(shutil.copytree(GOLDEN / family / "checkpoint", tmp_path / "checkpoint"))
    spelling(checkpoint)
    convert(checkpoint, tmp_path / "model")
    assert_same_model(tmp_path / "model", folders[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_escaped_placeholder_is_no_image(family, loaded):
    """Though `<image>` is a token of these tokenizers."""
    _, tokenizer = loaded[family]
    ids = encode_messages(tokenizer, build_messages(f"<image>\n{literal('Where is <image> here?')}", 1))
    assert ids.count(PLACEHOLDER_ID) == 1
    assert tokenizer.get_vocab()["<image>"] not in ids
    assert "Where is <image> here?" in tokenizer.decode([id for id in ids if id != PLACEHOLDER_ID])
