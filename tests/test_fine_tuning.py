"""What fine-tuning makes of a model: it learns the answers, changes what it should, and the router follows."""

import json
import math
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import CHECKPOINT, GOLDEN, RECORDS, ROOT, conversation, without_router, write_samples

from avg_mlx import InputError, Quantization, convert, generate, load
from avg_mlx.model.avg_llava import Model
from avg_mlx.model.inventory import tensors_of
from avg_mlx.model.router import Router
from avg_mlx.training import instruct, stages
from avg_mlx.training.data import IGNORED, read_samples
from avg_mlx.training.loop import step_gradients
from avg_mlx.training.options import FeedbackOptions, InstructOptions, RglfOptions, RouterOptions
from avg_mlx.training.rglf import initialize
from avg_mlx.training.stages import make_feedback, train_instruct, train_rglf, train_router
from avg_mlx.weights.adapters import AdapterConfig, trained_tensors
from avg_mlx.weights.fusing import fuse
from avg_mlx.weights.shards import load_arrays

LLAVA_NEXT = ROOT / "tests" / "golden_llava" / "next" / "checkpoint"
COARSE = (36, 72)
LEARNED = (("image_0.png", "What?", "a cat"), ("image_1.png", "Who?", "two"))
SMALL_LOSS = 0.1  # an untrained model's is above 6
BITS = {"lora": None, "dora": None, "full": None, "qlora-8": 8, "qlora-4": 4}


@pytest.fixture(scope="module")
def coarse_checkpoint(tmp_path_factory) -> Path:
    """The golden weights before stage 4, with two coarse granularities and two crops an image, to be quick."""
    folder = without_router(CHECKPOINT, tmp_path_factory.mktemp("coarse") / "checkpoint")
    keys = json.loads((folder / "config.json").read_text())
    keys |= {"vis_token_granularity": COARSE, "image_grid_pinpoints": [[336, 336]]}
    (folder / "config.json").write_text(json.dumps(keys))
    return folder


@pytest.fixture(scope="module")
def answers(coarse_checkpoint) -> Path:
    """Training data on golden images."""
    file = coarse_checkpoint.parent / "data.json"
    records = [{"image": image, "conversations": conversation(f"<image>\n{q}", a)} for image, q, a in LEARNED]
    file.write_text(json.dumps(records))
    return file


@pytest.fixture
def encode_once(monkeypatch):
    """The frozen vision tower sees every image once: it costs more than all the rest."""
    encode, seen = Model.encode, {}

    def remembered(model, crops):
        key = crops.pixels.tobytes()
        if key not in seen:
            seen[key] = encode(model, crops)
        return seen[key]

    monkeypatch.setattr(Model, "encode", remembered)


@pytest.mark.parametrize("kind", BITS)
def test_overfits_and_fuses_to_the_same_answers(kind, coarse_checkpoint, answers, encode_once, tmp_path):
    bits = BITS[kind]
    quantization = Quantization(bits=bits, group_size=32) if bits else None
    convert(coarse_checkpoint, tmp_path / "model", quantization=quantization)
    losses = []
    options = InstructOptions(
        model=str(tmp_path / "model"),
        data=answers,
        image_folder=GOLDEN,
        adapter_path=tmp_path / "adapters",
        fine_tune_type="lora" if bits else kind,
        iters=8,
        batch_size=len(LEARNED),
        learning_rate=1.5e-3,
        lr_schedule="constant",
    )
    train_instruct(options, lambda record, steps: losses.append(record["loss"]))
    assert losses[0] > 6
    assert losses[-1] < SMALL_LOSS

    fuse(tmp_path / "model", tmp_path / "adapters", tmp_path / "fused", dequantize=bits is not None)
    unfused, tokenizer = load(tmp_path / "model", adapter_path=tmp_path / "adapters")
    fused, _ = load(tmp_path / "fused")
    samples = read_samples(answers, GOLDEN, tokenizer, unfused.config)
    for sample, (image, question, answer) in zip(samples, LEARNED, strict=True):
        taught = [label for label in sample.labels if label != IGNORED]
        for granularity in COARSE:
            for model in (unfused, fused):
                said = generate(
                    model, tokenizer, question, GOLDEN / image, granularity=granularity, max_tokens=len(taught) + 2
                )
                assert (list(said.token_ids), said.text) == (taught, answer)


@pytest.fixture
def tune(tiny_folder, tmp_path):
    """`tune(**options)` makes a step of instruct tuning on the tiny model; returns the adapters' tensors."""
    file = write_samples(tmp_path, RECORDS[:1])

    def run(**options) -> dict[str, mx.array]:
        folder = tmp_path / "adapters"
        options = {"model": str(tiny_folder), "iters": 1, "learning_rate": 1e-2, **options}
        train_instruct(InstructOptions(data=file, adapter_path=folder, **options))
        return mx.load(str(folder / "adapters.safetensors"))

    return run


LORA_KEYS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LORA_KEYS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def tensors_in(folder: Path) -> dict[str, mx.array]:
    return {name: array for file in folder.glob("*.safetensors") for name, array in mx.load(str(file)).items()}


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({}, ()),
        ({"train_projector": True}, ("projector.",)),
        ({"train_newline": True}, ("image_newline",)),
        ({"train_vision": True}, ("vision_tower.",)),
        ({"fine_tune_type": "full"}, ("language_model.",)),
        ({"fine_tune_type": "full", "num_layers": 1}, ("language_model.model.layers.1.",)),
        ({"num_layers": 1}, ()),
        ({"fine_tune_type": "dora", "num_layers": 2}, ()),
    ],
    ids=str,
)
def test_exactly_what_is_trained_changes(options, more, tune, tiny_folder, tmp_path):
    tune(**options)
    fuse(tiny_folder, tmp_path / "adapters", tmp_path / "fused")
    before, after = tensors_in(tiny_folder), tensors_in(tmp_path / "fused")
    assert before.keys() == after.keys()
    changed = {name for name in before if not mx.array_equal(before[name], after[name])}
    expected = {name for name in before if name.startswith(more or "nothing")}
    if options.get("fine_tune_type") != "full":
        layers = range(2)[-options.get("num_layers", 2) :]
        expected |= {f"language_model.model.layers.{layer}.{key}.weight" for layer in layers for key in LORA_KEYS}
    # Softmax does not see a bias of the keys: its gradient is zero but for rounding.
    assert {name for name in changed if "key_proj.bias" not in name} == {
        name for name in expected if "key_proj.bias" not in name
    }
    assert changed <= expected


def test_the_vision_tower_has_its_own_learning_rate(tune, tiny_folder):
    """The first step of Adam moves every weight by its learning rate, times one constant."""
    before = tensors_in(tiny_folder)
    trained = tune(train_projector=True, train_vision=True, vision_learning_rate=1e-4)
    moved = {name: mx.abs(array - before[name]).max().item() for name, array in trained.items() if name in before}
    vision = max(moved[name] for name in moved if name.startswith("vision_tower."))
    projector = max(moved[name] for name in moved if name.startswith("projector."))
    assert projector / vision == pytest.approx(100, rel=0.01)


def test_more_layers_than_there_are_is_refused(tune):
    with pytest.raises(InputError, match="num_layers is 3, but the language model has 2"):
        tune(num_layers=3)


def test_a_quantized_model_is_not_trained_in_full(tiny_four_bits, data, tmp_path):
    options = InstructOptions(
        model=str(tiny_four_bits), data=data, adapter_path=tmp_path / "adapters", fine_tune_type="full"
    )
    with pytest.raises(InputError, match=r"quantized weights .*fine_tune_type.*lora.*dequantize"):
        train_instruct(options)


def test_grad_checkpoint_gives_the_same_gradients(own_tiny, data, monkeypatch):
    model, tokenizer = own_tiny
    samples = read_samples(data, None, tokenizer, model.config)
    layer = type(model.language_model.layers[0])
    original = layer.__call__
    monkeypatch.setattr(layer, "__call__", original)  # it is patched for good otherwise
    everything = instruct.Trainable(projector=True, newline=True, vision=True)
    numbers = range(len(samples))

    def gradients(grad_checkpoint: bool):
        instruct.prepare(model, AdapterConfig("full"), everything, grad_checkpoint)
        task = instruct.InstructTask(model, samples, [], everything, micro_batch=3)
        return step_gradients(model, task.micro_losses(numbers, numbers, 1), mx.distributed.init())

    plain_loss, plain = gradients(grad_checkpoint=False)
    assert layer.__call__ is original
    loss, checkpointed = gradients(grad_checkpoint=True)
    assert layer.__call__ is not original
    assert loss.item() == pytest.approx(plain_loss.item(), rel=1e-6)
    plain, checkpointed = tensors_of_tree(plain), tensors_of_tree(checkpointed)
    assert plain.keys() == checkpointed.keys() == trained_tensors(model).keys()
    for name, gradient in plain.items():
        assert mx.allclose(checkpointed[name], gradient, rtol=1e-4, atol=1e-6), name
    assert all(mx.abs(gradient).max().item() > 0 for gradient in plain.values())


def test_grad_checkpoint_with_dropout_is_refused(tune):
    with pytest.raises(InputError, match="another dropout; set lora_dropout to 0"):
        tune(grad_checkpoint=True, lora_dropout=0.1)


def test_dora_on_weights_that_mlx_lm_measures_wrongly_is_refused(tiny_checkpoint, data, tmp_path):
    convert(tiny_checkpoint, tmp_path / "six", quantization=Quantization(bits=6, group_size=32))
    options = InstructOptions(
        model=str(tmp_path / "six"), data=data, adapter_path=tmp_path / "adapters", fine_tune_type="dora"
    )
    with pytest.raises(InputError, match="weights of 6 bits; choose lora"):
        train_instruct(options)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_of_16_bits_learn_as_those_of_32_do(tiny_checkpoint, data, tmp_path, dtype):
    """Steps are smaller than what 16 bits can add, and squares of gradients than what they can hold."""
    learned = {}
    for kind in ("float32", dtype):
        convert(tiny_checkpoint, tmp_path / kind, dtype=kind)
        options = InstructOptions(
            model=str(tmp_path / kind),
            data=data,
            adapter_path=tmp_path / f"{kind}-adapters",
            num_layers=1,
            fine_tune_type="full",
            train_projector=True,
            iters=20,
            batch_size=4,
            learning_rate=1e-5,
            lr_schedule="constant",
        )
        before = tensors_of(load(options.model)[0])
        trained = train_instruct(options)
        after = load_arrays(trained.adapters / "adapters.safetensors")
        assert {str(array.dtype) for array in after.values()} == {f"mlx.core.{kind}"}
        copies = load_arrays(trained.adapters / "checkpoint-0000020" / "optimizer.safetensors")
        wide = {name: copies.get(f"{name}.weight", after[name]) for name in after}
        learned[kind] = {name: wide[name] - before[name].astype(mx.float32) for name in after}
    for name, moved in learned["float32"].items():
        size = mx.linalg.norm(moved.reshape(-1)).item()
        assert size > 0
        apart = mx.linalg.norm((learned[dtype][name] - moved).reshape(-1)).item()
        assert apart < 0.6 * size, name


def tensors_of_tree(tree) -> dict[str, mx.array]:
    from mlx.utils import tree_flatten

    return tree_flatten(tree, destination={})


@pytest.fixture
def route(tiny_stage3, data, tmp_path):
    """`route(**options)` trains a router for the tiny Stage-3 model."""

    def run(report=lambda record, steps: None, **options) -> Path:
        folder = options.pop("adapter_path", tmp_path / "routed")
        options = {"model": str(tiny_stage3), "iters": 3, **options}
        train_router(RouterOptions(data=data, adapter_path=folder, **options), report)
        return folder

    return run


def test_a_router_is_made_for_stage3_and_generate_routes(route, tiny_stage3, tmp_path, data):
    folder = route()
    tensors = mx.load(str(folder / "adapters.safetensors"))
    plain, tokenizer = load(tiny_stage3)
    assert not plain.config.has_router
    assert generate(plain, tokenizer, "What?", data.parent / "wide.png", max_tokens=1).views[0].source == "finest"
    model, tokenizer = load(tiny_stage3, adapter_path=folder)
    assert tensors.keys() == {f"router.{name}" for name in tensors_of(model.router)}
    assert tensors_of(model).keys() - tensors.keys() == tensors_of(plain).keys()
    assert all(mx.array_equal(array, tensors_of(model)[name]) for name, array in tensors_of(plain).items())

    unfused = generate(model, tokenizer, "What?", data.parent / "wide.png", max_tokens=8)
    assert unfused.views[0].source == "router"
    fuse(tiny_stage3, folder, tmp_path / "fused")
    fused = generate(*load(tmp_path / "fused"), "What?", data.parent / "wide.png", max_tokens=8)
    assert fused.token_ids == unfused.token_ids
    assert fused.views[0].routing == unfused.views[0].routing


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_one_folder_holds_base_adapters_and_router(kind, tune, route, tiny_stage3, tmp_path):
    below = tune(model=str(tiny_stage3), fine_tune_type=kind)
    both = mx.load(str(route(base_adapters=tmp_path / "adapters") / "adapters.safetensors"))
    router = {name for name in both if name.startswith("router.")}
    assert both.keys() - router == below.keys()
    assert all(mx.array_equal(both[name], array) for name, array in below.items())

    tuned, tokenizer = load(tiny_stage3, adapter_path=tmp_path / "adapters")
    routed, _ = load(tiny_stage3, adapter_path=tmp_path / "routed")
    assert tensors_of(routed).keys() - tensors_of(tuned).keys() == router
    image = GOLDEN / "image_0.png"
    ours, theirs = (generate(m, tokenizer, "What?", image, granularity=4, max_tokens=8) for m in (tuned, routed))
    assert ours.token_ids == theirs.token_ids
    assert generate(routed, tokenizer, "What?", image, max_tokens=1).views[0].source == "router"


@pytest.fixture
def calls(monkeypatch) -> dict[str, int]:
    """How often the language model and the vision tower have run."""
    counts = {"hidden": 0, "encode": 0}
    for name in counts:
        method = getattr(Model, name)

        def counted(self, *args, _name=name, _method=method):
            counts[_name] += 1
            return _method(self, *args)

        monkeypatch.setattr(Model, name, counted)
    return counts


@pytest.mark.parametrize("cached", [False, True])
def test_later_epochs_run_neither_language_model_nor_tower(cached, calls, route, tmp_path):
    routable = 4  # samples with one image
    seen = []
    options = {"feature_cache": tmp_path / "features"} if cached else {}
    options |= {"iters": None, "epochs": 3, "batch_size": routable, "feedback": tmp_path / "feedback.jsonl"}
    route(lambda record, steps: seen.append((steps, *calls.values())), **options)
    tried = 2  # calls of an unloaded model, which compute nothing
    once = routable * (1 + 5)  # what stands before the image, then each granularity
    encoded = [1, 1, 1] if cached else [2, 3, 4]  # images are seen for the feedback, then in each epoch
    assert seen == [(3, tried + once, routable * times) for times in encoded]

    before = dict(calls)
    route(adapter_path=tmp_path / "again", **options)
    again = 0 if cached else 3 * routable
    assert calls == {"hidden": before["hidden"] + tried, "encode": before["encode"] + again}


def test_cached_features_train_the_same_router(route, tmp_path):
    plain = route(epochs=2, iters=None)
    cached = route(epochs=2, iters=None, adapter_path=tmp_path / "other", feature_cache=tmp_path / "features")
    ours, theirs = (mx.load(str(folder / "adapters.safetensors")) for folder in (plain, cached))
    assert all(mx.array_equal(ours[name], array) for name, array in theirs.items())


def test_a_router_that_is_there_is_trained_on_unless_a_fresh_one_is_asked_for(route, tiny_folder, tmp_path):
    before = tensors_of(load(tiny_folder)[0])
    options = {"model": str(tiny_folder), "iters": 1, "learning_rate": 1e-6}
    went_on = mx.load(str(route(**options) / "adapters.safetensors"))
    fresh = mx.load(str(route(**options, fresh_router=True, adapter_path=tmp_path / "new") / "adapters.safetensors"))
    assert all(mx.allclose(array, before[name], atol=1e-4) for name, array in went_on.items())
    assert mx.abs(fresh["router.voter"] - before["router.voter"]).mean().item() > 0.5


def test_a_plain_model_is_made_adaptive(tmp_path):
    """A checkpoint in the Hub's layout, with one granularity and no router, learns both stages and then routes."""
    data = write_samples(tmp_path, RECORDS[:1])
    convert(LLAVA_NEXT, tmp_path / "plain", granularities=[])
    rglf = RglfOptions(
        model=tmp_path / "plain",
        data=data,
        adapter_path=tmp_path / "adapters",
        iters=15,
        learning_rate=5e-3,
        router_iters=15,
    )
    train_rglf(rglf)
    fuse(rglf.model, rglf.adapter_path, tmp_path / "fused")
    before, after = (
        make_feedback(FeedbackOptions(model=tmp_path / name, data=data, output=tmp_path / f"{name}.jsonl"))
        for name in ("plain", "fused")
    )
    losses = [np.mean([row.losses for row in rows], axis=0) for rows in (before, after)]
    assert before[0].granularities == after[0].granularities == [9, 18, 36]
    assert np.all(losses[1] < losses[0] / 5), losses

    model, tokenizer = load(tmp_path / "fused")
    answer = generate(model, tokenizer, "What is this?", data.parent / "wide.png", max_tokens=4)
    assert answer.text.startswith("A cat.")
    assert answer.views[0].source == "router"


def test_a_router_that_is_there_is_trained_on_after_stage_3_too(tiny_folder, data, tmp_path):
    options = RglfOptions(
        model=tiny_folder, data=data, adapter_path=tmp_path / "on", iters=1, router_iters=1, router_learning_rate=1e-6
    )
    train_rglf(options)
    train_rglf(replace(options, adapter_path=tmp_path / "new", fresh_router=True))
    before = tensors_of(load(tiny_folder)[0])["router.voter"]
    on, new = (mx.load(str(tmp_path / name / "adapters.safetensors"))["router.voter"] for name in ("on", "new"))
    assert mx.allclose(on, before, atol=1e-4)
    assert mx.abs(new - before).mean().item() > 0.5


def test_a_folder_that_stage_4_would_refuse_is_refused_before_stage_3(tiny_stage3, data, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "_instruct", None)
    options = RglfOptions(model=tiny_stage3, data=data, adapter_path=tmp_path / "on")
    options.adapter_path.mkdir()
    (options.adapter_path / "feedback.jsonl").write_text("")
    with pytest.raises(InputError, match=r"feedback\.jsonl is of the model before it is trained"):
        train_rglf(options)
    (options.adapter_path / "run.json").write_text("{}")
    with pytest.raises(InputError, match="a run of train router alone"):
        train_rglf(replace(options, resume=True))


def test_what_stage_3_holds_out_stage_4_does_not_learn(tiny_stage3, data, tmp_path, monkeypatch):
    given = []
    for stage in ("_instruct", "_router"):
        monkeypatch.setattr(stages, stage, lambda model, *samples: given.append(samples[:2]))
    for seed in range(4):
        train_rglf(RglfOptions(model=tiny_stage3, data=data, adapter_path=tmp_path, val_fraction=0.4, seed=seed))
        for all_samples, routed in zip(*given, strict=True):
            assert routed == [sample for sample in all_samples if len(sample.images) == 1]
        given.clear()


D = 256  # of the router whose initialization is looked at
UNIFORM = 1 / math.sqrt(3)  # standard deviation of a uniform distribution, by its bound


@pytest.fixture(scope="module")
def fresh_router(tiny) -> dict[str, np.ndarray]:
    config = replace(tiny[0].config, hidden_size=D)
    mx.random.seed(0)
    router = Router(config)
    router.update({"voter": mx.zeros_like(router.voter)})
    initialize(router)
    return {name: np.array(array) for name, array in tensors_of(router).items()}


@pytest.mark.parametrize(
    ("name", "deviation"),
    [("scorer.linear1.weight", math.sqrt(2 / D)), ("scorer.linear2.weight", math.sqrt(2 / D)), ("voter", 1.0)],
)
def test_fresh_router_is_normal_where_the_authors_chose_it(name, deviation, fresh_router):
    x = fresh_router[name] / deviation
    error = 4 / math.sqrt(x.size)
    assert abs(x.mean()) < error
    assert abs(x.std() - 1) < error
    assert np.mean(np.abs(x) > 2) == pytest.approx(0.0455, abs=error)  # a normal distribution's, not a uniform one's


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        *(
            (f"crop_mixer.attention.{part}_proj.weight", math.sqrt(6 / (D + 3 * D)))
            for part in ("query", "key", "value")
        ),
        ("crop_mixer.attention.out_proj.weight", 1 / math.sqrt(D)),
        *((f"crop_mixer.linear{n}.{part}", 1 / math.sqrt(D)) for n in (1, 2) for part in ("weight", "bias")),
        ("scorer.linear1.bias", 1 / math.sqrt(D)),
        ("scorer.linear2.bias", 1 / math.sqrt(D)),
    ],
)
def test_fresh_router_is_uniform_where_pytorch_is(name, bound, fresh_router):
    x = fresh_router[name] / bound
    assert np.abs(x).max() <= 1
    assert np.abs(x).max() > 1 - 10 / x.size
    if x.size > 100:
        assert x.std() == pytest.approx(UNIFORM, rel=4 / math.sqrt(x.size))


def test_fresh_router_is_constant_elsewhere(fresh_router):
    attention = "crop_mixer.attention."
    zeros = {f"{attention}{part}_proj.bias" for part in ("query", "key", "value", "out")}
    norms = ("crop_mixer.norm1", "crop_mixer.norm2", "logit_norm")
    zeros |= {f"{norm}.bias" for norm in norms}
    ones = {f"{norm}.weight" for norm in norms}
    assert all(not fresh_router[name].any() for name in zeros)
    assert all((fresh_router[name] == 1).all() for name in ones)
    random = [name for name, array in fresh_router.items() if array.std() > 0]
    assert len(random) + len(zeros | ones) == len(fresh_router)
