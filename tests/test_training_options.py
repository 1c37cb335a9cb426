"""The options of training: one description for Python, the command line and YAML files."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from avg_mlx import InputError
from avg_mlx.cli import feedback, train
from avg_mlx.training.checked import options_of
from avg_mlx.training.options import FeedbackOptions, FineTuneType, InstructOptions, RglfOptions, RouterOptions
from avg_mlx.weights import adapters

REQUIRED = {"model": "m", "data": "d.json", "adapter_path": "a"}
VERBS = {
    InstructOptions: ["train", "instruct"],
    RouterOptions: ["train", "router"],
    RglfOptions: ["train", "rglf"],
    FeedbackOptions: ["feedback"],
}


@pytest.mark.parametrize("kind", VERBS)
def test_every_field_is_an_option(kind):
    options = options_of(kind)
    assert list(options) == [entry.name for entry in dataclasses.fields(kind)]
    assert all(option.help for option in options.values())


@pytest.mark.parametrize("kind", VERBS)
def test_every_default_is_allowed(kind):
    for name, option in options_of(kind).items():
        if not option.required:
            assert option.check(option.default) == option.default, name


@pytest.mark.parametrize("kind", VERBS)
def test_help_has_every_option_and_its_default(kind, capfd):
    main = feedback.main if kind is FeedbackOptions else train.main
    with pytest.raises(SystemExit):
        main([*VERBS[kind][1:], "--help"])
    shown = " ".join(capfd.readouterr().out.split())
    for name, option in options_of(kind).items():
        flag = f"--{name.replace('_', '-')}"
        assert f"{flag} " in shown
        assert option.help in shown
        if option.required:
            assert f"{option.help} (required)" in shown
        elif option.default is not None and option.kind is not bool:
            assert f"{option.help} (default: {option.default})" in shown


@pytest.mark.parametrize("verb", VERBS.values(), ids=" ".join)
def test_help_does_not_wait_for_mlx(verb):
    command = [sys.executable, "-X", "importtime", "-m", "avg_mlx", *verb, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "avg_mlx" in loaded
    assert not loaded & {"mlx", "mlx_lm", "numpy", "PIL", "transformers", "huggingface_hub", "yaml"}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("batch_size", 0, "a whole number from 1"),
        ("batch_size", 2.0, "a whole number from 1"),
        ("batch_size", True, "a whole number from 1"),
        ("batch_size", "4", "a whole number from 1"),
        ("batch_size", None, "a whole number from 1"),
        ("iters", 0, "a whole number from 1"),
        ("learning_rate", 0, "a number above 0"),
        ("learning_rate", math.nan, "a number above 0"),
        ("learning_rate", math.inf, "a number above 0"),
        ("warmup", 1.01, "a number from 0 up to 1"),
        ("warmup", -0.01, "a number from 0 up to 1"),
        ("num_layers", -2, "a whole number from -1"),
        ("lora_dropout", 1.0, "a number from 0 up to 0.99"),
        ("lr_schedule", "linear", "cosine or constant"),
        ("fine_tune_type", "prefix", "lora, dora or full"),
        ("train_vision", 1, "true or false"),
        ("data", 7, "a path"),
        ("model", 7, "a text"),
    ],
)
def test_python_users_get_the_bounds_too(name, value, expected):
    with pytest.raises(InputError) as error:
        InstructOptions(**REQUIRED | {name: value})
    assert f"{name} is {value!r}" in str(error.value)
    assert f"expected {expected}" in str(error.value)


def test_train_rglf_has_the_options_of_both_stages():
    both, stage4 = options_of(RglfOptions), options_of(RouterOptions)
    assert options_of(InstructOptions).items() <= both.items()
    assert stage4.keys() - both.keys() == {"base_adapters", "feedback"}
    for name, option in both.items():
        if name.startswith("router_"):
            theirs = stage4[name.removeprefix("router_")]
            assert option == dataclasses.replace(theirs, name=name, help=option.help, group=option.group)


def test_each_stage_gets_its_own_options_and_what_is_for_both():
    shared = REQUIRED | {"val_fraction": 0.1, "seed": 5, "warmup": 0.1, "resume": True, "image_folder": "i"}
    tuned = {"learning_rate": 1e-4, "epochs": 3, "batch_size": 1, "grad_accumulation_steps": 16, "lora_rank": 2}
    routed = {"learning_rate": 1e-2, "epochs": 4, "iters": 9, "batch_size": 8, "grad_accumulation_steps": 2}
    ranking = {"margin": 0.5, "token_cost": 0.1, "fresh_router": True, "feature_cache": "f"}
    both = RglfOptions(**shared, **tuned, **ranking, **{f"router_{name}": value for name, value in routed.items()})
    assert both.instruct == InstructOptions(**shared | {"adapter_path": "a/instruct"}, **tuned)
    assert both.router == RouterOptions(**shared, **routed, **ranking, base_adapters="a/instruct")


def test_values_are_held_in_one_type():
    options = InstructOptions(
        model=Path("m"), data="d.json", adapter_path="a", learning_rate=1, batch_size=np.int64(3), image_folder="i"
    )
    assert (options.model, options.data, options.adapter_path, options.image_folder) == (
        "m",
        *map(Path, ("d.json", "a", "i")),
    )
    assert (type(options.learning_rate), type(options.batch_size)) == (float, int)
    assert options.val_data is None


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"vision_learning_rate": 1e-4}, ["vision_learning_rate", "train_vision"]),
        ({"val_data": "v.json", "val_fraction": 0.1}, ["val_data", "val_fraction"]),
    ],
    ids=str,
)
def test_options_that_contradict_each_other(given, named):
    with pytest.raises(InputError) as error:
        InstructOptions(**REQUIRED | given)
    assert all(name in str(error.value) for name in named)


def test_what_must_stay_the_same_when_a_run_is_resumed():
    """Runs that were begun before can only be resumed while these names stay."""
    kept = InstructOptions(**REQUIRED).settings()
    assert kept.keys() == {
        *("model", "data", "val_data", "val_fraction", "epochs", "iters", "batch_size", "grad_accumulation_steps"),
        *("learning_rate", "warmup", "lr_schedule", "weight_decay", "grad_clip", "max_seq_length", "seed"),
        *("fine_tune_type", "num_layers", "lora_rank", "lora_scale", "lora_dropout", "granularities_per_step"),
        *("train_projector", "train_newline", "train_vision", "vision_learning_rate", "grad_checkpoint"),
    }
    assert kept["data"] == "d.json"


def test_the_fine_tune_types_are_those_of_adapters():
    """Named twice, since adapters need MLX and options must not."""
    assert get_args(FineTuneType) == get_args(adapters.FineTuneType)


def test_a_path_may_begin_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    options = InstructOptions(**REQUIRED | {"adapter_path": Path("~/tuned"), "image_folder": "~/photos"})
    assert (options.adapter_path, options.image_folder) == (tmp_path / "tuned", tmp_path / "photos")
    with pytest.raises(InputError, match=r"adapter_path is .*nosuchuser.*expected a path"):
        InstructOptions(**REQUIRED | {"adapter_path": "~nosuchuser/tuned"})
