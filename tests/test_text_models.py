"""LLaVA-NeXT with other language models, against transformers itself, which makes the checkpoints and the numbers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import write_checkpoint
from test_golden_llava import GOLDEN, Case, renamed

from avg_mlx import Quantization, convert, generate, load
from avg_mlx.cli.bench import main as bench
from avg_mlx.inputs.image import make_crops
from avg_mlx.inputs.image_io import read_image
from avg_mlx.inputs.prompt import build_messages, encode_messages
from avg_mlx.training.options import InstructOptions, RouterOptions
from avg_mlx.training.stages import train_instruct, train_router
from avg_mlx.weights.exporting import export
from avg_mlx.weights.fusing import fuse

TOLERANCE = 1e-3
SIZES = {
    **{"vocab_size": 960, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2},
}
TEXT_MODELS = {
    "llama": {
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0}
        | {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
    },
    "mistral": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "sliding_window": None, "head_dim": 16},
    "qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen3": {"head_dim": 16},
}


@pytest.fixture(scope="module", params=TEXT_MODELS)
def made(request, tmp_path_factory):
    """(checkpoint, transformers' model and processor) with random weights."""
    pytest.importorskip("torch")
    from transformers import CONFIG_MAPPING, AutoProcessor, LlavaNextConfig, LlavaNextForConditionalGeneration, set_seed

    checkpoint = tmp_path_factory.mktemp(request.param) / "checkpoint"
    keys = json.loads((GOLDEN / "next" / "checkpoint" / "config.json").read_text())
    text = CONFIG_MAPPING[request.param](**SIZES, **TEXT_MODELS[request.param])
    names = ("image_grid_pinpoints", "image_token_index", "vision_config")
    set_seed(0)
    model = LlavaNextForConditionalGeneration(LlavaNextConfig(text_config=text, **{n: keys[n] for n in names})).eval()
    processor = AutoProcessor.from_pretrained(GOLDEN / "next" / "checkpoint", backend="pil")
    model.save_pretrained(checkpoint)
    processor.save_pretrained(checkpoint)
    return checkpoint, model, processor


def sparse(checkpoint: Path) -> None:
    """Leave out of text_config what equals the class's defaults, as configs on the Hub do."""
    from transformers import CONFIG_MAPPING

    keys = json.loads((checkpoint / "config.json").read_text())
    default = CONFIG_MAPPING[keys["text_config"]["model_type"]]().to_dict()
    kept = {n: v for n, v in keys["text_config"].items() if n == "model_type" or default.get(n, ...) != v}
    assert len(kept) < len(keys["text_config"])
    (checkpoint / "config.json").write_text(json.dumps(keys | {"text_config": kept}))


def old(checkpoint: Path) -> None:
    """With the names of transformers 4, and its rope_theta."""
    renamed(checkpoint, ("vision_tower.", "vision_tower.vision_model."))
    keys = json.loads((checkpoint / "config.json").read_text())
    rope = keys["text_config"].pop("rope_parameters")
    keys["text_config"]["rope_theta"] = rope.pop("rope_theta")
    if rope["rope_type"] != "default":
        keys["text_config"]["rope_scaling"] = rope
    keys["torch_dtype"] = keys.pop("dtype")
    (checkpoint / "config.json").write_text(json.dumps(keys))


@pytest.mark.slow
@pytest.mark.parametrize("spelling", [lambda _: None, sparse, old], ids=["as saved", "sparse", "transformers 4"])
def test_logits_and_greedy_tokens(made, spelling, tmp_path):
    import torch
    from PIL import Image

    checkpoint, theirs, processor = made
    spelled = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    spelling(spelled)
    convert(spelled, tmp_path / "model")
    model, tokenizer = load(tmp_path / "model")
    for case in (Case("next", 0), Case("next", 4)):
        prompt = case.said["prompt"]
        inputs = processor(text=case.said["text"], images=Image.open(case.image).convert("RGB"), return_tensors="pt")
        with torch.no_grad():
            expected = theirs(**inputs).logits[0].numpy()
            tokens = theirs.generate(**inputs, max_new_tokens=16, do_sample=False, eos_token_id=None)
        ids = encode_messages(tokenizer, build_messages(prompt, images=1))
        crops = make_crops(read_image(case.image), model.config)
        seen = model.pack(model.encode(crops), model.config.finest, crops)
        logits = np.array(model(model.splice(ids, model.embed_text(ids), [seen])[None])[0])
        assert logits.shape == expected.shape
        assert np.abs(logits - expected).max() < TOLERANCE
        assert np.array_equal(logits.argmax(axis=-1), expected.argmax(axis=-1))
        answer = generate(model, tokenizer, prompt, case.image, granularity=model.config.finest, max_tokens=16)
        new = tokens[0, inputs["input_ids"].shape[1] :].tolist()
        assert list(answer.token_ids) == new[: len(answer.token_ids)]
        assert len(answer.token_ids) == 16 or answer.token_ids[-1] in tokenizer.eos_token_ids


@pytest.mark.slow
def test_an_export_is_what_transformers_loads(made, tmp_path):
    import torch
    from PIL import Image
    from transformers import AutoProcessor, LlavaNextForConditionalGeneration

    checkpoint, theirs, processor = made
    convert(checkpoint, tmp_path / "model")
    export(tmp_path / "model", tmp_path / "exported")
    again = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "exported").eval()
    processor_again = AutoProcessor.from_pretrained(tmp_path / "exported", backend="pil")
    case = Case("next", 0)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": case.said["prompt"]}]}]
    assert processor_again.apply_chat_template(messages, add_generation_prompt=True) == case.said["text"]
    with torch.no_grad():
        one, other = (
            model(**read(text=case.said["text"], images=Image.open(case.image).convert("RGB"), return_tensors="pt"))
            for model, read in ((theirs, processor), (again, processor_again))
        )
    assert torch.allclose(one.logits, other.logits, atol=1e-5)


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_a_model_is_trained_fused_quantized_asked_and_measured(name, data, tmp_path, capsys):
    """Without transformers: every part of this package with every language model."""
    write_checkpoint(tmp_path / "checkpoint", {"model_type": f"llava_{name}", "router_select": None, "head_dim": 32})
    convert(tmp_path / "checkpoint", tmp_path / "model")
    shared = {"model": str(tmp_path / "model"), "data": data, "iters": 1, "learning_rate": 1e-3}
    train_instruct(InstructOptions(**shared, adapter_path=tmp_path / "instruct"))
    train_router(RouterOptions(**shared, adapter_path=tmp_path / "router", base_adapters=tmp_path / "instruct"))
    fuse(tmp_path / "model", tmp_path / "router", tmp_path / "fused")
    convert(tmp_path / "fused", tmp_path / "quantized", quantization=Quantization(bits=4, group_size=32))
    trained = load(tmp_path / "model", adapter_path=tmp_path / "router")
    answers = [
        generate(*each, "What is this?", data.parent / "wide.png", max_tokens=4)
        for each in (trained, load(tmp_path / "fused"), load(tmp_path / "quantized"))
    ]
    assert answers[0].token_ids == answers[1].token_ids
    assert all(answer.views[0].source == "router" for answer in answers)
    few = ["--repeats", "1", "--warmup", "0", "--decode-tokens", "1", "--text-tokens", "120", "--image-size", "100x50"]
    assert bench(["--model", str(tmp_path / "fused"), *few, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["granularity"] for row in rows] == [1, 2, 4, 8, 16]
