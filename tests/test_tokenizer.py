"""The tokenizer.json that is built, against SentencePiece itself as the reference used it."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import CASES, CHECKPOINT, SentencePieceTokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from avg_mlx import InputError
from avg_mlx.inputs.prompt import CHAT_TEMPLATE, PLACEHOLDER_ID, encode_text
from avg_mlx.weights.checkpoint import load_tokenizer
from avg_mlx.weights.sentencepiece import build_tokenizer, token_text, tokenizer_files
from avg_mlx.weights.writing import write_folder

SETTINGS = json.loads((CHECKPOINT / "tokenizer_config.json").read_text())

PARTS = (
    " ",
    "  ",
    " " * 7,
    " " * 16,
    "▁",
    "\n",
    "\t",
    "the chart",
    "Who?",
    "1234",
    "日本語",
    "🙂",
    "👩‍👩‍👧",
    "é",
    "é",
    "\0",
)
SPECIAL = ("<s>", "</s>", "<unk>")
texts = (
    st.lists(st.sampled_from(PARTS + SPECIAL) | st.text(max_size=8), max_size=8)
    .map("".join)
    .filter(lambda text: "<image>" not in text)
)


@pytest.fixture
def source(tmp_path) -> Path:
    """A checkpoint folder with a tokenizer only."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(CHECKPOINT / name, folder / name)
    return folder


def configure(folder: Path, **settings) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS | settings))


def rewrite(folder: Path):
    """The tokenizer of a checkpoint folder as the product writes and loads it."""
    destination = folder.with_name("destination")
    write_folder(destination, tokenizer_files(folder), tensors=(), sizes={})
    return load_tokenizer(destination, {})


@pytest.fixture(scope="module", params=[False, True], ids=["legacy false", "legacy true"])
def both(request, tmp_path_factory):
    """(ours, SentencePiece) with a space before the first stretch only, or before all."""
    folder = tmp_path_factory.mktemp("tokenizer") / "source"
    folder.mkdir()
    shutil.copyfile(CHECKPOINT / "tokenizer.model", folder / "tokenizer.model")
    configure(folder, legacy=request.param)
    return rewrite(folder), SentencePieceTokenizer(folder / "tokenizer.model", request.param)


@settings(max_examples=300)
@given(text=texts)
@example(text="")
@example(text=" </s> a</s>  b<unk> c")
@example(text="▁ ▁a")
@example(text="</s>USER: Why? ASSISTANT:")
def test_ids_are_sentencepieces(both, text):
    ours, reference = both
    assert encode_text(ours, text) == reference.encode(text)


@settings(max_examples=200)
@given(pieces=st.lists(texts, min_size=2, max_size=4))
@example(pieces=["", "", ""])
@example(pieces=["a", " b", "  c"])
@example(pieces=["a", "<s>b", "</s>"])
def test_pieces_between_placeholders_are_tokenized_by_themselves(both, pieces):
    ours, reference = both
    expected = reference.encode(pieces[0])
    for piece in pieces[1:]:
        expected += [PLACEHOLDER_ID, *reference.encode(piece)[1:]]
    assert encode_text(ours, "<image>".join(pieces)) == expected


def streamed(tokenizer, ids) -> str:
    """The text of ids that come one by one."""
    detokenizer = tokenizer.detokenizer
    segments = []
    for id in ids:
        detokenizer.add_token(id)
        segments.append(detokenizer.last_segment)
    detokenizer.finalize()
    return "".join([*segments, detokenizer.last_segment])


@settings(max_examples=200)
@given(parts=st.lists(st.sampled_from(PARTS) | st.text(max_size=8), max_size=8))
def test_the_streamed_text_is_the_decoded_text(tokenizer, parts):
    text = "".join(parts).lstrip(" ▁")
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert streamed(tokenizer, ids) == tokenizer.decode(ids) == text.replace("▁", " ")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["image"])
def test_the_streamed_text_of_stray_bytes_is_the_references(case, tokenizer):
    ids = [id for id in case["token_ids"] if id != tokenizer.eos_token_id]
    assert streamed(tokenizer, ids) == case["text"]


def test_special_tokens_and_template_of_the_written_tokenizer(source):
    tokenizer = rewrite(source)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer.unk_token == tokenizer.pad_token == "<unk>"
    assert tokenizer.chat_template == CHAT_TEMPLATE
    written = json.loads((source.with_name("destination") / "tokenizer_config.json").read_text())
    assert written["model_max_length"] == 4096
    assert written["clean_up_tokenization_spaces"] is False


@pytest.mark.parametrize(("add_bos", "ids"), [(True, [1]), (False, [])])
def test_bos_is_added_if_the_checkpoint_adds_it(source, add_bos, ids):
    configure(source, add_bos_token=add_bos)
    assert rewrite(source).encode("") == ids


def test_tokens_that_the_checkpoint_added_are_single_ids(source):
    added = {"512": {"content": "<pad>", "special": True}, "513": {"content": "<box>", "special": False}}
    configure(source, added_tokens_decoder=SETTINGS["added_tokens_decoder"] | added)
    assert rewrite(source).encode("<pad><box>", add_special_tokens=False) == [512, 513]


def test_absent_settings_are_sentencepieces_own(source):
    (source / "tokenizer_config.json").unlink()
    tokenizer = build_tokenizer(source / "tokenizer.model", {})
    reference = SentencePieceTokenizer(source / "tokenizer.model", legacy=True)
    assert tokenizer.encode("the chart</s>the chart").ids == reference.encode("the chart</s>the chart")
    assert tokenizer_files(source)["tokenizer_config.json"]["chat_template"] == CHAT_TEMPLATE


@pytest.mark.parametrize(("token", "text"), [("<s>", "<s>"), ({"content": "</s>", "lstrip": False}, "</s>")])
def test_special_tokens_are_written_bare_or_as_objects(token, text):
    assert token_text(token) == text


def test_a_tokenizer_json_is_copied_where_there_is_no_model(source):
    first = rewrite(source)
    second_source = source.with_name("destination")
    destination = source.with_name("copy")
    write_folder(destination, tokenizer_files(second_source), tensors=(), sizes={})
    assert (destination / "tokenizer.json").read_bytes() == (second_source / "tokenizer.json").read_bytes()
    second = load_tokenizer(destination, {})
    assert second.chat_template == first.chat_template
    assert encode_text(second, " the chart </s> Who?") == encode_text(first, " the chart </s> Who?")


def test_the_authors_template_goes_with_the_authors_tokenizer(source):
    """Whatever template a checkpoint brings along: their code does not read it."""
    configure(source, chat_template="{{ 'hello' }}")
    assert rewrite(source).chat_template == CHAT_TEMPLATE


PLAIN = "{% for message in messages %}{{ message.role }}: {{ message.content }}{% endfor %}"


@pytest.mark.parametrize(("own", "template"), [({"chat_template": PLAIN}, PLAIN), ({}, CHAT_TEMPLATE)])
def test_a_template_beside_a_tokenizer_json_is_kept(source, own, template):
    build_tokenizer(source / "tokenizer.model", SETTINGS).save(str(source / "tokenizer.json"))
    (source / "tokenizer.model").unlink()
    configure(source, **own)
    assert rewrite(source).chat_template == template


def test_the_model_wins_over_a_tokenizer_json(source):
    (source / "tokenizer.json").write_text("{}")
    assert rewrite(source).encode("the") == SentencePieceTokenizer(CHECKPOINT / "tokenizer.model").encode("the")


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"has no tokenizer; expected tokenizer\.model or tokenizer\.json"):
        tokenizer_files(tmp_path)


def test_a_damaged_model_is_refused(source):
    (source / "tokenizer.model").write_bytes(b"\x0f" * 100)
    with pytest.raises(InputError, match=r"tokenizer\.model is not a SentencePiece model"):
        tokenizer_files(source)


@pytest.mark.parametrize("spoil", ["unigram", "no byte fallback", "nfkc"])
def test_another_kind_of_sentencepiece_model_is_refused(source, spoil):
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((source / "tokenizer.model").read_bytes())
    if spoil == "unigram":
        proto.trainer_spec.model_type = proto.trainer_spec.UNIGRAM
    elif spoil == "nfkc":
        proto.normalizer_spec.name = "nmt_nfkc"
    else:
        proto.trainer_spec.byte_fallback = False
    (source / "tokenizer.model").write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match=r"byte-fallback BPE model without normalization.*tokenizer\.json"):
        tokenizer_files(source)
