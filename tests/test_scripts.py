"""The two scripts and the console script, as their users start them."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CASES, CHECKPOINT, GOLDEN, GRANULARITIES, ROOT, Reference

from avg_mlx import convert
from avg_mlx.cli import parser

CASE = 0
PROMPT, IMAGE = CASES[CASE]["prompt"], GOLDEN / CASES[CASE]["image"]
CROP_GRIDS = ([2, 1], [2, 2])  # of the first two cases


def start(*arguments, **options) -> subprocess.Popen:
    """Start Python with `arguments`, its outputs in pipes."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def run(*arguments, stdin: bytes = b"", **options) -> tuple[int, str, str]:
    """Exit status, stdout and stderr."""
    with start(*arguments, stdin=subprocess.PIPE, **options) as process:
        out, err = process.communicate(stdin)
    return process.returncode, out.decode(), err.decode()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder in which `convert.py` was run on the golden checkpoint."""
    folder = tmp_path_factory.mktemp("workplace")
    status, out, err = run(ROOT / "convert.py", "--hf-path", CHECKPOINT, cwd=folder)
    assert (status, err) == (0, "")
    return folder, out


@pytest.fixture(scope="module")
def ask(workplace):
    """`ask(*arguments)` runs `generate.py` there: exit status, stdout, stderr."""
    return lambda *arguments, **options: run(ROOT / "generate.py", *arguments, cwd=workplace[0], **options)


WHO = "No --model given: the model in mlx_model answers.\n"


def visual_tokens(case: int, granularity: int) -> int:
    """By the reference's lengths."""
    return CASES[case]["sequence_lengths"][GRANULARITIES.index(granularity)] - CASES[case]["prompt_tokens"]


KEYS = {
    "text",
    "token_ids",
    "finish_reason",
    "model",
    "revision",
    "granularity",
    "granularity_source",
    "router",
    "crops",
    "crop_grid",
    "visual_tokens",
    "visual_tokens_finest",
    "prompt_tokens",
    "prompt_token_ids",
    "timings",
    "peak_memory_gb",
}
TIMINGS = {
    "load",
    "preprocess",
    "vision",
    "router",
    "prefill",
    "time_to_first_token",
    "prompt_tokens_per_second",
    "generation_tokens_per_second",
}


def parse(out: str) -> dict:
    """The one object that --json prints, with the keys of the contract."""
    answer = json.loads(out)
    assert out.count("\n") == 1
    assert out.endswith("}\n")
    assert answer.keys() == KEYS
    assert answer["timings"].keys() == TIMINGS
    assert all(value >= 0 for value in answer["timings"].values())
    stages = ("preprocess", "vision", "router", "prefill")
    assert answer["timings"]["time_to_first_token"] == pytest.approx(sum(answer["timings"][s] for s in stages))
    assert answer["peak_memory_gb"] > 0
    return answer


def test_convert_ends_with_a_table(workplace):
    folder, out = workplace
    assert [path.name for path in folder.iterdir()] == ["mlx_model"]
    *lines, wrote = out.splitlines()
    header, _, *rows, total = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert header == ["part", "parameters", "bits/weight", "bytes"]
    parts = {"language_model", "vision_tower", "projector", "router", "image_newline"}
    assert {row[0] for row in rows} == parts
    *numbers, sums = ([float(number.replace(",", "")) for number in row[1:]] for row in (*rows, total))
    assert sums == [sum(row[0] for row in numbers), 32.0, sum(row[2] for row in numbers)]
    assert {row[1] for row in numbers} == {32.0}
    assert wrote == "Wrote mlx_model"


def test_json_with_an_image_on_standard_input_and_quiet(ask):
    case, reference = CASES[CASE], Reference(CASE)
    status, out, err = ask("--image", "-", "--prompt", PROMPT, "--json", "--quiet", "-m", 24, stdin=IMAGE.read_bytes())
    assert (status, err) == (0, WHO)
    assert (json.loads(out)["model"], json.loads(out)["revision"]) == ("mlx_model", None)
    answer = parse(out)
    assert answer["token_ids"] == case["token_ids"]
    assert answer["text"] == case["text"]
    assert answer["finish_reason"] == "length"
    assert (answer["granularity"], answer["granularity_source"]) == (case["picked"], "router")
    router = answer["router"]
    assert router.keys() == {"granularities", "logits", "probabilities"}
    assert router["granularities"] == list(GRANULARITIES)
    assert router["logits"] == pytest.approx(case["router_logits"], abs=1e-3)
    assert sum(router["probabilities"]) == pytest.approx(1)
    assert (answer["crops"], answer["crop_grid"]) == (case["num_crops"], CROP_GRIDS[CASE])
    assert answer["visual_tokens"] == visual_tokens(CASE, case["picked"])
    assert answer["visual_tokens_finest"] == visual_tokens(CASE, 576)
    assert answer["prompt_tokens"] == case["sequence_lengths"][GRANULARITIES.index(case["picked"])]
    assert answer["prompt_token_ids"] == reference("input_ids").tolist()
    assert answer["prompt_token_ids"].count(-200) == 1


def test_json_with_a_forced_granularity_and_the_prompt_on_standard_input(ask):
    expected = Reference(CASE)("greedy_per_granularity")[GRANULARITIES.index(36)].tolist()[:5]
    assert expected.index(expected[-1]) == 4  # it ends the answer for the first time
    end = expected[-1]
    status, out, err = ask(
        *("--image", IMAGE, "--prompt", "-", "--json", "--granularity", 36, "--extra-eos-token", end),
        stdin=PROMPT.encode(),
    )
    assert status == 0
    assert "Granularity: 36, forced" in err
    answer = parse(out)
    assert (answer["token_ids"], answer["finish_reason"]) == (expected, "stop")
    assert (answer["granularity"], answer["granularity_source"], answer["router"]) == (36, "forced", None)
    assert answer["visual_tokens"] == visual_tokens(CASE, 36)
    assert answer["prompt_token_ids"] == Reference(CASE)("input_ids").tolist()


def test_json_with_several_images(ask):
    images = [GOLDEN / CASES[case]["image"] for case in (0, 1)]
    status, out, _ = ask("--image", *images, "-p", "Which is larger?", "--json", "-m", 1, "--max-visual-tokens", 1000)
    assert status == 0
    answer = parse(out)
    assert len(answer["token_ids"]) == 1
    assert answer["crops"] == [CASES[0]["num_crops"], CASES[1]["num_crops"]]
    assert answer["crop_grid"] == list(CROP_GRIDS)
    assert len(answer["router"]) == len(answer["granularity"]) == 2
    for case, (router, granularity) in enumerate(zip(answer["router"], answer["granularity"], strict=True)):
        fitting = [g for g in GRANULARITIES if visual_tokens(case, g) <= 1000]
        assert granularity == max(fitting, key=lambda g: router["logits"][GRANULARITIES.index(g)])
        assert answer["visual_tokens"][case] == visual_tokens(case, granularity)
    assert answer["visual_tokens_finest"] == visual_tokens(0, 576) + visual_tokens(1, 576)
    assert answer["prompt_token_ids"].count(-200) == 2
    assert answer["prompt_tokens"] == len(answer["prompt_token_ids"]) - 2 + sum(answer["visual_tokens"])


def test_text_on_stdout_and_summary_on_stderr(ask):
    case = CASES[CASE]
    status, out, err = ask("--image", IMAGE, "--prompt", PROMPT, "-m", 24)
    assert status == 0
    assert out == case["text"] + "\n"
    who, ruler, image, granularity, tokens, prompt, generation, memory, first_token = err.splitlines()
    assert who == WHO.strip()
    assert ruler == "=========="
    assert image == "Image: 3 crops (the whole and 2×1)"
    assert granularity.startswith(f"Granularity: {case['picked']}, by the router (36: ")
    finest = visual_tokens(CASE, 576)
    assert tokens.startswith(f"Visual tokens: {visual_tokens(CASE, case['picked'])} of {finest} (")
    assert prompt.startswith(f"Prompt: {answer_length(case)} tokens, ")
    assert generation.startswith("Generation: 24 tokens, ")
    assert memory.startswith("Peak memory: ")
    assert first_token.startswith("Time to first token: ")


def answer_length(case: dict) -> int:
    return case["sequence_lengths"][GRANULARITIES.index(case["picked"])]


def test_text_only_question_by_the_console_script(workplace):
    command = Path(sys.executable).with_name("avg-mlx")
    done = subprocess.run(
        [command, "generate", "-p", "What is the sum?", "--json", "-m", "3"], cwd=workplace[0], capture_output=True
    )
    assert done.returncode == 0
    answer = parse(done.stdout.decode())
    for key in ("granularity", "granularity_source", "router", "crops", "crop_grid", "visual_tokens"):
        assert answer[key] is None
    assert answer["visual_tokens_finest"] == 0
    assert answer["prompt_tokens"] == len(answer["prompt_token_ids"])
    assert -200 not in answer["prompt_token_ids"]
    assert len(answer["token_ids"]) == 3


def test_reader_that_leaves_early(workplace):
    arguments = ("-p", "What is the sum?", "-m", 2000, "--temp", 1, "--seed", 0)
    with start(ROOT / "generate.py", *arguments, cwd=workplace[0]) as process:
        assert process.stdout.read(1)  # the answer streams: there is more to come
        process.stdout.close()
        err = process.stderr.read()
    assert (process.returncode, err) == (1, WHO.encode())


def test_closed_standard_output(workplace):
    status, out, err = run(ROOT / "generate.py", "-p", "Why?", cwd=workplace[0], preexec_fn=lambda: os.close(1))
    assert (status, out) == (1, "")
    assert err == "generate.py: standard output is closed; send it to a terminal, a file or /dev/null\n"


def test_closed_standard_input(workplace):
    status, out, err = run(ROOT / "generate.py", "-p", "-", cwd=workplace[0], preexec_fn=lambda: os.close(0))
    assert (status, out) == (2, "")
    assert err == "generate.py: the prompt is empty; ask something\n"


# Stopped conversions


SLOW_CONVERT = """
import signal, sys, time
from pathlib import Path

import mlx.core as mx


def stall(file, *_, **__):
    Path(file).write_bytes(b"half of it")
    print("writing", flush=True)
    time.sleep(60)


signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the shell of the tests has made of them
signal.signal(signal.SIGHUP, signal.SIG_DFL)
mx.save_safetensors = stall
from avg_mlx.cli.convert import main

sys.exit(main())
"""


@pytest.fixture
def stop(tmp_path):
    """Stop a conversion in the midst of its writing: exit status, stderr, and the folder it wrote into."""

    def run(number: int) -> tuple[int, str, Path]:
        output = tmp_path / "parent" / "model"
        output.parent.mkdir()
        with start("-c", SLOW_CONVERT, "--hf-path", CHECKPOINT, "--mlx-path", output, cwd=ROOT) as process:
            try:
                assert process.stdout.readline() == b"writing\n"
                assert [file.read_bytes() for file in output.parent.rglob("*.safetensors")] == [b"half of it"]
                process.send_signal(number)
                _, err = process.communicate()
            finally:
                process.kill()
        assert not output.exists()
        return process.returncode, err.decode(), output.parent

    return run


@pytest.mark.parametrize(("number", "status"), [(signal.SIGHUP, 129), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_conversion_leaves_nothing(stop, number, status):
    code, err, parent = stop(number)
    assert (code, err) == (status, "\nconvert.py: interrupted\n")
    assert list(parent.iterdir()) == []


def test_killed_conversion_is_not_in_the_way_of_the_next(stop):
    code, _, parent = stop(signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert all(path.name.startswith(".") and path.name.endswith(".partial") for path in parent.iterdir())
    convert(CHECKPOINT, parent / "model")
    assert (parent / "model" / "config.json").is_file()
    assert [path.name for path in parent.iterdir()] == ["model"]


def test_a_second_signal_does_not_tear_what_the_first_one_ends(capfd):
    """A terminal that closes may send several."""
    tidied = []

    def work(_):
        try:
            signal.raise_signal(signal.SIGHUP)
        finally:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGTERM)
            tidied.append(True)

    before = [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGHUP, signal.SIGTERM)]
    try:
        for _ in range(2):
            assert parser.run(parser.Parser(prog="verb"), work, []) == 129
        after = [signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)]
    finally:
        for number, handler in zip((signal.SIGHUP, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
    assert tidied == [True, True]
    assert after == [signal.SIG_DFL, signal.SIG_DFL]
    assert capfd.readouterr().err == 2 * "\nverb: interrupted\n"


def test_disk_that_takes_no_more(tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))

    status, out, err = run(
        *("-m", "avg_mlx", "convert", "--hf-path", CHECKPOINT, "--mlx-path", tmp_path / "model"),
        cwd=ROOT,
        preexec_fn=limit,
    )
    assert (status, out) == (1, "")
    assert err.startswith(f"avg-mlx convert: cannot write into {tmp_path} (")
    assert err.endswith("; is the disk full?\n")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# Help and verbs


LATE = {"mlx", "mlx_lm", "numpy", "PIL", "transformers", "tokenizers", "safetensors", "huggingface_hub", "tqdm"}


@pytest.mark.parametrize(
    "command",
    [("generate.py",), ("convert.py",), ("-m", "avg_mlx"), ("-m", "avg_mlx", "generate"), ("-m", "avg_mlx", "convert")],
    ids=" ".join,
)
def test_help_imports_nothing_heavy(command):
    status, out, err = run("-X", "importtime", *command, "--help", cwd=ROOT)
    assert status == 0
    assert out.startswith("usage: ")
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in err.splitlines()}
    assert "argparse" in imported or command == ("-m", "avg_mlx")
    assert "avg_mlx" in imported
    assert imported & LATE == set()


def test_help_lists_every_flag():
    _, out, _ = run("generate.py", "--help", cwd=ROOT)
    for flag in (
        *(
            "--model",
            "--prompt",
            "--image",
            "--granularity",
            "--max-visual-tokens",
            "--token-cost",
            "--max-pixels",
            "--json",
            "--quiet",
        ),
        *("--max-tokens", "-m", "--temp", "--temperature", "--top-p", "--top-k", "--min-p", "--seed", "--verbose"),
        *("--repetition-penalty", "--repetition-context-size", "--max-kv-size", "--kv-bits", "--kv-group-size"),
        *("--quantized-kv-start", "--prefill-step-size", "--system-prompt", "--extra-eos-token"),
    ):
        assert f" {flag}" in out
    _, out, _ = run("convert.py", "--help", cwd=ROOT)
    for flag in (
        *("--hf-path", "--revision", "--mlx-path", "-q", "--quantize", "--q-bits", "--q-group-size", "--q-mode"),
        *("--quant-predicate", "--q-vision", "--q-router", "--dtype", "-d", "--dequantize", "--upload-repo"),
    ):
        assert f" {flag}" in out


def test_verbs():
    status, out, err = run("-m", "avg_mlx", cwd=ROOT)
    assert (status, err) == (0, "")
    assert "  convert " in out
    assert "  generate " in out
    assert run("-m", "avg_mlx", "--help", cwd=ROOT) == (status, out, err)
    assert run("-m", "avg_mlx", "--version", cwd=ROOT)[:2] == (0, "avg-mlx 0.1.0\n")


def test_unknown_verb():
    status, out, err = run("-m", "avg_mlx", "paint", cwd=ROOT)
    assert (status, out) == (2, "")
    assert err.startswith("avg-mlx: unknown verb paint; ")
    assert "choose from" in err
    assert "convert" in err
    assert "generate" in err
    assert err.count("\n") == 1
