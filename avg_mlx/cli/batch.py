"""`avg-mlx generate --batch`: a file of questions → a file of answers."""

import argparse
import json
import sys
import time
from pathlib import Path

from ..errors import AvgMlxError, InputError, problem
from .answering import model_name, open_model, sampling_of

STREAM = Path("-")


def answer_many(args: argparse.Namespace) -> None:
    """Answer what --output has no answer to yet; tell of each line that cannot be answered, and go on."""
    import mlx.core as mx

    from ..inference.batch import Request
    from ..inference.batch_file import FileOptions, answer_requests, read_requests, stream_requests
    from ..journal import Journal
    from .progress import Bar

    _check(args, mx.distributed.init().size())
    content, folder = _read(args.batch)
    looking = {
        name: getattr(args, name) for name in ("granularity", "max_visual_tokens", "token_cost", "system_prompt")
    }
    defaults = Request("", max_tokens=args.max_tokens, **looking)
    requests, problems = read_requests(str(args.batch), content, folder, defaults, strict_paths=args.strict_paths)
    for told in problems:
        print(told, file=sys.stderr)
    if args.output != STREAM:
        Journal(args.output).close()  # says before the model is loaded whether it can be written
    start, name = time.perf_counter(), model_name(args)
    model, tokenizer = open_model(args, name)
    options = FileOptions(
        model=name,
        revision=args.revision,
        sampling=sampling_of(args),
        batch_size=args.batch_size,
        prefill_step_size=args.prefill_step_size,
        max_pixels=args.max_pixels,
        load_seconds=time.perf_counter() - start,
    )
    with Bar("Answering", "question") as bar:
        if args.output != STREAM:
            problems += answer_requests(
                model, tokenizer, requests, args.output, options, tell=bar.say, progress=bar.show
            )
        else:
            for done, (filed, row) in enumerate(stream_requests(model, tokenizer, requests, options), 1):
                if isinstance(row, AvgMlxError):
                    problems.append(problem(filed.place, row))
                    bar.say(problems[-1])
                else:
                    print(json.dumps(row, ensure_ascii=False), flush=True)
                bar.show(done, len(requests))
    if problems:
        raise InputError(
            f"{len(problems)} lines of {args.batch} have no answer, all others do; fix them and run this again"
        )


def _check(args: argparse.Namespace, processes: int) -> None:
    if processes > 1:
        raise InputError("--batch is for one process; start it without mlx.launch")
    if args.output is None:
        raise InputError("--batch needs a file for its answers; name it with --output, or print them with --output -")
    if args.image:
        raise InputError("--image is for one question; the lines of --batch name their own images")
    if args.max_kv_size is not None or args.kv_bits is not None:
        raise InputError("--batch has a plain KV cache; leave --max-kv-size and --kv-bits out")
    files = [file for file in (args.batch, args.output) if file != STREAM and file.exists()]
    if len(files) == 2 and files[0].samefile(files[1]):
        raise InputError(f"--output is {args.output}, the file of questions itself; choose another")


def _read(batch: Path) -> tuple[bytes, Path]:
    """Return the questions, and the folder that their image paths are relative to."""
    from ..inputs.records import read_bytes

    return (sys.stdin.buffer.read(), Path()) if batch == STREAM else (read_bytes(batch), batch.parent)
