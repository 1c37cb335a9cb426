"""Tokenizers of strangers: none may make much of little."""

import json
import shutil

import pytest
from conftest import ROOT

from avg_mlx import InputError
from avg_mlx.inputs.prompt import build_messages, encode_messages, encode_text
from avg_mlx.weights.checkpoint import load_tokenizer
from avg_mlx.weights.tokenizer_bounds import is_linear

DEMO = ROOT / "avg_mlx/demo_model"
KEYS = json.loads((DEMO / "tokenizer.json").read_text())


def replace(old: str, new: str) -> dict:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def around(*pieces) -> dict:
    return {"post_processor": KEYS["post_processor"] | {"single": list(pieces)}}


BOS, TEXT = KEYS["post_processor"]["single"]
LONG = "x" * 2000


@pytest.fixture
def load_with(tmp_path):
    """`load_with(keys)` loads the demo model's tokenizer with other keys in its tokenizer.json."""

    def load_with(keys: dict, **settings):
        shutil.copyfile(DEMO / "tokenizer_config.json", tmp_path / "tokenizer_config.json")
        old = json.loads((tmp_path / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(old | settings))
        (tmp_path / "tokenizer.json").write_text(json.dumps(KEYS | keys))
        return load_tokenizer(tmp_path, {})

    return load_with


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"normalizer": replace("a", "a" * 1_000_000)}, "normalizer may make a text 1000000 times as long"),
        ({"normalizer": {"type": "Sequence", "normalizers": [replace("a", "aa")] * 40}}, "normalizer may make a text"),
        ({"normalizer": {"type": "Prepend", "prepend": LONG}}, "normalizer may make a text 2001 times"),
        ({"normalizer": replace("", "aa")}, "not a fixed text"),
        ({"normalizer": replace("", "aa") | {"pattern": {"Regex": "a*"}}}, "not a fixed text"),
        ({"normalizer": {"type": "NFKC"}}, "its normalizer has NFKC; known are NFC"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKD"}]}}, "has NFKD"),
        ({"decoder": replace("a", "a" * 1_000_000)}, "decoder may make a text"),
        ({"pre_tokenizer": split("(a+)+$")}, r"splits at (a+)+$"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split(r"a+$")]}}, "may take very long"),
        (around(*[BOS] * 17, TEXT), "repeats a text, or adds more"),
        (around(BOS, TEXT, TEXT), "repeats a text, or adds more"),
        (around(BOS), "repeats a text, or adds more"),
        (around({"SpecialToken": {"id": "<none>", "type_id": 0}}, TEXT), "or unknown ones"),
        ({"post_processor": {"type": "Sequence", "processors": [KEYS["post_processor"]] * 2}}, "twice"),
        ({"model": KEYS["model"] | {"vocab": KEYS["model"]["vocab"] | {LONG: 336}}}, "a token of 2000 characters"),
        ({"model": KEYS["model"] | {"continuing_subword_prefix": LONG}}, "a token of 2000 characters"),
        ({"added_tokens": [KEYS["added_tokens"][0] | {"content": LONG}]}, "a token of 2000 characters"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "its model is WordPiece, expected BPE"),
        ({"normalizer": {"type": ["\x1b[31m"]}}, "no usable tokenizer"),
        ({"normalizer": 1}, "no usable tokenizer"),
        ({"model": None}, "no usable tokenizer"),
        ({"model": []}, "no usable tokenizer"),
    ],
)
def test_tokenizers_without_bounds_are_refused_in_one_line(load_with, keys, words, capfd):
    with pytest.raises(InputError) as error:
        load_with(keys)
    message = str(error.value)
    assert message.isprintable()
    assert words in message
    assert message.endswith("; convert the checkpoint again")
    assert capfd.readouterr().err == ""  # the library says there when it panics


@pytest.mark.parametrize(
    "keys",
    [
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")]}},
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}},
    ],
)
def test_what_language_models_have_is_allowed(load_with, keys):
    load_with(keys)


def test_padding_and_truncation_do_not_touch_prompts(load_with):
    padding = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    bounded = load_with({"padding": padding | {"pad_to_multiple_of": None}, "truncation": truncation})
    for text in ("What is this?", "What </s> is this?"):
        ids = encode_messages(bounded, build_messages(text, 0))
        assert text.lower().replace(" ", "_") in bounded.decode(ids)  # as its template writes it
        assert len(ids) < 40


def test_no_python_of_mlx_lm_writes_conversations(load_with):
    """A config could name a module of its that does, in place of the template."""
    with pytest.raises(InputError, match="the chat template writes 0 <image>"):
        load_with({}, chat_template_type="deepseek_v32", chat_template="{{ 'hello' }}")


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    "pattern",
    [GPT2, LLAMA3, LLAMA3.replace("{1,3}", ""), r" ?\p{L}+| ?[^\s\p{L}]|\s", "[一-龥]+", r"\p{N}{1,3}", r"[\r\n]", " "],
)
def test_patterns_of_linear_time(pattern):
    assert is_linear(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(a|a)*b",
        "a+$",
        "a*a*b",
        "a+b",
        "a?a?a?b",
        "a{100}b",
        "a{1,3}+",
        "a+?b",
        ".*a",
        r"(a)\1",
        "(?<=a)b",
        r"\s+(?=b)",
        r"\s+(?!\S)",  # without \s+ as another alternative
        r"\s*[\r\n]+|[|\s+|]",
        r"a\s+(?!\S)|\s+",
        "[[a]b]",
        "(",
        "\\",
    ],
)
def test_patterns_that_may_take_long(pattern):
    assert not is_linear(pattern)


def test_a_panic_is_an_error_of_ours():
    """In Rust's library it is no Exception; what else is none, such as Ctrl-C, passes."""

    class PanicException(BaseException):
        pass

    class Failing:
        bos_token_id = 1

        def __init__(self, error):
            self.error = error

        def encode(self, text, *, add_special_tokens=True):
            raise self.error

    with pytest.raises(InputError, match=r"cannot be tokenized \(PanicException: index out of bounds\)"):
        encode_text(Failing(PanicException("index out of bounds")), "a")
    with pytest.raises(KeyboardInterrupt):
        encode_text(Failing(KeyboardInterrupt()), "a")
