"""One reader for all JSON: within its limits of size and depth, and with no error but ours."""

import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avg_mlx import InputError
from avg_mlx.files import MAX_DEPTH, JsonError, parse_json, read_json

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


@given(VALUES, st.booleans(), st.sampled_from([None, 2]))
def test_json_comes_back_as_it_was(value, ascii, indent):
    assert parse_json(json.dumps(value, ensure_ascii=ascii, indent=indent).encode()) == value


@given(st.binary() | st.text('[]{}":,\\u0d89efEN -', max_size=30).map(str.encode))
def test_anything_else_is_our_error(content):
    try:
        value = parse_json(content)
    except JsonError:
        return
    assert json.loads(content) == value
    json.dumps(value, ensure_ascii=False).encode()


@given(st.text(["\\", "u", '"', "x", "\ud83d", "\ude00", "\ud7ff"], max_size=8))
def test_half_characters_are_found_whatever_stands_around_them(text):
    content = json.dumps([text]).encode()
    [text] = json.loads(content)  # where two halves have become one character
    whole = not any("\ud800" <= character <= "\udfff" for character in text)
    assert parse_json(content, own=True) == [text]
    if whole:
        assert parse_json(content) == [text]
    else:
        with pytest.raises(JsonError, match="half a character"):
            parse_json(content)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1,\n2,]", "line 2, column"),
        (b"[]]", "column 3"),
        (b"\xff", "not UTF-8 text"),
        ("[1]".encode("utf-16"), "not UTF-8 text"),
        (b'["\xed\xa0\x80"]', "not UTF-8 text"),  # half a character, as UTF-8 would write it
        (b"[NaN]", "NaN"),
        (b"[-Infinity]", "-Infinity"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' twice"),
        (b'{"%s": 1, "%s": 2}' % (b"x" * 10**6, b"x" * 10**6), "the key 'xxx"),
        (b"{" + b"".join(b'"%d": 1, ' % n for n in range(10**5)) + b'"99999": 1}', "the key '99999' twice"),
        (b"-" + b"9" * 400, "a number of 401 digits"),
        (b"9" * 5000, "a number of 5000 digits"),
        (b"[" * 10**6, "more than 64 levels"),
        (b'{"a":' * 10**6, "more than 64 levels"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "more than 64 levels"),
        (b"[[], " * MAX_DEPTH + b'{"a": {}}' + b"]" * MAX_DEPTH, "more than 64 levels"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_not_json_is_told(content, told):
    with pytest.raises(JsonError) as error:
        parse_json(content)
    assert told in str(error.value)
    assert str(error.value).startswith("not ")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("content", [b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, b'["' + b"[{" * 10**5 + b'"]', b"[[], {}]"])
def test_brackets_within_the_limit_are_fine(content):
    assert parse_json(content) == json.loads(content)


def test_what_was_written_here_may_hold_nan():
    assert math.isnan(parse_json(b"NaN", own=True))


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "sparse", "loop", "unreadable"])
def test_only_regular_files_of_the_right_size_are_read(kind, tmp_path, monkeypatch):
    file = tmp_path / "config.json"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "folder":
        file.mkdir()
    elif kind == "sparse":
        with file.open("wb") as stream:
            stream.truncate(10 << 30)
    elif kind == "loop":
        file.symlink_to(file)
    else:
        file.write_text("{}")
        monkeypatch.setattr("os.open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(InputError, match=r"config\.json.*; download it again$"):
        read_json(file)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="there is no /proc")
def test_a_file_that_says_it_is_empty_is_bounded_too():
    with pytest.raises(InputError, match="above the limit"):
        read_json(Path("/proc/self/maps"), limit=10)
