"""`avg-mlx bench`: what it asks, what it reports, and its made-up models. Nothing here looks at a clock."""

import dataclasses
import io
import json

import mlx.core as mx
import pytest
from conftest import PHOTO
from PIL import Image

from avg_mlx import InputError, Quantization, convert, load
from avg_mlx.bench import measure as measuring
from avg_mlx.bench.cost import PARTS, Cost, Work
from avg_mlx.bench.measure import Options, Spread, count_text_tokens, describe, measure, prompt_of, steered
from avg_mlx.bench.measure import synthetic_image as make_image
from avg_mlx.bench.presets import SHAPES, preset_keys, random_model, word_tokenizer
from avg_mlx.bench.report import make_report, markdown, plot
from avg_mlx.blas import BLAS
from avg_mlx.cli.bench import PRESETS, main
from avg_mlx.config import Config
from avg_mlx.files import read_json
from avg_mlx.inference.answer import Timings
from avg_mlx.model.avg_llava import Model
from avg_mlx.model.inventory import parts_of, tensors_of
from avg_mlx.weights.checkpoint import load_model

GRANULARITIES = (1, 2, 4, 8, 16)  # of the tiny model
STAGES = ("preprocess", "vision", "router", "prefill")


@pytest.fixture(scope="module")
def options() -> Options:
    return Options("Why?", str(PHOTO), GRANULARITIES, repeats=2, warmup=1, decode_tokens=3)


@pytest.fixture(scope="module")
def rows(tiny, options):
    return measure(*tiny, options, lambda *_: None)


@pytest.fixture(scope="module")
def report(tiny, rows, options):
    return make_report({"model": "tiny", "image": "a cat", **describe(*tiny, options)}, rows)


def test_the_report_names_the_blas(report):
    assert report["blas"] == BLAS
    assert f"BLAS on the CPU: {BLAS}." in markdown(report)


def test_rows_hold_what_the_model_was_shown(tiny, rows):
    model, tokenizer = tiny
    text = count_text_tokens(tokenizer, "Why?")
    size = Image.open(PHOTO).size[::-1]
    assert [row.granularity for row in rows] == list(GRANULARITIES)
    for row in rows:
        assert row.visual_tokens == model.config.visual_tokens(row.granularity, size)
        assert row.prompt_tokens == row.visual_tokens + text


def test_work_is_counted_for_the_shapes_that_were_run(tiny, rows):
    config = tiny[0].config
    cost = Cost(config, dict.fromkeys(PARTS, 32), 32)
    rows_of, columns = config.crop_grid(Image.open(PHOTO).size[::-1])
    crops = 1 + rows_of * columns
    for row in rows:
        assert row.work == {
            "vision": cost.vision(crops),
            "router": cost.router(crops, row.prompt_tokens - row.visual_tokens),
            "prefill": cost.prefill(row.prompt_tokens),
            "decode": cost.decode(row.prompt_tokens + 1),
        }
        assert row.work_to_first_token == row.work["vision"] + row.work["router"] + row.work["prefill"]


@pytest.fixture
def asked(tiny, monkeypatch):
    """`asked(…)` measures with these options; returns the answers in the order in which they were made."""
    answers = []

    def record(*arguments, **options):
        answers.append(generate(*arguments, **options))
        return answers[-1]

    generate = measuring.generate
    monkeypatch.setattr(measuring, "generate", record)

    def run(model=tiny[0], **changes):
        asked_for = Options(**{"prompt": "Why?", "image": str(PHOTO), "granularities": (1, 16), **changes})
        return measure(model, tiny[1], asked_for, lambda *_: None), answers

    return run


def test_granularities_take_turns(asked):
    _, answers = asked(repeats=2, warmup=1, decode_tokens=1)
    assert [answer.views[0].granularity for answer in answers] == [1, 16] * 3


def test_the_router_is_run_for_every_answer(asked, tiny):
    norm = tiny[0].router.logit_norm
    before = norm.bias
    _, answers = asked(repeats=1, warmup=0)
    assert [answer.views[0].source for answer in answers] == ["router", "router"]
    assert norm.bias is before


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_steering_leaves_the_rest_of_the_logits_alone(tiny, granularity):
    model, _ = tiny
    features, text = mx.random.normal((3, 16, 64), key=mx.random.key(0)), mx.ones((7, 64))
    before = model.route(features, text)
    with steered(model, granularity):
        steered_logits = model.route(features, text)
    level = GRANULARITIES.index(granularity)
    assert int(mx.argmax(steered_logits).item()) == level
    unbiased = before - model.router.logit_norm.bias
    others = [i for i in range(5) if i != level]
    assert mx.allclose(steered_logits[mx.array(others)], unbiased[mx.array(others)], atol=1e-5)
    assert mx.array_equal(model.route(features, text), before)


def test_answers_never_end_early(asked, tiny):
    _, tokenizer = tiny
    ends = tokenizer.eos_token_ids
    tokenizer.eos_token_ids = range(512)  # whatever comes would end it
    try:
        _, answers = asked(repeats=1, warmup=0, decode_tokens=5)
        assert tokenizer.eos_token_ids == set(range(512))
    finally:
        tokenizer.eos_token_ids = ends
    assert [len(answer.token_ids) for answer in answers] == [6, 6]


def test_a_model_without_a_router_is_measured_without_one(asked, tiny_stage3):
    model = load_model(tiny_stage3, read_json(tiny_stage3 / "config.json"))
    rows, answers = asked(model, repeats=1, warmup=0)
    assert [answer.views[0].source for answer in answers] == ["forced", "forced"]
    assert [row.work["router"] for row in rows] == [Work(), Work()]


def test_a_plain_model_is_measured_at_whatever_its_patches_pool_to(asked, tiny_stage3, tmp_path):
    convert(tiny_stage3, tmp_path / "plain", granularities=[16])
    rows, _ = asked(load(tmp_path / "plain")[0], repeats=1, warmup=0, granularities=(2, 8, 16))
    assert [row.granularity for row in rows] == [2, 8, 16]


def test_warm_up_is_not_measured(monkeypatch, tiny):
    """Each answer's seconds are its number."""
    numbers = iter(range(100))

    def numbered(*arguments, **options):
        answer = generate(*arguments, **options)
        n = float(next(numbers))
        return dataclasses.replace(answer, timings=Timings(n, n, n, n, n, n), peak_memory_gb=n)

    generate = measuring.generate
    monkeypatch.setattr(measuring, "generate", numbered)
    options = Options("Why?", str(PHOTO), (16, 1), repeats=3, warmup=1, decode_tokens=1)
    coarse, fine = measure(*tiny, options, lambda *_: None)
    for row, seen in ((coarse, Spread(4, 2, 6)), (fine, Spread(5, 3, 7))):
        assert [getattr(row, stage) for stage in STAGES] == [seen] * 4
        assert row.decode_tokens_per_second == row.peak_memory_gb == seen
        assert row.time_to_first_token == Spread(4 * seen.median, 4 * seen.least, 4 * seen.most)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"repeats": 0}, "repeats"), ({"warmup": -1}, "warmup"), ({"decode_tokens": 0}, "decode_tokens")],
)
def test_options_out_of_bounds_are_refused(options, wrong, named):
    with pytest.raises(InputError, match=f"^{named} is -?[01]; expected"):
        dataclasses.replace(options, **wrong)


def test_there_must_be_granularities_and_the_model_must_have_them(tiny, options):
    with pytest.raises(InputError, match="no granularity"):
        dataclasses.replace(options, granularities=())
    with pytest.raises(InputError, match=r"granularity 3 .* choose from 1, 2, 4, 8, 16"):
        measure(*tiny, dataclasses.replace(options, granularities=(1, 3)))


def test_progress_is_told(tiny, options):
    seen = []
    measure(*tiny, dataclasses.replace(options, granularities=(1, 2)), lambda *now: seen.append(now))
    assert seen == [(n, 6) for n in range(1, 7)]


def test_the_report_says_what_was_measured_on_what(report, tiny):
    assert report["device"] in ("CPU", "Metal", "CUDA")
    assert report["versions"]["mlx"] == mx.__version__
    assert report["dtype"] == "float32"
    assert set(report["bits_per_weight"].values()) == {32}
    assert report["parameters"] == sum(array.size for array in tensors_of(tiny[0]).values())
    assert report["weights_gb"] * 1e9 == pytest.approx(4 * report["parameters"])


def test_finest_against_coarsest(report, rows):
    ratio = report["finest_to_coarsest"]
    assert ratio["granularities"] == [16, 1]
    assert ratio["flop"] == rows[4].work_to_first_token.flop / rows[0].work_to_first_token.flop > 1
    assert ratio["time_to_first_token"] == pytest.approx(
        rows[4].time_to_first_token.median / rows[0].time_to_first_token.median
    )
    assert f"16 against 1 tokens per crop: time to first token ×{ratio['time_to_first_token']:.2f}" in markdown(report)


def test_one_granularity_is_compared_with_nothing(report, rows):
    assert "against" not in markdown(make_report(report, rows[:1]))


def test_markdown_shows_every_number(report):
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in markdown(report).splitlines()
        if line.startswith("| ") and line[2].isdigit()
    ]
    measured, counted = cells[:5], cells[5:]
    for row, [granularity, tokens, *numbers, peak] in zip(report["rows"], measured, strict=True):
        assert (granularity, tokens) == (str(row["granularity"]), str(row["visual_tokens"]))
        shown = [float(number.split()[0]) for number in (*numbers, peak)]
        names = (*STAGES, "time_to_first_token", "decode_tokens_per_second", "peak_memory_gb")
        assert shown == pytest.approx([row[name]["median"] for name in names], rel=0.01)
    for row, [granularity, *works] in zip(report["rows"], counted, strict=True):
        assert granularity == str(row["granularity"])
        flop, moved = zip(*(map(float, work.split(",")) for work in works), strict=True)
        stages = [*(row["work"][name] for name in ("vision", "router", "prefill")), row["work_to_first_token"]]
        stages.append(row["work"]["decode"])
        assert flop == pytest.approx([work["flop"] / 1e12 for work in stages], rel=0.01)
        assert moved == pytest.approx([work["bytes"] / 1e9 for work in stages], rel=0.01)


def test_the_picture_is_one(report, tmp_path):
    pytest.importorskip("matplotlib")
    picture = plot(report, tmp_path / "bench.png")
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(1 << 20)) > 4  # four stages on white


@pytest.fixture(scope="module")
def words():
    return word_tokenizer(512)


def test_made_up_words_are_what_they_decode_to(words):
    ids = [1, *range(3, 512)]
    assert words.encode(words.decode(ids[1:])) == ids


@pytest.mark.parametrize("tokens", [35, 60, 301])
def test_a_prompt_is_as_long_as_asked_for(tiny, words, tokens):
    for tokenizer in (words, tiny[1]):
        least = count_text_tokens(tokenizer, "a")
        wanted = least + tokens
        assert count_text_tokens(tokenizer, prompt_of(tokenizer, wanted)) == wanted
        with pytest.raises(InputError, match=f"template alone takes {least - 1}"):
            prompt_of(tokenizer, least - 1)


def test_a_prompt_has_sixty_tokens_where_the_template_leaves_room(tiny, words):
    assert count_text_tokens(words, prompt_of(words, None)) == 60
    assert prompt_of(tiny[1], None) == "a"
    assert count_text_tokens(tiny[1], "a") > 60


def test_a_made_up_image_is_as_large_as_asked_for():
    with Image.open(io.BytesIO(make_image(80, 60))) as image:
        assert (image.size, image.format) == ((80, 60), "JPEG")
        assert len(set(image.convert("L").tobytes())) > 20


def test_presets_are_what_help_says():
    assert tuple(SHAPES) == PRESETS


@pytest.mark.parametrize(
    ("name", "parameters"), [("300m", 300e6), ("1b", 1e9), ("7b", 7_167_815_819)], ids=["300m", "1b", "7b"]
)
def test_presets_are_as_large_as_they_are_named(name, parameters):
    """The 7B has the released model's parameters, to the last (docs/full-size.md)."""
    shapes = tensors_of(Model(Config.from_dict(preset_keys(name))))
    assert sum(array.size for array in shapes.values()) == pytest.approx(parameters, rel=0 if name == "7b" else 0.02)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_look_at_images_as_the_released_model_does(name):
    config, released = (Config.from_dict(preset_keys(n)) for n in (name, "7b"))
    for field in ("granularities", "grid_pinpoints", "filtered_text_num", "has_router", "context_length"):
        assert getattr(config, field) == getattr(released, field)
    assert (config.vision.image_size, config.vision.patch_grid) == (336, (24, 24))


def test_random_weights_have_the_type_asked_for():
    assert {array.dtype for array in tensors_of(random_model("tiny", "bfloat16")).values()} == {mx.bfloat16}


def test_random_weights_quantize_as_models_do():
    model = random_model("tiny", "float16", Quantization(bits=4))
    bits = {part.name: part.bits_per_weight for part in parts_of(model)}
    assert 4.5 <= bits["language_model"] < 4.6
    assert bits["vision_tower"] == bits["router"] == 16


def test_random_weights_are_never_held_twice():
    largest = 4 * max(array.size for array in tensors_of(random_model("tiny")).values())
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = random_model("tiny", "float16")
    weights = sum(array.nbytes for array in tensors_of(model).values())
    assert weights <= mx.get_peak_memory() - before < weights + 4 * largest < 2 * weights


def bench(*arguments: object) -> int:
    return main([str(a) for a in ("--repeats", 1, "--warmup", 0, "--decode-tokens", 1, *arguments)])


def test_the_command_prints_and_writes_its_report(tiny_folder, tmp_path, capfd):
    assert bench("--model", tiny_folder, "--image-size", "80x60", "--output", tmp_path / "a" / "b") == 0
    out, err = capfd.readouterr()
    written = tmp_path / "a" / "b"
    assert (written / "bench.md").read_text(encoding="utf-8") == out
    assert err == ""
    numbers = json.loads((written / "bench.json").read_text(encoding="utf-8"))
    assert [row["granularity"] for row in numbers["rows"]] == list(GRANULARITIES)
    assert numbers["text_tokens"] > 60
    assert numbers["image"] == "a made-up image of 80×60"


def test_the_command_measures_what_it_is_told_to(tiny_folder, capfd):
    arguments = ("--image", PHOTO, "--prompt", "Why?", "--granularities", 16, 4)
    assert bench("--model", tiny_folder, "--json", *arguments) == 0
    report = json.loads(capfd.readouterr().out)
    assert (report["model"], report["image"]) == (str(tiny_folder), str(PHOTO))
    assert [row["granularity"] for row in report["rows"]] == [4, 16]


def test_the_command_makes_up_a_model(capfd):
    """In 4 bits and float16, on crops of 336 pixels."""
    assert bench("--random-weights", "tiny", "-q", "--image-size", "336x336", "--granularities", 36, "--json") == 0
    report = json.loads(capfd.readouterr().out)
    assert (report["model"], report["dtype"]) == ("tiny, random weights", "float16")
    assert 4.5 <= report["bits_per_weight"]["language_model"] < 4.6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "one of the arguments --model --random-weights is required"),
        (("--random-weights", "2b"), "invalid choice: '2b'"),
        (("--random-weights", "tiny", "--model", "x"), "not allowed with argument"),
        (("--model", "x", "--dtype", "float16"), "--dtype and -q are for random weights"),
        (("--model", "x", "-q"), "--dtype and -q are for random weights"),
        (("--random-weights", "tiny", "--q-bits", "8"), "add -q"),
        (("--random-weights", "tiny", "--image-size", "800"), "expected WIDTHxHEIGHT, such as 800x600"),
        (("--random-weights", "tiny", "--image-size", "0x600"), "expected WIDTHxHEIGHT, such as 800x600"),
        (("--random-weights", "tiny", "--repeats", "0"), "0 is not a whole number from 1"),
        (("--random-weights", "tiny", "--text-tokens", "9"), "no question makes 9 text tokens"),
        (("--random-weights", "tiny", "--text-tokens", "5000"), "positions"),
        (
            ("--random-weights", "tiny", "--granularities", "37"),
            "granularity 37 is not one of this model's; choose from 36, 72, 144",
        ),
        (("--random-weights", "tiny", "--image", "no.jpg"), "no.jpg"),
        (("--model", "nowhere"), "no folder nowhere"),
    ],
)
def test_bad_usage_is_one_line(refused, arguments, message):
    assert message in refused(main, *arguments)


def test_an_output_that_cannot_be_is_refused_before_measuring(refused, tmp_path):
    (tmp_path / "file").write_text("")
    line = refused(main, "--random-weights", "tiny", "--output", tmp_path / "file" / "folder", status=1)
    assert str(tmp_path / "file") in line
