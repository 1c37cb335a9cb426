"""One append-only file: cut-off lines, settings, and a lock that dies with its process."""

import errno
import os
import subprocess
import sys

import pytest
from faults import fill_disk

from avg_mlx import AvgMlxError, InputError
from avg_mlx import journal as journal_module
from avg_mlx.journal import Journal


def test_rows_come_back(tmp_path):
    file = tmp_path / "new folder" / "rows.jsonl"
    with Journal(file) as journal:
        assert (journal.rows, journal.resumed) == ([], False)
        journal.append({"n": 1}, {"text": "größer"})
    with Journal(file) as journal:
        assert (journal.rows, journal.resumed) == ([{"n": 1}, {"text": "größer"}], True)
        journal.append({"n": 3})
    assert file.read_text() == '{"n": 1}\n{"text": "größer"}\n{"n": 3}\n'


def test_half_a_character_is_escaped(tmp_path):
    with Journal(tmp_path / "rows.jsonl") as journal:
        journal.append({"text": "\ud83d"})
    with Journal(tmp_path / "rows.jsonl") as journal:
        assert journal.rows == [{"text": "\ud83d"}]


@pytest.mark.parametrize("cut", ["", "{", '{"n": 2', '{"n": 2}', '"\\ud8', b"\xff\xfe"])
def test_a_line_that_was_cut_off_is_dropped(tmp_path, cut):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"n": 1}\n' + (cut if isinstance(cut, bytes) else cut.encode()))
    with Journal(file) as journal:
        assert journal.rows == [{"n": 1}]
        assert file.read_bytes().startswith(b'{"n": 1}\n' + (cut if isinstance(cut, bytes) else cut.encode()))
        journal.append({"n": 2})
    assert file.read_text() == '{"n": 1}\n{"n": 2}\n'


@pytest.mark.parametrize("line", ["nonsense", "[1]", "7", "\xff", "[" * 5000, '{"n": ' + "9" * 5000 + "}", ""])
def test_a_foreign_file_is_refused_and_left_as_it_is(tmp_path, line):
    file = tmp_path / "rows.jsonl"
    content = b'{"n": 1}\n' + line.encode("latin1") + b"\n{"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"rows\.jsonl, line 2: expected .*; choose another output"):
        Journal(file)
    assert file.read_bytes() == content


@pytest.mark.parametrize("name", ["pipe", "/dev/zero", "folder"])
def test_only_a_regular_file_is_written(tmp_path, name):
    """Without waiting for somebody to read the pipe."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with pytest.raises(AvgMlxError, match=f"{name}.*choose another output"):
        Journal(tmp_path / name)


def test_rows_can_be_cut_back(tmp_path):
    file = tmp_path / "rows.jsonl"
    with Journal(file) as journal:
        journal.append(*({"step": n, "text": "ä" * n} for n in range(5)))
        journal.keep(lambda row: row["step"] <= 2)
        assert [row["step"] for row in journal.rows] == [0, 1, 2]
        journal.append({"step": 3})
    with Journal(file) as journal:
        assert [row["step"] for row in journal.rows] == [0, 1, 2, 3]


def test_settings_must_stay(tmp_path):
    file = tmp_path / "rows.jsonl"
    Journal(file, {"seed": 1, "modes": ("a",)}).close()
    with Journal(file, {"seed": 1, "modes": ["a"]}) as journal:
        assert journal.resumed
    with pytest.raises(InputError, match=r"modes was .* and is .*; seed was 1 and is 2"):
        Journal(file, {"seed": 2, "modes": ["b"]})


def test_rows_without_settings_are_refused(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"n": 1}\n')
    with pytest.raises(InputError, match=r"no run\.json beside it"):
        Journal(file, {"seed": 1})
    assert not (tmp_path / "run.json").exists()


def test_a_second_writer_is_refused(tmp_path):
    file = tmp_path / "rows.jsonl"
    with Journal(file) as journal:
        journal.append({"n": 1})
        with pytest.raises(InputError, match="another process is writing"):
            Journal(file)
    Journal(file).close()
    assert file.read_text() == '{"n": 1}\n'


def test_a_killed_writer_leaves_no_lock(tmp_path):
    file = tmp_path / "rows.jsonl"
    code = (
        f"import os, time; from pathlib import Path; from avg_mlx.journal import Journal\n"
        f"journal = Journal(Path({str(file)!r})); journal.append({{'n': 1}}); print('open', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline() == b"open\n"
        with pytest.raises(InputError, match="another process is writing"):
            Journal(file)
        writer.kill()
    with Journal(file) as journal:
        assert journal.rows == [{"n": 1}]


def test_a_disk_that_refuses_is_named(tmp_path):
    with pytest.raises(AvgMlxError, match=r"cannot write .*; choose another output"):
        Journal(tmp_path)
    with Journal(tmp_path / "rows.jsonl") as journal:
        journal._stream.close()
        journal._stream = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
        with pytest.raises(AvgMlxError, match=r"No space left.*to resume"):
            journal.append({"n": 1})
        assert journal.rows == []


def test_a_disk_that_fills_within_a_row_keeps_whole_lines(tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    with Journal(file) as journal:
        journal.append({"n": 1})
        fill_disk(monkeypatch, 0)
        with pytest.raises(AvgMlxError, match=r"rows\.jsonl \(No space left.*make room"):
            journal.append({"n": 2}, {"n": 3})
    assert file.read_bytes() == b'{"n": 1}\n'


def test_a_disk_too_full_for_the_settings_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as context:
        context.setattr(journal_module, "write_json", refuse)
        with pytest.raises(AvgMlxError, match=r"cannot write .*run\.json \(No space left.*make room"):
            Journal(tmp_path / "rows.jsonl", {"seed": 1})
    Journal(tmp_path / "rows.jsonl", {"seed": 1}).close()
