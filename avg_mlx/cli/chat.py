"""`avg-mlx chat`: a conversation in the terminal."""

import argparse
import contextlib
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AvgMlxError, InputError, printable
from ..files import MAX_DATA, read_json, write_json
from .answering import add_decoding_options, add_looking_options, add_model_options, decoding_of, model_name, open_model
from .parser import Parser, Terminated, one_line, run

if TYPE_CHECKING:
    from ..inference.answer import Answer
    from ..inference.chat import ChatSession
    from ..inputs.image import Crops

HELP = """\
/image PATH         look at an image with the next question
/granularity N      visual tokens per crop from now on; auto: the router chooses
/clear              forget the conversation and its images
/save FILE          write the conversation to a new JSON file
/load FILE          go on with a conversation that was saved
/help               this list
/exit               leave, as Ctrl-D does; Ctrl-C stops an answer or drops a line"""


def main(arguments: list[str] | None = None, prog: str = "avg-mlx chat") -> int:
    """Run the verb and return its exit status."""
    return run(build_parser(prog), chat, arguments)


def build_parser(prog: str) -> Parser:
    """The options of the verb."""
    parser = Parser(prog=prog, description="Talk with AVG-LLaVA about images; /help lists the commands.")
    add_model_options(parser)
    parser.add_argument("--image", nargs="+", action="extend", default=[], help="path, URL or data URI to begin with")
    add_looking_options(parser)
    parser.add_argument("--quiet", action="store_true", help="print nothing but answers and errors")
    add_decoding_options(parser)
    return parser


def chat(args: argparse.Namespace) -> None:
    """Load the model, then answer line by line."""
    from ..inference.chat import ChatSession

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lines can be edited then
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    model, tokenizer = open_model(args, model_name(args))
    session = ChatSession(model, tokenizer, system_prompt=args.system_prompt, max_pixels=args.max_pixels)
    terminal = Terminal(session, args, decoding_of(args, tokenizer))
    for image in args.image:
        terminal.image(image)
    terminal.run()


class Terminal:
    """Reads questions and commands. Answers go to standard output, everything else to standard error."""

    def __init__(self, session: "ChatSession", args: argparse.Namespace, decoding: Any):
        self.session, self.quiet, self.decoding = session, args.quiet, decoding
        self.granularity, self.max_visual_tokens = args.granularity, args.max_visual_tokens
        self.token_cost = args.token_cost
        self.names: list[str] = []  # of the conversation's images
        self.next_images: list[Crops] = []  # of the next question
        self.next_names: list[str] = []
        self.commands = {
            "/image": self.image,
            "/granularity": self.set_granularity,
            "/clear": self.clear,
            "/save": self.save,
            "/load": self.load,
            "/help": lambda _: print(HELP, file=sys.stderr),
        }

    def run(self) -> None:
        """Answer until /exit or the end of the input."""
        interactive = sys.stdin.isatty()
        if interactive:
            self.note("Ask away; /help lists the commands.")
        while True:
            try:
                line = next_line(interactive)
                if line == "/exit":
                    return
                self.hear(line)
            except EOFError:
                if interactive:
                    print(file=sys.stderr)  # so that the shell's prompt has a line of its own
                return
            except KeyboardInterrupt as stop:
                if isinstance(stop, Terminated) or not interactive:
                    raise
                print(file=sys.stderr)
                self.note("[/exit or Ctrl-D leaves]")
            except BrokenPipeError:  # nobody reads the answers any more
                raise
            except (AvgMlxError, OSError) as error:
                print(one_line(error), file=sys.stderr)

    def note(self, text: str) -> None:
        """Say something that is not an answer."""
        if not self.quiet:
            print(text, file=sys.stderr)

    def hear(self, line: str) -> None:
        """Take a question, a command, or nothing."""
        try:
            line.encode()
        except UnicodeEncodeError:
            raise InputError("this is not UTF-8 text") from None
        if line.startswith("/"):
            name, _, rest = line.partition(" ")
            if name not in self.commands:
                raise InputError(f"there is no command {name}; /help lists them")
            self.commands[name](rest.strip())
        elif line:
            self.ask(line)

    def ask(self, question: str) -> None:
        """Stream the answer. Ctrl-C stops it, and the question then counts as not asked."""
        turns = len(self.session.messages)
        try:
            for segment in self.session.ask(
                question,
                self.next_images,
                granularity=self.granularity,
                max_visual_tokens=self.max_visual_tokens,
                token_cost=self.token_cost,
                **self.decoding,
            ):
                print(segment.text, end="", flush=True)
        except KeyboardInterrupt as stop:
            if isinstance(stop, Terminated):
                raise
            print(flush=True)
            if len(self.session.messages) == turns:
                self.note("[stopped: the question counts as not asked]")
        else:
            print(flush=True)
            assert segment.answer is not None
            self.note(routing_line(segment.answer))
        if len(self.session.messages) > turns:
            self.names += self.next_names
            self.next_images, self.next_names = [], []

    def image(self, path: str) -> None:
        """Read an image for the next question."""
        from ..inputs.image import make_crops
        from ..inputs.image_io import read_image

        if not path:
            raise InputError("which image? /image PATH")
        path = _unescaped(path)
        crops = make_crops(read_image(path, self.session.max_pixels), self.session.model.config)
        self.next_images.append(crops)
        self.next_names.append(path)
        height, width = crops.image_size
        self.note(f"[{path}: {width}×{height}, {len(crops)} crops; ask about it]")

    def set_granularity(self, given: str) -> None:
        """Force a granularity, or let the router choose again."""
        from ..inference.options import Looking

        granularity: Any = int(given) if given.isdecimal() else given
        Looking(granularity, self.max_visual_tokens, self.token_cost).check(self.session.model.config)
        self.granularity = granularity
        self.note(f"[granularity {granularity} from now on]")

    def clear(self, _: str) -> None:
        """Forget the conversation and the images of the next question."""
        self.session.clear()
        self.names, self.next_images, self.next_names = [], [], []
        self.note("[conversation cleared]")

    def save(self, name: str) -> None:
        """Write what `generate` takes: messages with a placeholder for every image, and the images' names."""
        file = _file(name)
        if not name or file.exists():
            raise InputError(f"{name} exists already; choose another name" if name else "where to? /save FILE")
        system = self.session.system_prompt
        messages = [] if system is None else [{"role": "system", "content": system}]
        write_json(file, {"messages": messages + self.session.messages, "images": self.names})
        self.note(f"[{len(self.session.messages) // 2} questions saved to {file}]")

    def load(self, name: str) -> None:
        """Read what `save` wrote; the conversation so far is forgotten."""
        file = _file(name)
        if not name or not file.is_file():
            raise InputError(
                f"there is no file {name}; give one that /save wrote" if name else "which file? /load FILE"
            )
        saved = read_json(file, "give a file that /save wrote", limit=MAX_DATA)
        messages, images = saved.get("messages"), saved.get("images")
        if (
            not isinstance(messages, list)
            or not isinstance(images, list)
            or not all(isinstance(image, str) for image in images)
        ):
            raise InputError(f"{file} is not a conversation that /save wrote: expected messages and images")
        self.session.restore(messages, images)
        self.names, self.next_images, self.next_names = images, [], []
        self.note(f"[{len(self.session.messages) // 2} questions and {len(images)} images loaded from {file}]")


def next_line(interactive: bool) -> str:
    """The next line that is typed. Its prompt goes to standard error where answers are written to a file."""
    seen = sys.stdout.isatty()
    if interactive and not seen:
        print("> ", end="", file=sys.stderr, flush=True)
    return input("> " if interactive and seen else "").strip()


def _file(name: str) -> Path:
    """The file that a command names."""
    if "\0" in name:
        raise InputError(f"{printable(name)} cannot be a file; give another name")
    try:
        return Path(_unescaped(name)).expanduser()
    except RuntimeError as error:  # a ~ without a home
        raise InputError(f"{printable(name)} cannot be a file ({error}); give another name") from None


def _unescaped(path: str) -> str:
    """Read a path as it stands, or else as a shell would: terminals quote what is dropped on them."""
    with contextlib.suppress(ValueError, OSError, RuntimeError):
        words = shlex.split(path)
        if len(words) == 1 and not Path(path).expanduser().exists():
            return words[0]
    return path


def routing_line(answer: "Answer") -> str:
    """Say how closely each image was looked at, what was reused, and how long it took to begin."""
    parts = [
        f"granularity {view.granularity} ({view.source}): {view.visual_tokens} of {view.visual_tokens_finest} tokens"
        for view in answer.views
    ]
    parts.append(f"{answer.counters.reused} of {answer.prompt_tokens} positions reused")
    parts.append(f"first token after {answer.timings.time_to_first_token:.2f} s")
    return f"[{'; '.join(parts)}]"
