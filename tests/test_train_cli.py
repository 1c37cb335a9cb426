"""train, feedback, fuse, export and `generate --adapter-path`: options, recipes, and what goes wrong."""

import io
import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
import yaml
from conftest import RECORDS, make_adapters, write_samples

from avg_mlx import InputError, convert, load
from avg_mlx.cli import export, feedback, fuse, generate, train
from avg_mlx.cli.progress import Bar
from avg_mlx.training import stages
from avg_mlx.training.options import InstructOptions, RglfOptions, RouterOptions


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Path:
    """Two samples that a router can learn from."""
    return write_samples(tmp_path_factory.mktemp("short"), [RECORDS[0], RECORDS[5]])


@pytest.fixture
def required(tiny_folder, short, tmp_path) -> list:
    return ["--model", tiny_folder, "--data", short, "--adapter-path", tmp_path / "adapters"]


@pytest.fixture
def options_given(monkeypatch):
    """`options_given(stage, *arguments)`: the options that a stage would be run with."""

    def parse(stage: str, *arguments):
        seen = []
        monkeypatch.setattr(stages, f"train_{stage}", lambda options, *_: seen.append(options) or ())
        monkeypatch.setattr(train, "_finish", lambda trained: None)
        assert train.main([stage, *map(str, arguments)]) == 0
        return seen[0]

    return parse


def write_yaml(file: Path, content) -> Path:
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return file


def test_defaults_are_those_of_the_stages(options_given, required):
    model, data, folder = required[1::2]
    given = {"model": str(model), "data": data, "adapter_path": folder}
    assert options_given("instruct", *required) == InstructOptions(**given)
    assert options_given("router", *required) == RouterOptions(**given)
    assert options_given("rglf", *required) == RglfOptions(**given)


def test_a_config_file_gives_options_and_the_command_line_wins(options_given, required, tmp_path):
    model, data, folder = required[1::2]
    config = {
        "model": str(model),
        "data": str(data),
        "adapter_path": str(folder),  # as mlx-lm writes names, or
        "batch-size": 3,  # as the command line does
        "learning_rate": "2e-4",
        "num_layers": -1,
        "grad_checkpoint": True,
        "train-vision": False,
        "val_data": None,
        "fine_tune_type": "dora",
        "lora_parameters": {"rank": 4, "scale": 10.0, "dropout": 0.1},
    }
    file = write_yaml(tmp_path / "config.yaml", config)
    options = options_given("instruct", "--config", file, "--batch-size", 2, "--lora-rank", 16)
    assert options == InstructOptions(
        model=str(model),
        data=data,
        adapter_path=folder,
        batch_size=2,
        learning_rate=2e-4,
        grad_checkpoint=True,
        fine_tune_type="dora",
        lora_rank=16,
        lora_scale=10.0,
        lora_dropout=0.1,
    )
    assert options_given("instruct", f"--config={file}").batch_size == 3
    assert options_given("instruct", "-c", file).batch_size == 3
    both = options_given("rglf", "-c", file, "--router-epochs", 4)
    assert (both.batch_size, both.router_batch_size, both.router_epochs, both.lora_rank) == (3, 4, 4, 4)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"lerning-rate": 1}, "config.yaml: lerning-rate .*did you mean learning-rate"),
        ({"learning_rat": 1}, "config.yaml: learning-rat .*did you mean learning-rate"),
        ({"lora_parameters": {"keys": ["q_proj"]}}, "config.yaml: lora-keys "),
        ({"lora_parameters": {"rank": 0}}, "config.yaml: lora-rank is 0; expected a whole number from 1"),
        ({"margin": 1}, "config.yaml: margin is not an option of train instruct"),
        ({"fine_tune_type": "prefix"}, "config.yaml: fine-tune-type is 'prefix'; expected lora, dora or full"),
        ({"batch_size": 0}, "config.yaml: batch-size is 0; expected a whole number from 1"),
        ({"batch_size": True}, "config.yaml: batch-size is True"),
        ({"batch_size": [4]}, r"config.yaml: batch-size is \[4\]"),
        ({"batch_size": {"a": 4}}, "config.yaml: batch-size is "),
        ({"batch_size": 2.5}, "config.yaml: batch-size is 2.5"),
        ({"learning_rate": ".nan"}, "config.yaml: learning-rate is '.nan'"),
        ({"warmup": 1.5}, "config.yaml: warmup is 1.5; expected a number from 0 up to 1"),
        ({"data": 7}, "config.yaml: data is 7; expected a path"),
        ({"grad_checkpoint": "yes"}, "config.yaml: grad-checkpoint is 'yes'; expected true or false"),
        ({7: 8}, "config.yaml: 7 is not an option"),
        ("- model\n- data\n", "config.yaml holds no options; expected lines such as learning-rate: 1.0e-5"),
        ("", "holds no options"),
        ("just a text", "holds no options"),
        ("a: [1,\n", "cannot read .*config.yaml"),
        ("data: 2026-13-45", "cannot read .*month must be in"),
        ("data: !!timestamp never", "cannot read .*config.yaml"),
        ("data: !!bool never", "cannot read .*config.yaml"),
        ("seed: " + "9" * 5000, "cannot read .*digits"),
        ("learning_rate: " + "9" * 400, "learning-rate is 9+"),
        ('model: "\\ud800"', "cannot read .*config.yaml .*surrogates"),
        ("model: " + "[" * 5000, "cannot read .*more than 4 levels"),
        ("a: &a [1]\nb: &b [*a, *a]\nc: [*b, *b]\n", "cannot read .*list or mapping a is to be written out"),
        ("model: " + "x" * 100_000, "above the limit"),
        (None, "cannot read .*config.yaml .*No such file"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stage", ["instruct"])
def test_config_files_that_cannot_be_used(stage, content, told, required, refused, tmp_path):
    file = tmp_path / "config.yaml"
    if content is not None:
        write_yaml(file, content)
    line = refused(train.main, stage, *required, "--config", file)
    assert line.startswith(f"avg-mlx train {stage}: ")
    assert_told(told, line)
    assert not (tmp_path / "adapters").exists()


def test_required_options_may_come_from_the_config_file(options_given, required, tmp_path):
    given = dict(zip(("model", "data", "adapter-path"), map(str, required[1::2]), strict=True))
    file = write_yaml(tmp_path / "config.yaml", given)
    assert options_given("instruct", "-c", file) == options_given("instruct", *required)
    assert options_given("instruct", "-c", file, "--model", "other").model == "other"


def assert_told(pattern: str, line: str) -> None:
    with pytest.raises(AssertionError, match=pattern):
        raise AssertionError(line)


@pytest.mark.parametrize("stage", ["instruct", "router", "rglf"])
@pytest.mark.parametrize("missing", ["--model", "--data", "--adapter-path"])
def test_required_options(stage, missing, required, refused):
    at = required.index(missing)
    line = refused(train.main, stage, *required[:at], *required[at + 2 :])
    assert f"the following arguments are required: {missing}" in line


def test_required_options_of_feedback(refused):
    assert "the following arguments are required: --model, --data, --output" in refused(feedback.main)


@pytest.mark.parametrize(
    ("stage", "option", "value", "told"),
    [
        ("instruct", "--epochs", "0", "epochs is 0; expected a whole number from 1"),
        ("instruct", "--iters", "1.5", "iters is '1.5'; expected a whole number"),
        ("instruct", "--batch-size", "-1", "--batch-size is -1"),
        ("instruct", "--learning-rate", "0", "--learning-rate is 0.0; expected a number above 0"),
        ("instruct", "--learning-rate", "inf", "is inf"),
        ("instruct", "--learning-rate", "nan", "is nan"),
        ("instruct", "--warmup", "1.1", "warmup is 1.1; expected a number from 0 up to 1"),
        ("instruct", "--val-fraction", "2", "--val-fraction is 2.0; expected a number from 0 up to 1"),
        ("instruct", "--grad-clip", "0", "--grad-clip is 0.0; expected a number above 0"),
        ("instruct", "--weight-decay", "-1", "--weight-decay is -1"),
        ("instruct", "--lr-schedule", "linear", "--lr-schedule is 'linear'; expected cosine or constant"),
        ("instruct", "--num-layers", "-2", "--num-layers is -2; expected a whole number from -1"),
        ("instruct", "--lora-dropout", "1", "--lora-dropout is 1.0; expected a number from 0 up to 0.99"),
        ("instruct", "--granularities-per-step", "0", "--granularities-per-step is 0"),
        ("instruct", "--granularities-per-step", "6", "--granularities-per-step is 6, but the model has 5"),
        ("instruct", "--num-layers", "3", "--num-layers is 3, but the language model has 2"),
        ("instruct", "--seed", "-1", "seed is -1"),
        ("instruct", "--margin", "1", "unrecognized arguments: --margin 1"),
        ("router", "--margin", "-1", "margin is -1.0; expected a number from 0"),
        ("router", "--rank-loss-weight", "x", "--rank-loss-weight is 'x'; expected a number"),
        ("router", "--lora-rank", "8", "unrecognized arguments: --lora-rank 8"),
        ("router", "--base-adapters", "absent", "no adapter folder absent"),
        ("router", "--model", "absent", "no folder absent"),
        ("router", "--data", "absent.json", "cannot read absent.json"),
        ("instruct", "--vision-learning-rate", "1e-4", "--vision-learning-rate .*--train-vision"),
        ("rglf", "--router-learning-rate", "0", "--router-learning-rate is 0.0; expected a number above 0"),
        ("rglf", "--router-epoch", "2", "unrecognized arguments: --router-epoch 2; did you mean --router-epochs"),
        ("rglf", "--token-cost", "-1", "--token-cost is -1.0; expected a number from 0"),
        ("rglf", "--granularities-per-step", "6", "--granularities-per-step is 6, but the model has 5"),
        ("rglf", "--base-adapters", "a", "unrecognized arguments: --base-adapters a"),
    ],
)
def test_values_out_of_range(stage, option, value, told, required, refused):
    assert_told(told, refused(train.main, stage, *required, option, value))


def test_an_abbreviated_config_is_not_silently_ignored(required, refused, tmp_path):
    file = write_yaml(tmp_path / "config.yaml", {"batch_size": 3})
    assert "unrecognized arguments: --conf" in refused(train.main, "instruct", *required, "--conf", file)


def test_an_unknown_stage(refused):
    line = refused(train.main, "stage4")
    assert "invalid choice: 'stage4'" in line
    assert all(stage in line for stage in ("instruct", "router", "rglf"))


@pytest.mark.parametrize(
    ("main", "arguments", "told"),
    [
        (train.main, [], "rglf"),
        (train.main, ["--help"], "both stages in one command"),
        (train.main, ["instruct", "--help"], "--granularities-per-step"),
        (train.main, ["router", "--help"], "--feature-cache"),
        (train.main, ["rglf", "--help"], "--router-epochs"),
        (feedback.main, ["--help"], "--output"),
        (fuse.main, ["--help"], "--dequantize"),
        (export.main, ["--help"], "--save-path"),
    ],
)
def test_help(main, arguments, told, capfd):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    out, err = capfd.readouterr()
    assert told in out
    assert err == ""


@pytest.fixture
def both(tiny_stage3, short, tmp_path) -> list[str]:
    """Arguments that train both stages in a few steps."""
    options = ["--model", tiny_stage3, "--data", short, "--adapter-path", tmp_path / "adapters", "--batch-size", 2]
    options += ["--iters", 2, "--learning-rate", 1e-3, "--lora-rank", 2, "--lora-scale", 2, "--router-iters", 3]
    return ["rglf", *map(str, options)]


def files_in(folder: Path) -> dict[str, bytes]:
    """Every file but the pictures."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.suffix != ".png")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_both_stages_and_again_with_resume(both, tiny_stage3, short, tmp_path, capfd, refused):
    folder = tmp_path / "adapters"
    assert train.main(both) == 0
    out, err = capfd.readouterr()
    assert_feedback_table(out, router=False)
    for title, run, steps in (("Instruct", folder / "instruct", 2), ("Router", folder, 3)):
        log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        assert [record["step"] for record in log] == list(range(1, steps + 1))
        first, mean = log[0]["loss"], sum(record["loss"] for record in log) / steps
        told = f"Steps: {steps}, .*Training loss: {first:.4f} .* {mean:.4f} .*Adapters: {run}"
        assert re.search(told, out, re.DOTALL)
        assert f"{title}: step {steps} of {steps}, loss {log[-1]['loss']:.4f}" in err
    rows = [json.loads(line) for line in (folder / "feedback.jsonl").read_text().splitlines()]
    assert sorted(row["id"] for row in rows) == ["last", "one"]
    tensors = mx.load(str(folder / "adapters.safetensors"))
    assert any(name.endswith("lora_a") for name in tensors)
    assert "router.voter" in tensors

    answer = answer_of(capfd, tiny_stage3, short, "--adapter-path", folder)
    assert answer["granularity_source"] == "router"

    finished = files_in(folder)
    assert f"{folder} holds a run already; resume it with --resume" in refused(train.main, *both)
    assert train.main([*both, "--resume"]) == 0
    assert files_in(folder) == finished

    for runs in ([folder], [folder, folder / "instruct"]):  # as if the power had failed before a first step was kept
        for checkpoint in [checkpoint for run in runs for checkpoint in run.glob("checkpoint-*")]:
            shutil.rmtree(checkpoint)
        assert train.main([*both, "--resume"]) == 0
        again = mx.load(str(folder / "adapters.safetensors"))
        assert all(mx.array_equal(again[name], array) for name, array in tensors.items())


def test_two_commands_do_what_train_rglf_does(both, required, tiny_stage3, tmp_path):
    assert train.main(both) == 0
    shared = ["--model", tiny_stage3, *required[2:4], "--adapter-path"]
    stage3 = ["--batch-size", 2, "--iters", 2, "--learning-rate", 1e-3, "--lora-rank", 2, "--lora-scale", 2]
    assert train.main(list(map(str, ["instruct", *shared, tmp_path / "tuned", *stage3]))) == 0
    stage4 = ["--base-adapters", tmp_path / "tuned", "--iters", 3]
    assert train.main(list(map(str, ["router", *shared, tmp_path / "routed", *stage4]))) == 0
    for ours, theirs in (("adapters/instruct", "tuned"), ("adapters", "routed")):
        ours, theirs = (mx.load(str(tmp_path / folder / "adapters.safetensors")) for folder in (ours, theirs))
        assert ours.keys() == theirs.keys()
        assert all(mx.array_equal(ours[name], array) for name, array in theirs.items())


def test_ctrl_c_between_the_stages_says_how_to_resume(both, tmp_path, monkeypatch, capfd):
    def press(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(stages, "load_adapters", press)
        assert train.main(both) == 130
    assert "--resume goes on from there" in capfd.readouterr().err.splitlines()[-1]
    shutil.move(tmp_path / "adapters", tmp_path / "moved")
    both[both.index("--adapter-path") + 1] = str(tmp_path / "moved")
    assert train.main([*both, "--resume"]) == 0
    assert f"Adapters: {tmp_path / 'moved'}\n" in capfd.readouterr().out.replace("; losses", "\n")


@pytest.mark.parametrize("stage", ["router", "rglf"])
def test_one_granularity_leaves_a_router_no_choice(stage, tiny_stage3, required, refused, tmp_path):
    convert(tiny_stage3, tmp_path / "plain", granularities=[16])
    line = refused(train.main, stage, "--model", tmp_path / "plain", *required[2:])
    assert f"{tmp_path / 'plain'} has one granularity, 16" in line
    assert f"avg-mlx convert --hf-path {tmp_path / 'plain'} --granularities" in line
    assert not required[-1].exists()
    assert train.main(["instruct", "--model", str(tmp_path / "plain"), *map(str, required[2:]), "--iters", "1"]) == 0


def test_a_folder_that_stage_4_would_refuse_is_refused_before_stage_3(both, required, refused, tmp_path, capfd):
    assert train.main(["instruct", *map(str, required), "--iters", "1"]) == 0
    capfd.readouterr()
    assert f"{tmp_path / 'adapters'} holds a run already" in refused(train.main, *both)
    assert not (tmp_path / "adapters" / "instruct").exists()


def test_data_that_stage_4_would_refuse_is_refused_before_stage_3(tiny_stage3, tmp_path):
    options = RglfOptions(
        model=tiny_stage3, data=write_samples(tmp_path, RECORDS[3:5]), adapter_path=tmp_path / "adapters"
    )
    with pytest.raises(InputError, match="leaves no sample to learn"):
        stages.train_rglf(options)
    assert not options.adapter_path.exists()


@pytest.mark.parametrize(("every", "told"), [(1, [1, 2, 3, 4, 5]), (2, [2, 3, 4, 5]), (10, [3, 5])])
def test_progress_without_a_terminal(every, told, required, capfd):
    """A line each so many steps, for validation, and for the last step."""
    options = [
        "--iters",
        5,
        "--batch-size",
        1,
        "--val-fraction",
        0.5,
        "--steps-per-eval",
        3,
        "--steps-per-report",
        every,
    ]
    assert train.main(["instruct", *map(str, [*required, *options])]) == 0
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("Instruct: step")]
    assert [int(re.match(r"Instruct: step (\d) of 5, loss \d", line)[1]) for line in lines] == told
    assert [f"step {step} of" in line for line in lines for step in (3, 5) if "validation loss" in line].count(
        True
    ) == 2
    log = [json.loads(line) for line in (required[-1] / "log.jsonl").read_text().splitlines()]
    assert f"Validation loss: {log[-1]['validation_loss']:.4f}" in out
    assert "Steps: 5, of which 5 were taken now" in out


@pytest.mark.parametrize(
    ("terminal", "hidden", "told"), [(True, False, "bar"), (False, False, "line"), (False, True, "")]
)
def test_a_bar_is_for_a_terminal_and_lines_for_elsewhere(terminal, hidden, told, monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr("sys.stderr", stream)
    record = {"step": 2, "loss": 1.5, "learning_rate": 0.1, "samples_per_second": 3.0, "peak_memory_gb": 1.0}
    with Bar("Router", "step", hidden, every=2) as bar:
        bar.step(record, 9)
        bar._bar.refresh()
        shown = stream.getvalue()
    assert ("2/9" in shown and "loss=1.5000" in shown) == (told == "bar")
    assert ("Router: step 2 of 9, loss 1.5000" in shown) == (told == "line")
    assert (shown == "") == (told == "")


def answer_of(capfd, model: Path, short: Path, *arguments) -> dict:
    capfd.readouterr()
    image = short.parent / "wide.png"
    command = ["--model", model, "--image", image, "--prompt", "What?", "--max-tokens", 4, "--json", *arguments]
    assert generate.main([str(argument) for argument in command]) == 0
    return json.loads(capfd.readouterr().out)


@pytest.fixture
def collect(tiny_folder, short, tmp_path):
    """Arguments of a feedback command."""
    return ["--model", tiny_folder, "--data", short, "--output", tmp_path / "feedback.jsonl"]


def test_feedback_ends_with_a_summary(collect, capfd):
    assert feedback.main([str(argument) for argument in collect]) == 0
    assert_feedback_table(capfd.readouterr().out, router=True)
    rows = [json.loads(line) for line in collect[-1].read_text().splitlines()]
    keys = {"id", "granularities", "losses", "best", "answer_tokens", "router_logits"}
    assert all(keys <= row.keys() for row in rows)


def assert_feedback_table(out: str, router: bool) -> None:
    assert ("The router picks the best granularity" in out) == ("mean regret" in out) == router
    rows = [line.strip("| ").split()[0] for line in out.splitlines() if line.startswith("|")]
    assert rows[2:7] == ["1", "2", "4", "8", "16"]


def test_feedback_takes_a_config_file(collect, capfd, refused, tmp_path):
    names = ("model", "data", "output")
    file = write_yaml(tmp_path / "feedback.yaml", dict(zip(names, map(str, collect[1::2]), strict=True)))
    assert feedback.main(["-c", str(file)]) == 0
    assert_feedback_table(capfd.readouterr().out, router=True)
    assert collect[-1].read_text().count("\n") == 2
    write_yaml(file, {"model": "m", "dta": "d"})
    assert_told(
        "feedback.yaml: dta is not an option of feedback; did you mean data", refused(feedback.main, "-c", file)
    )
    write_yaml(file, {"max-seq-length": 0})
    assert_told("feedback.yaml: max-seq-length is 0; expected", refused(feedback.main, "-c", file))


def test_feedback_of_another_model_is_refused_and_kept(collect, tiny_four_bits, short, refused, tmp_path, capfd):
    assert feedback.main([str(argument) for argument in collect]) == 0
    file = collect[-1]
    before = file.read_bytes()
    capfd.readouterr()
    others = ["--model", tiny_four_bits, *collect[2:]]
    train_others = ["--model", tiny_four_bits, "--data", short, "--adapter-path", tmp_path / "adapters"]
    assert_told("is the feedback of another model", refused(feedback.main, *others))
    line = refused(train.main, "router", *train_others, "--feedback", file)
    assert_told("is the feedback of another model .*; choose another", line)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("hello\n", "line 1: .*choose another"),
        ('{"id": "one"}\n', "line 1: not feedback .*choose another"),
        ("[]\n", "line 1: .*choose another"),
    ],
)
def test_a_file_that_is_not_feedback_is_refused_and_kept(content, told, collect, refused):
    collect[-1].write_text(content)
    assert_told(told, refused(feedback.main, *collect))
    assert collect[-1].read_text() == content


@pytest.fixture(scope="module")
def lora(tiny_folder, tmp_path_factory) -> Path:
    return make_adapters(tiny_folder, tmp_path_factory.mktemp("lora") / "adapters", "lora")


def test_fuse_then_export(lora, tiny_folder, short, tmp_path, capfd):
    unfused = answer_of(capfd, tiny_folder, short, "--adapter-path", lora)
    arguments = ["--model", tiny_folder, "--adapter-path", lora, "--save-path", tmp_path / "fused"]
    assert fuse.main([str(argument) for argument in arguments]) == 0
    out = capfd.readouterr().out
    assert out.splitlines()[-1] == f"Wrote {tmp_path / 'fused'}"
    assert "language_model" in out
    assert answer_of(capfd, tmp_path / "fused", short)["token_ids"] == unfused["token_ids"]
    assert export.main(["--model", str(tmp_path / "fused"), "--save-path", str(tmp_path / "exported")]) == 0
    assert capfd.readouterr().out == f"Wrote {tmp_path / 'exported'}\n"
    assert (tmp_path / "exported" / "model.safetensors.index.json").is_file()


def test_generate_puts_adapters_on_top(lora, tiny_folder, short, capfd):
    plain = answer_of(capfd, tiny_folder, short)
    with_adapters = answer_of(capfd, tiny_folder, short, "--adapter-path", lora)
    model, _ = load(tiny_folder, adapter_path=lora)
    assert model is not None
    assert with_adapters["router"]["logits"] != plain["router"]["logits"]  # the projector was trained too


def test_adapters_of_another_model_are_one_line_everywhere(lora, tiny_stage3, tiny_four_bits, short, refused, tmp_path):
    told = f"{lora} was trained on another model; give --model as in training"
    adapters, model = ["--adapter-path", lora], ["--model", tiny_four_bits]
    question = ["--image", short.parent / "wide.png", "--prompt", "What?"]
    assert told in refused(generate.main, *model, *adapters, *question)
    assert told in refused(fuse.main, *model, *adapters, "--save-path", tmp_path / "fused")
    assert told in refused(feedback.main, *model, *adapters, "--data", short, "--output", tmp_path / "feedback.jsonl")
    base = ["--base-adapters", lora, "--adapter-path", tmp_path / "routed"]
    assert told in refused(train.main, "router", *model, *base, "--data", short)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("main", "name"), [(fuse.main, "fuse"), (export.main, "export")])
def test_existing_save_paths_are_refused(main, name, lora, tiny_folder, refused, tmp_path):
    more = ["--adapter-path", lora] if name == "fuse" else []
    line = refused(main, "--model", tiny_folder, "--save-path", tmp_path, *more)
    assert line == f"avg-mlx {name}: {tmp_path} exists already; choose another path, or remove it yourself"


def test_unexpected_errors_are_one_line_and_status_1(required, refused, monkeypatch):
    monkeypatch.setattr(stages, "load", lambda path: 1 / 0)
    line = refused(train.main, "instruct", *required, status=1)
    assert line.startswith("avg-mlx train instruct: unexpected ZeroDivisionError")
