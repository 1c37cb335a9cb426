"""`avg-mlx serve`: the model for other programs, over HTTP in OpenAI's words."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from .answering import (
    add_looking_options,
    add_model_options,
    add_sampling_options,
    model_name,
    open_model,
    sampling_of,
)
from .parser import Parser, number, run, text

if TYPE_CHECKING:
    from ..serving.asking import Defaults
    from ..serving.jobs import EngineOptions
    from ..serving.service import Options

KEY = "AVG_MLX_API_KEY"
MAX_TOKENS = 512
MAX_PIXELS = 50_000_000
REMEDY = "pip install 'avg-mlx[serve]'"


def main(arguments: list[str] | None = None, prog: str = "avg-mlx serve") -> int:
    """Run the verb and return its exit status."""
    return run(build_parser(prog), serve, arguments)


def build_parser(prog: str) -> Parser:
    """The options of the verb."""
    parser = Parser(prog=prog, description="Serve a model over HTTP, in OpenAI's words (docs/serving.md).")
    add = parser.add_argument
    add_model_options(parser)
    add("--host", default="127.0.0.1", help="address to listen at; others than this machine's own need a key")
    add("--port", type=number(int, 0, 65535), default=8080, help="0 takes a free one (default: %(default)s)")
    add("--name", type=text, help="what requests call the model (default: the folder's or the repository's name)")
    add("--quiet", action="store_true", help="print no line for each request")
    _add_safety_options(parser)
    _add_engine_options(parser)
    add_looking_options(parser)
    add_sampling_options(parser)
    parser.set_defaults(max_tokens=MAX_TOKENS, max_pixels=MAX_PIXELS)
    return parser


def _add_safety_options(parser: Parser) -> None:
    add = parser.add_argument_group("who may ask, and for what").add_argument
    add("--api-key", type=text, metavar="KEY", help=f"requests need it (default: the variable {KEY}, or none)")
    add("--allow-hosts", nargs="+", default=[], metavar="NAME", help="further names that this server is called by")
    add("--allow-origins", nargs="+", default=[], metavar="ORIGIN", help="web pages that may ask (CORS); * for all")
    urls = "fetch images from the public internet, or from these hosts of it only"
    add("--allow-image-urls", nargs="*", metavar="HOST", help=urls)
    add("--media-path", type=Path, metavar="FOLDER", help="requests may name images in it, as file:///…")


def _add_engine_options(parser: Parser) -> None:
    add = parser.add_argument_group("how much at a time").add_argument
    count = number(int, 1, 2**31 - 1)
    add("--slots", type=count, default=8, metavar="N", help="answers that run together (default: %(default)s)")
    add("--queue", type=count, default=64, metavar="N", help="requests that wait for one (default: %(default)s)")
    room = "memory for the KV of running answers (default: half of what the weights leave)"
    add("--kv-gb", type=number(float, 0, exclusive=True), metavar="GB", help=room)
    load = "added to --token-cost while more requests wait than there are slots (default: 0)"
    add("--token-cost-under-load", type=number(float, 0), default=0.0, metavar="COST", help=load)
    add("--prefill-step-size", type=count, default=512, metavar="N", help="prompt positions at a time (default: 512)")
    grace = "time that running answers have to end when the server is asked to (default: %(default)s)"
    add("--grace", type=number(float, 0), default=30.0, metavar="SECONDS", help=grace)


def serve(args: argparse.Namespace) -> None:
    """Load the model, and serve it until a signal asks to stop."""
    try:
        from ..serving.server import address_of, bind
        from ..serving.server import serve as serve_until_signal
        from ..serving.service import Service
    except ImportError as error:
        raise InputError(f"serving needs {error.name}, which is not installed; {REMEDY}") from None
    from ..serving.engine.thread import Engine

    options = server_options(args)
    taken = bind(args.host, args.port)
    model = model_name(args)
    print(f"Loading {model} …", file=sys.stderr)
    engine = Engine(lambda: open_model(args, model), engine_options(args))

    def ready() -> None:
        print(f"Serving {options.name} at {address_of(taken)}; Ctrl-C stops it.", file=sys.stderr, flush=True)

    try:
        engine.start()
        options.defaults.looking.check(engine.config)
        serve_until_signal(Service(engine, options), taken, args.grace, ready)
    finally:
        engine.stop(0)
    print("Stopped.", file=sys.stderr)


def server_options(args: argparse.Namespace) -> "Options":
    """What the HTTP side is told. Raises InputError for options that would let strangers in."""
    import logging

    from ..serving.security import is_loopback, own_names
    from ..serving.service import Options

    key = (args.api_key or os.environ.get(KEY) or "").strip() or None
    if key and not (key.isascii() and key.isprintable()):
        raise InputError("the API key has characters that no header can carry; choose one of ASCII letters and digits")
    if key is None and not is_loopback(args.host):
        raise InputError(
            f"--host {args.host} can be reached from other machines; set an --api-key, or the variable {KEY}"
        )
    if args.media_path is not None and not args.media_path.is_dir():
        raise InputError(f"--media-path {args.media_path} is not a folder; name one that holds images")
    if args.quiet:
        logging.getLogger("avg_mlx.access").disabled = True
    return Options(
        name=args.name or _served_name(args.model),
        defaults=_defaults(args),
        key=key,
        names=own_names() | {args.host.lower(), *map(str.lower, args.allow_hosts)},
        origins=tuple(args.allow_origins),
        media_path=args.media_path,
        url_hosts=None if args.allow_image_urls is None else tuple(args.allow_image_urls),
        most=2 * (args.slots + args.queue),
    )


def engine_options(args: argparse.Namespace) -> "EngineOptions":
    """What the engine is told."""
    from ..serving.jobs import EngineOptions

    return EngineOptions(
        slots=args.slots,
        queue=args.queue,
        kv_bytes=None if args.kv_gb is None else int(args.kv_gb * 1e9),
        prefill_step_size=args.prefill_step_size,
        token_cost_under_load=args.token_cost_under_load,
    )


def _defaults(args: argparse.Namespace) -> "Defaults":
    from ..inference.options import Looking, pick
    from ..serving.asking import Defaults

    return Defaults(pick(Looking, vars(args)), args.max_tokens, sampling_of(args))


def _served_name(model: str | None) -> str:
    """A repository's name, and of a folder its last part only: where it lies is nobody's business."""
    from .answering import CONVERTED

    if model is None:
        return CONVERTED.name if CONVERTED.exists() else "demo"
    return Path(model).resolve().name if Path(model).exists() else model
