"""`avg-mlx chat`, its standard input a pipe."""

import contextlib
import io
import json
import os
import pty
import select
import signal
import sys
from pathlib import Path

import pytest
from conftest import IMAGES, RECORDS, write_samples

from avg_mlx import generate
from avg_mlx.cli.chat import main
from avg_mlx.inference.chat import ChatSession


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of noise images."""
    return write_samples(tmp_path_factory.mktemp("photos"), RECORDS).parent


@pytest.fixture
def chat(tiny_folder, photos, monkeypatch, capfd):
    """`chat(lines, *options)` types the lines in a folder of images: exit status, stdout, stderr's lines."""
    monkeypatch.chdir(photos)

    def run(lines: str | bytes, *options) -> tuple[int, str, list[str]]:
        typed = lines if isinstance(lines, bytes) else lines.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed)))
        status = main(["--model", str(tiny_folder), "-m", "3", *map(str, options)])
        out, err = capfd.readouterr()
        return status, out, err.splitlines()

    return run


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def expected(tiny, messages, images, **options) -> str:
    return generate(*tiny, messages, images, max_tokens=3, **options).text


def test_answers_come_on_stdout_and_a_routing_line_after_each_on_stderr(chat, tiny, photos):
    first = generate(*tiny, "What is it?", photos / "wide.png", max_tokens=3)
    conversation = [
        {"role": "user", "content": "<image>\nWhat is it?"},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "Where?"},
    ]
    second = generate(*tiny, conversation, photos / "wide.png", max_tokens=3)
    status, out, err = chat("/image wide.png\nWhat is it?\n\nWhere?\n")
    assert (status, out) == (0, f"{first.text}\n{second.text}\n")
    seen, *routing = err
    width, height = IMAGES["wide.png"]
    assert seen == f"[wide.png: {width}×{height}, 3 crops; ask about it]"
    for line, answer, reused in zip(routing, (first, second), (0, None), strict=True):
        [view] = answer.views
        assert line.startswith(
            f"[granularity {view.granularity} (router): {view.visual_tokens} of {view.visual_tokens_finest} tokens; "
        )
        assert reused is None or f"; {reused} of {answer.prompt_tokens} positions reused; first token after" in line


def test_an_image_may_be_given_to_begin_with(chat, tiny, photos):
    images = [photos / "wide.png", photos / "tall.png"]
    status, out, err = chat("Which?", "--image", *images, "--quiet")
    assert (status, out, err) == (0, expected(tiny, "Which?", images) + "\n", [])


def test_the_options_of_generate_are_heard(chat, tiny, photos):
    options = ("--system-prompt", "Be brief.", "--granularity", 4, "-m", 2, "--quiet")
    _, out, _ = chat("Why?", "--image", "wide.png", *options)
    answer = generate(*tiny, "Why?", photos / "wide.png", system_prompt="Be brief.", granularity=4, max_tokens=2)
    assert out == answer.text + "\n"


def test_granularity_is_forced_from_then_on(chat, tiny, photos):
    status, out, err = chat("/image wide.png\n/granularity 8\nWhy?\n/clear\n/image wide.png\n/granularity auto\nWhy?\n")
    texts = [expected(tiny, "Why?", photos / "wide.png", granularity=g) for g in (8, "auto")]
    assert (status, out) == (0, "".join(f"{text}\n" for text in texts))
    forced, routed = (line for line in err if "positions" in line)
    assert forced.startswith("[granularity 8 (forced): ")
    assert " (router): " in routed


def test_clear_forgets_text_and_images(chat, tiny):
    _, out, _ = chat("/image wide.png\nWhat is it?\n/image tall.png\n/clear\nWhy?\n", "--quiet")
    assert out.endswith("\n" + expected(tiny, "Why?", None) + "\n")


@pytest.mark.parametrize("typed", ["my photo.png", r"my\ photo.png", "'my photo.png'", '"my photo.png"'])
def test_a_path_may_have_spaces_however_the_terminal_writes_them(chat, photos, typed):
    (photos / "my photo.png").write_bytes((photos / "wide.png").read_bytes())
    assert chat(f"/image {typed}")[2] == ["[my photo.png: 100×50, 3 crops; ask about it]"]


def test_a_conversation_is_saved_as_generate_takes_it(chat, tiny, photos, tmp_path):
    file = tmp_path / "saved.json"
    _, out, err = chat(
        f"/image wide.png\nWhat is it?\n/image tall.png\nAnd this?\n/save {file}\n/image absent.png\nSo?\n",
        *("--system-prompt", "Be brief.", "--quiet"),
    )
    saved = json.loads(file.read_text())
    assert saved["images"] == ["wide.png", "tall.png"]
    assert [m["role"] for m in saved["messages"]] == ["system", *["user", "assistant"] * 2]
    messages = [*saved["messages"], {"role": "user", "content": "So?"}]
    assert out.endswith(expected(tiny, messages, saved["images"]) + "\n")
    assert len(err) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["saved.json"]


def test_an_existing_file_is_not_overwritten(chat, tmp_path):
    file = tmp_path / "saved.json"
    file.write_text("mine")
    _, _, err = chat(f"Why?\n/save {file}\n/save\n/save {tmp_path}/nowhere/saved.json\n", "--quiet")
    exists, missing, unwritable = err
    assert exists == f"{file} exists already; choose another name"
    assert missing == "where to? /save FILE"
    assert "No such file or directory" in unwritable
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("/imagine", "there is no command /imagine; /help lists them"),
        ("/", "there is no command /; /help lists them"),
        ("/image", "which image? /image PATH"),
        ("/image absent.png", "no image at absent.png; give a path, an http(s) URL, a data URI or -"),
        ("/image data.json", "data.json is not an image that can be read here"),
        ("/granularity", "granularity is ''; choose auto or one of this model's: 1, 2, 4, 8, 16"),
        ("/granularity 5", "granularity is 5; choose auto or one of this model's: 1, 2, 4, 8, 16"),
        ("/granularity fine", "granularity is 'fine'; choose auto or one of this model's: 1, 2, 4, 8, 16"),
        ("<image>?", "the prompt has 1 <image>, but 0 images were given; write one <image> for each image"),
        (b"\xff", "this is not UTF-8 text"),
        ("Why? " * 300, "but the model has 512"),
        ("/image ~nosuchuser/a.png", "cannot read ~nosuchuser/a.png"),
        ("/load ~nosuchuser/a.json", "cannot be a file"),
        ("/save a\0b", "cannot be a file"),
    ],
    ids=str,
)
def test_a_wrong_line_gets_one_line_and_the_chat_goes_on(chat, tiny, command, line):
    typed = command if isinstance(command, bytes) else command.encode()
    status, out, err = chat(typed + b"\nWhy?\n", "--quiet")
    assert (status, out) == (0, expected(tiny, "Why?", None) + "\n")
    [said] = err
    assert line in said


def test_help_lists_every_command(chat):
    status, out, err = chat("/help\n")
    assert (status, out) == (0, "")
    listed = [line.split()[0] for line in err]
    assert listed == ["/image", "/granularity", "/clear", "/save", "/load", "/help", "/exit"]


def test_exit_leaves(chat):
    assert chat("/exit\nWhy?\n") == (0, "", [])


@pytest.fixture
def stopped(monkeypatch):
    """`stopped(error)`: the first answer is stopped by it after its first token."""

    def patch(error: BaseException) -> None:
        ask, calls = ChatSession.ask, []

        def once(self, *args, **kwargs):
            calls.append(args)
            for segment in ask(self, *args, **kwargs):
                yield segment
                if len(calls) == 1:
                    raise error

        monkeypatch.setattr(ChatSession, "ask", once)

    return patch


def test_ctrl_c_stops_an_answer_and_its_question_counts_as_not_asked(chat, tiny, photos, stopped):
    stopped(KeyboardInterrupt())
    status, out, err = chat("/image wide.png\nWhat is it?\nWhy?\n")
    first, second = out.splitlines()
    assert (status, second) == (0, expected(tiny, "Why?", photos / "wide.png"))
    assert second != first
    assert err[1] == "[stopped: the question counts as not asked]"


class Terminal:
    """A chat at a real terminal."""

    def __init__(self, *command: str | Path):
        self.screen, self.seen = b"", 0
        self.child, self.fd = pty.fork()
        if self.child == 0:
            os.execv(sys.executable, [sys.executable, "-m", "avg_mlx", "chat", *map(str, command)])

    def expect(self, text: str, seconds: float = 120) -> bool:
        """Wait until a text appears after the one that was expected before; whether it did."""
        while (at := self.screen.find(text.encode(), self.seen)) < 0:
            if not select.select([self.fd], [], [], seconds)[0]:
                return False
            self.screen += os.read(self.fd, 1000)
        self.seen = at + len(text.encode())
        return True

    def press_ctrl_c(self, expected: str) -> None:
        """Press until the chat answers: Python misses a signal that arrives just before it waits for a key."""
        for _ in range(20):
            os.write(self.fd, b"\x03")
            if self.expect(expected, seconds=3):
                return
        raise AssertionError(self.screen)

    def type(self, keys: bytes) -> None:
        """Wait for the prompt, then type."""
        assert self.expect("> "), self.screen
        os.write(self.fd, keys)

    def close(self) -> int:
        """Read what is left once the process ends; its exit status."""
        with contextlib.suppress(OSError):  # the terminal closes with the process
            while select.select([self.fd], [], [], 120)[0]:
                self.screen += os.read(self.fd, 1000)
        os.kill(self.child, signal.SIGKILL)  # no harm to one that has ended
        return os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])


def test_ctrl_c_drops_a_half_typed_line_and_ctrl_d_leaves_a_clean_line(tiny_folder):
    terminal = Terminal("--model", tiny_folder)
    terminal.type(b"half a quest")
    assert terminal.expect("half a quest")
    terminal.press_ctrl_c("[/exit or Ctrl-D leaves]")
    terminal.type(b"/clear\n")
    assert terminal.expect("[conversation cleared]")
    terminal.type(b"\x04")
    assert terminal.close() == 0
    assert terminal.screen.endswith(b"\r\n")


def test_ctrl_c_ends_a_chat_that_reads_a_pipe(chat, monkeypatch):
    def press(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", press)
    assert chat("") == (130, "", ["", "avg-mlx chat: interrupted"])


def test_a_chat_ends_when_nobody_reads_its_answers(chat, monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

        def fileno(self):
            return 1

    monkeypatch.setattr(sys, "stdout", Gone())
    monkeypatch.setattr(os, "dup2", lambda *files: None)
    status, _, err = chat("Why?\nWhy?\n", "--quiet")
    assert (status, err) == (1, [])


def test_the_prompt_is_not_among_the_answers(chat, tiny, monkeypatch):
    class Typed(io.TextIOWrapper):
        def isatty(self):
            return True

    monkeypatch.setattr(io, "TextIOWrapper", Typed)
    status, out, err = chat("Why?\n", "--quiet")
    assert (status, out) == (0, expected(tiny, "Why?", None) + "\n")
    assert "".join(err).startswith("> ")


def test_silent_commands_confirm(chat, tmp_path):
    file = tmp_path / "saved.json"
    _, _, err = chat(f"/granularity 4\nWhy?\n/save {file}\n/clear\n/load {file}\n")
    granularity, _, saved, cleared, loaded = err
    assert granularity == "[granularity 4 from now on]"
    assert saved == f"[1 questions saved to {file}]"
    assert cleared == "[conversation cleared]"
    assert loaded == f"[1 questions and 0 images loaded from {file}]"


def test_a_saved_conversation_is_gone_on_with(chat, tiny, photos, tmp_path):
    file = tmp_path / "my conversation.json"
    options = ("--system-prompt", "Be brief.", "--quiet")
    _, whole, _ = chat("/image wide.png\nWhat is it?\nWhere?\n", *options)
    _, first, _ = chat(f"/image wide.png\nWhat is it?\n/save '{file}'\n", *options)
    _, second, err = chat(f"Hello\n/load {file}\nWhere?\n/save {tmp_path}/again.json\n", "--quiet")
    assert err == []
    assert whole == first + second.splitlines(keepends=True)[-1]
    assert json.loads((tmp_path / "again.json").read_text())["messages"][:3] == json.loads(file.read_text())["messages"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no file"),
        ("{", "give a file that /save wrote"),
        ("{}", "expected messages and images"),
        ({"messages": [], "images": []}, "the prompt is empty"),
        ({"messages": ["hi"], "images": []}, "message 1 is 'hi'; expected role"),
        ({"messages": [user("Why?")], "images": []}, "expected user and assistant in turn"),
        (
            {
                "messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "a"}],
                "images": [],
            },
            "1 <image>",
        ),
        (
            {
                "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}],
                "images": ["no.png"],
            },
            "no image at no.png",
        ),
    ],
    ids=range(8),
)
def test_what_cannot_be_loaded_leaves_the_conversation_as_it_was(chat, tiny, tmp_path, content, words):
    file = tmp_path / "saved.json"
    if content is not None:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    status, _, err = chat(f"Hello\n/load {file}\n/save {tmp_path}/kept.json\n", "--quiet")
    [said] = err
    assert (status, words in said) == (0, True), said
    assert len(json.loads((tmp_path / "kept.json").read_text())["messages"]) == 2


def test_an_image_path_may_begin_at_home(chat, photos, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my photo.png").write_bytes((photos / "wide.png").read_bytes())
    _, _, err = chat("/image ~/my photo.png\n/image ~/my\\ photo.png\n/image '~/my photo.png'\n")
    assert [line.rpartition(": ")[2] for line in err] == ["100×50, 3 crops; ask about it]"] * 3


def test_max_tokens_of_minus_one_is_taken(chat):
    status, _, err = chat("Why?\n", "-m", -1, "--quiet")
    assert (status, err) == (0, [])


def test_sigterm_ends_the_chat_and_not_only_the_answer(chat, stopped):
    from avg_mlx.cli.parser import Terminated as _Terminated

    stopped(_Terminated())
    status, _, err = chat("Why?\nWhy?\n")
    assert (status, err[-1]) == (143, "avg-mlx chat: interrupted")


def test_what_generate_refuses_is_refused(refused, tiny_folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    line = refused(main, "--model", tiny_folder, "--extra-eos-token", "nonsense")
    assert line.startswith("avg-mlx chat: 'nonsense' is not a token of this model")
    assert "no folder nowhere" in refused(main, "--model", "nowhere")
    assert "no image at absent.png" in refused(main, "--model", tiny_folder, "--image", "absent.png")
