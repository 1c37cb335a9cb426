"""Checkpoints in the Hub's layout, and in older ones of the authors: what they become, and what is refused by name."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import CHECKPOINT, conversation, write_checkpoint, write_samples
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file, save_file
from test_golden_llava import GOLDEN, rewrite, tensors_in

from avg_mlx import AvgMlxError, InputError, Quantization, convert, generate, load
from avg_mlx.config import Config
from avg_mlx.inputs.image import make_crops
from avg_mlx.inputs.prompt import build_messages, encode_messages, literal, render
from avg_mlx.training.data import read_samples
from avg_mlx.weights.exporting import export


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture
def hub(tmp_path):
    """`hub(family)`: a copy of a golden checkpoint, to be changed."""
    return lambda family="next": Path(shutil.copytree(GOLDEN / family / "checkpoint", tmp_path / family))


def setting(file: str, *place: str, value):
    """A change of one key in one of a checkpoint's JSON files; `...` removes it."""

    def change(folder: Path) -> None:
        def put(keys: dict) -> None:
            for name in place[:-1]:
                keys = keys.setdefault(name, {})
            keys.pop(place[-1], None)
            if value is not ...:
                keys[place[-1]] = value

        rewrite(folder / file, put)

    return change


def config(*place: str, value):
    return setting("config.json", *place, value=value)


def processor(*place: str, value):
    return setting("processor_config.json", "image_processor", *place, value=value)


def template(text: str):
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


def without(name: str):
    return lambda folder: (folder / name).unlink()


REFUSED = {
    "SigLIP": (
        config("vision_config", "model_type", value="siglip_vision_model"),
        "siglip_vision_model",
        "only CLIP's",
    ),
    "several layers": (config("vision_feature_layer", value=[-2, -5]), "vision_feature_layer is [-2, -5]", "one layer"),
    "class token": (config("vision_feature_select_strategy", value="full"), "select_strategy is 'full'", "'default'"),
    "no newline": (config("use_image_newline_parameter", value=False), "use_image_newline_parameter is False", "True"),
    "other activation": (config("projector_hidden_act", value="relu"), "projector_hidden_act is 'relu'", "'gelu'"),
    "awq": (config("quantization_config", value={"quant_method": "awq", "bits": 4}), "quantized by 'awq'", "original"),
    "gptq": (config("quantization_config", value={"quant_method": "gptq"}), "quantized by 'gptq'", "original"),
    "bitsandbytes": (
        config("quantization_config", value={"quant_method": "bitsandbytes"}),
        "'bitsandbytes'",
        "original",
    ),
    "text only": (config("text_config", "model_type", value="gemma"), "'gemma'", "tested are llama, mistral"),
    "unknown": (config("text_config", "model_type", value="llamma"), "'llamma'", "transformers does not know"),
    "no text": (config("text_config", value=7), "text_config is 7", "expected an object"),
    "other gate": (config("text_config", "hidden_act", value="gelu"), "hidden_act is 'gelu'", "'silu'"),
    "window": (config("text_config", "sliding_window", value=100), "sliding_window is 100", "takes up to"),
    "layers": (config("text_config", "num_hidden_layers", value=10**9), "num_hidden_layers is 1000000000", "to 256"),
    "not of transformers": (config("text_config", "hidden_size", value="big"), "transformers refuses", "'big'"),
    "placeholder": (config("image_token_index", value=17), "no token <image>", "id 17"),
    "bilinear": (processor("resample", value=2), "resample is 2", "only 3"),
    "not normalized": (processor("do_normalize", value=False), "do_normalize is False", "True"),
    "other scale": (processor("rescale_factor", value=1 / 127.5), "rescale_factor", "1/255"),
    "other crops": (processor("crop_size", value={"height": 96, "width": 96}), "crop_size", "84 pixels"),
    "no template": (without("chat_template.jinja"), "no chat template", "chat_template.jinja"),
    "no tokenizer": (without("tokenizer.json"), "no tokenizer.json", "save one"),
    "broken tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json", "valid JSON"),
    "pinpoints": (config("image_grid_pinpoints", value=[[84, 100]]), "image_grid_pinpoints", "multiples of 84"),
    "tensors": (config("text_config", "intermediate_size", value=96), "9 misshapen", "do not fit"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_run_is_refused_by_name(what, hub, tmp_path):
    change, found, remedy = REFUSED[what]
    checkpoint = hub()
    change(checkpoint)
    with pytest.raises(InputError) as error:
        convert(checkpoint, tmp_path / "model")
    assert found in str(error.value)
    assert remedy in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["next"]


EACH = "{%% for m in messages %%}%s{%% endfor %%}"
PARTS = "{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        (EACH % PARTS.replace("{{ c.text }}", "{{ m.role }}"), "loses what the user says"),
        (EACH % "{{ m.role }}: {% for c in m.content %}{{ c.text }}{% endfor %}\n", "image"),
        (EACH % PARTS, "whether the user or the assistant speaks"),
    ],
    ids=["question", "image", "roles"],
)
def test_a_template_that_loses_something_is_refused_before_anything_is_written(text, lost, hub, tmp_path):
    checkpoint = hub()
    template(text)(checkpoint)
    with pytest.raises(InputError, match=lost):
        convert(checkpoint, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_window_that_an_image_fits_into_bounds_the_context(hub, tmp_path):
    checkpoint = hub()
    config("text_config", "model_type", value="mistral")(checkpoint)
    config("text_config", "sliding_window", value=1000)(checkpoint)
    convert(checkpoint, tmp_path / "model")
    model, tokenizer = load(tmp_path / "model")
    assert (model.config.context_length, model.config.text["model_type"]) == (1000, "mistral")
    with pytest.raises(AvgMlxError, match="1000"):
        generate(model, tokenizer, "what " * 1000)


@pytest.mark.parametrize(
    ("keys", "length"),
    [
        ({"sliding_window": 4000}, 4000),
        ({"sliding_window": 4000, "use_sliding_window": False}, 8192),
        ({"sliding_window": 4000, "layer_types": ["full_attention"] * 3}, 8192),
        ({"sliding_window": 4000, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}, 4000),
        ({"sliding_window": None}, 8192),
        ({"sliding_window": 100_000}, 8192),
    ],
)
def test_which_windows_bound_the_context(keys, length, golden_keys):
    assert Config.from_dict(golden_keys | {"max_position_embeddings": 8192} | keys).context_length == length


@pytest.fixture(scope="module")
def golden_keys(converted) -> dict:
    return {name: value for name, value in config_of(converted).items() if name != "tokenizer_model_max_length"}


def test_messages_become_parts(hub, tmp_path):
    convert(hub(), tmp_path / "model")
    _, tokenizer = load(tmp_path / "model")
    messages = build_messages(
        [
            {"role": "user", "content": "<image>\nWhat is it?"},
            {"role": "assistant", "content": "A dog."},
            {"role": "user", "content": "And <image> this?"},
        ],
        images=2,
    )
    text = render(tokenizer, messages, awaits_answer=True)
    assert text.endswith("USER: <image>\nWhat is it? ASSISTANT: A dog. USER: <image>\nAnd   this? ASSISTANT:")
    assert encode_messages(tokenizer, messages).count(-200) == 2


def test_control_tokens_in_messages_are_text(hub, tmp_path):
    convert(hub(), tmp_path / "model")
    _, tokenizer = load(tmp_path / "model")
    plain, spelled = (encode_messages(tokenizer, build_messages(f"Say {word}.", 1)) for word in ("it", "</s>"))
    end = tokenizer.get_vocab()["</s>"]
    assert end not in spelled
    assert len(plain) < len(spelled)
    assert plain[: plain.index(-200)] == spelled[: spelled.index(-200)]
    assert tokenizer.decode([i for i in spelled if i >= 0]).count("</s>") == 1


@pytest.mark.parametrize("end", ["", " </s>"])
def test_a_placeholder_that_is_text_is_not_the_token_of_images(end, hub, tmp_path):
    convert(hub(), tmp_path / "model")
    _, tokenizer = load(tmp_path / "model")
    ids = encode_messages(tokenizer, build_messages(f"<image>\nWhat is {literal('<image>')}{end}?", 1))
    assert ids.count(-200) == 1
    assert tokenizer.get_vocab()["<image>"] not in ids
    assert f"What is <image>{end}?" in tokenizer.decode([i for i in ids if i >= 0])


def test_a_text_that_begins_with_bos_gets_no_second_one(hub, tmp_path):
    checkpoint = hub()
    text = (checkpoint / "chat_template.jinja").read_text()
    template("{{ bos_token }}" + text)(checkpoint)
    convert(checkpoint, tmp_path / "model")
    _, tokenizer = load(tmp_path / "model")
    for said in ("Hello.", "Hello </s>."):
        assert encode_messages(tokenizer, build_messages(said, 0)).count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    ("generation", "text", "ends"),
    [
        ({"eos_token_id": [11, 17]}, {"eos_token_id": 5}, {11, 17}),
        ({}, {"eos_token_id": 5}, {5}),
        (None, {"eos_token_id": 5}, {5}),
        (None, {}, set()),
    ],
    ids=["generation_config", "text_config", "no generation_config", "tokenizer"],
)
def test_where_answers_end(generation, text, ends, hub, tmp_path):
    """At the tokenizer's own end of sequence besides, as in mlx-lm."""
    checkpoint = hub()
    (checkpoint / "generation_config.json").unlink()
    if generation is not None:
        (checkpoint / "generation_config.json").write_text(json.dumps(generation))
    config("text_config", "eos_token_id", value=text.get("eos_token_id", ...))(checkpoint)
    convert(checkpoint, tmp_path / "model")
    _, tokenizer = load(tmp_path / "model")
    assert set(tokenizer.eos_token_ids) == ends | {tokenizer.eos_token_id}


def crop_middle(**settings):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(**settings)


def pad(**settings):
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    return LlavaImageProcessorPil(**settings, do_pad=True)


def anyres(**settings):
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    return LlavaNextImageProcessorPil(**settings)


@pytest.fixture(scope="module", params=[crop_middle, pad, anyres], ids=lambda way: way.__name__)
def both(request, tmp_path_factory):
    """(transformers' Pillow processor, the config of a model that was converted from a checkpoint with it)."""
    family = "next" if request.param is anyres else "llava15"
    settings = json.loads((GOLDEN / family / "checkpoint" / "processor_config.json").read_text())["image_processor"]
    theirs = request.param(**{n: v for n, v in settings.items() if n not in ("image_processor_type", "do_pad")})
    checkpoint = tmp_path_factory.mktemp("both") / "checkpoint"
    shutil.copytree(GOLDEN / family / "checkpoint", checkpoint)
    if request.param is pad:
        processor("image_processor_type", value="LlavaImageProcessor")(checkpoint)
        processor("do_pad", value=True)(checkpoint)
    convert(checkpoint, checkpoint.parent / "model")
    return theirs, Config.from_dict(config_of(checkpoint.parent / "model"))


@given(size=st.tuples(st.integers(1, 500), st.integers(1, 500)).filter(lambda size: max(size) < 20 * min(size)))
@example(size=(352, 748))
def test_pixels_are_those_of_transformers_pillow_processors(both, size):
    """Of images of any size, to the bit."""
    theirs, config = both
    width, height = size
    image = Image.effect_mandelbrot(size, (-2, -1.2, 1, 1.2), 60).convert("RGB")
    image.paste((200, 30, 60), (width // 3, height // 3, width // 3 + 1 + width // 4, height // 3 + 1 + height // 5))
    expected = theirs(image, return_tensors="np")["pixel_values"]
    ours = make_crops(image, config).pixels.transpose(0, 3, 1, 2)
    assert np.array_equal(ours, expected.reshape(ours.shape))


@pytest.mark.parametrize(
    ("kind", "pads", "aspect"),
    [
        ("CLIPImageProcessor", True, "crop"),
        ("LlavaImageProcessor", ..., "crop"),
        ("LlavaImageProcessorFast", True, "pad"),
    ],
)
def test_llava15_crops_or_pads_as_its_image_processor_says(kind, pads, aspect, hub, tmp_path):
    checkpoint = hub("llava15")
    processor("image_processor_type", value=kind)(checkpoint)
    processor("do_pad", value=pads)(checkpoint)
    convert(checkpoint, tmp_path / "model")
    model, _ = load(tmp_path / "model")
    assert model.config.image_aspect_ratio == aspect
    wide = Image.new("RGB", (200, 84), (255, 0, 0))
    wide.paste((0, 255, 0), (58, 0, 142, 84))
    pixels = make_crops(wide, model.config).pixels[0]
    assert pixels.shape == (84, 84, 3)
    assert (np.ptp(pixels, axis=(0, 1)).max() == 0) == (aspect == "crop")  # the middle is green alone


def test_an_image_far_too_long_is_refused(hub, tmp_path):
    convert(hub("llava15"), tmp_path / "model")
    model, _ = load(tmp_path / "model")
    with pytest.raises(InputError, match="20000×1 is too long"):
        make_crops(Image.new("RGB", (20_000, 1)), model.config)


PAD = {
    **{"image_aspect_ratio": "pad", "image_grid_pinpoints": None, "mm_patch_merge_type": None},
    **{"vis_token_granularity": None, "router_select": None, "filtered_text_num": None},
}


class TestTheAuthorsOlderLayouts:
    """LLaVA-1.5 and M3 as their authors published them, with weights at random."""

    @pytest.mark.parametrize("changes", [{}, {"matryoshka_vis_token_scale": [16, 4, 1]}], ids=["LLaVA-1.5", "M3"])
    def test_an_export_is_converted_to_the_same_model(self, changes, made, tmp_path):
        model = made(**changes)
        export(model, tmp_path / "exported")
        convert(tmp_path / "exported", tmp_path / "again")
        assert tensors_in(model).keys() == tensors_in(tmp_path / "again").keys()
        assert "image_newline" not in tensors_in(model)
        assert all(np.array_equal(array, tensors_in(model)[n]) for n, array in tensors_in(tmp_path / "again").items())
        keys = config_of(tmp_path / "again")
        assert keys.pop("mm_vision_tower") == "vision_tower"
        assert keys == {name: value for name, value in config_of(model).items() if name != "mm_vision_tower"}

    @pytest.fixture
    def made(self, tmp_path):
        def make(**changes) -> Path:
            write_checkpoint(tmp_path / "checkpoint", PAD)
            rewrite(tmp_path / "checkpoint" / "config.json", lambda keys: keys.update(changes))
            convert(tmp_path / "checkpoint", tmp_path / "model")
            return tmp_path / "model"

        return make

    @pytest.mark.parametrize("model_type", ["llava", "llava_llama", "llava_mistral"])
    def test_llava15(self, model_type, made):
        model, tokenizer = load(made(model_type=model_type, sliding_window=None))
        assert not model.config.has_newline
        assert model.config.granularities == (16,)
        answer = generate(model, tokenizer, "What is it?", Image.new("RGB", (90, 40)), granularity=16, max_tokens=3)
        assert answer.views[0].visual_tokens == 16

    def test_m3_has_granularities_by_another_name(self, made):
        model, tokenizer = load(made(matryoshka_vis_token_scale=[16, 4, 1]))
        assert model.config.granularities == (16, 4, 1)
        answer = generate(model, tokenizer, "What is it?", Image.new("RGB", (90, 40)), granularity=4, max_tokens=3)
        assert answer.views[0].visual_tokens == 4

    def test_tokens_around_images_are_refused(self, made):
        with pytest.raises(InputError, match="mm_use_im_start_end"):
            made(mm_use_im_start_end=True)

    def test_siglip_is_refused_by_name_without_asking_the_hub(self, tmp_path, monkeypatch):
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the Hub was asked"))
        shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")
        rewrite(tmp_path / "checkpoint" / "config.json", lambda k: k.update(mm_vision_tower="google/siglip-so400m"))
        with pytest.raises(InputError, match="google/siglip-so400m, a SigLIP"):
            convert(tmp_path / "checkpoint", tmp_path / "model")


class TestGranularities:
    """A plain model becomes ready to be made adaptive."""

    @pytest.mark.parametrize(("asked", "given"), [([], [9, 18, 36]), ([36, 4], [36, 4])])
    @pytest.mark.parametrize("family", ["next", "llava15"])
    def test_of_a_plain_model(self, family, asked, given, tmp_path):
        convert(GOLDEN / family / "checkpoint", tmp_path / "model", granularities=asked)
        assert config_of(tmp_path / "model")["vis_token_granularity"] == given
        model, tokenizer = load(tmp_path / "model")
        assert model.config.granularities == tuple(given)
        assert not model.config.has_router
        image = GOLDEN / family / "image_0.png"
        counts = [
            generate(model, tokenizer, "What?", image, granularity=g, max_tokens=1).views[0].visual_tokens
            for g in given
        ]
        assert len(set(counts)) == len(given)

    def test_of_a_converted_folder_while_it_is_quantized(self, tmp_path):
        convert(GOLDEN / "next" / "checkpoint", tmp_path / "plain")
        four_bits = Quantization(bits=4, group_size=32)
        convert(tmp_path / "plain", tmp_path / "model", granularities=[], quantization=four_bits)
        changed = {"vis_token_granularity": [9, 18, 36], "filtered_text_num": 32}
        keys = config_of(tmp_path / "model")
        assert keys.pop("quantization") == keys.pop("quantization_config")
        assert keys == config_of(tmp_path / "plain") | changed

    def test_that_cannot_be_pooled_are_refused(self, tmp_path):
        with pytest.raises(InputError, match=r"granularity 8 .* choose from 1, 4, 9, 18, 36"):
            convert(GOLDEN / "next" / "checkpoint", tmp_path / "model", granularities=[36, 8])
        assert list(tmp_path.iterdir()) == []

    def test_of_a_router_cannot_be_changed(self, converted, tmp_path):
        with pytest.raises(InputError, match="has a router"):
            convert(converted, tmp_path / "model", granularities=[36, 144])


def test_a_tensor_too_many_is_named(hub, tmp_path):
    checkpoint = hub()
    tensors = load_file(checkpoint / "model.safetensors")
    save_file(tensors | {"surplus": np.zeros(3, "f4")}, checkpoint / "model.safetensors")
    with pytest.raises(InputError, match=r"1 unexpected \(surplus\)"):
        convert(checkpoint, tmp_path / "model")


@pytest.mark.parametrize("after", [" ", "", "</s>"], ids=["space", "nothing", "eos"])
def test_to_stop_is_learned_whatever_the_template_ends_answers_with(after, hub, tmp_path):
    checkpoint = hub()
    text = (checkpoint / "chat_template.jinja").read_text()
    template(text.replace("{{ c['text'] }} {", f"{{{{ c['text'] }}}}{after}{{"))(checkpoint)
    convert(checkpoint, tmp_path / "model")
    model, tokenizer = load(tmp_path / "model")
    turns = conversation("<image>\nWhat is it?", "A cat.", "And now?", "A small dog.")
    data = write_samples(tmp_path, [{"id": "1", "image": "small.png", "conversations": turns}])
    [sample] = read_samples(data, None, tokenizer, model.config)
    learned = [label for label in sample.labels if label != -100]
    assert len(sample.ids) == len(sample.labels)
    answers = tokenizer.decode(learned).split("</s>")
    assert [answer.strip() for answer in answers] == ["A cat.", "A small dog.", ""]
    assert all(label in (-100, id, 2) for label, id in zip(sample.labels, sample.ids, strict=True))
