"""The real Llama-2 tokenizer, fetched for the test: ids against the reference's and against SentencePiece's."""

import json

import pytest
from conftest import GOLDEN, SentencePieceTokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from avg_mlx.inputs.prompt import build_messages, encode_messages, encode_text

pytestmark = pytest.mark.slow

PROMPTS = json.loads((GOLDEN / "llama2_prompts.json").read_text())
PARTS = (
    " ",
    "  ",
    " " * 5,
    " " * 15,
    " " * 33,
    "▁",
    "\n",
    "\n\n\n",
    "\t",
    "aaaaaaa",
    "The 1990s",
    "über",
    "日本語",
    "🙂",
    "</s>",
)
texts = st.lists(st.sampled_from(PARTS) | st.text(max_size=10), max_size=8).map("".join)


@pytest.mark.parametrize("case", PROMPTS["single"], ids=lambda case: case["prompt"][:20])
def test_single_turn(case, llama2):
    assert encode_messages(llama2, build_messages(case["prompt"], images=1)) == case["ids"]


def test_multi_turn(llama2):
    roles = ("user", "assistant", "user")
    messages = [{"role": r, "content": c} for r, c in zip(roles, PROMPTS["multi"]["turns"], strict=True)]
    assert encode_messages(llama2, build_messages(messages, images=1)) == PROMPTS["multi"]["ids"]


def test_text_only(llama2):
    assert (
        encode_messages(llama2, build_messages(PROMPTS["text_only"]["prompt"], images=0)) == PROMPTS["text_only"]["ids"]
    )


@settings(max_examples=2000)
@given(text=texts.filter(lambda text: "<image>" not in text))
@example(text=" " * 100)
@example(text="a" + " " * 47 + "b")
def test_any_text_gets_sentencepieces_ids(llama2_reference, llama2, text):
    assert encode_text(llama2, text) == llama2_reference.encode(text)


def test_the_vocabulary_decodes_as_sentencepiece_decodes(llama2_file, llama2):
    pieces = SentencePieceTokenizer(llama2_file, legacy=True).pieces
    anchor = pieces.encode("a")
    assert llama2.vocab_size == pieces.vocab_size() == 32000
    for id in range(259, 32000):  # after the special tokens and single bytes
        assert llama2.decode([*anchor, id]) == pieces.decode([*anchor, id])
