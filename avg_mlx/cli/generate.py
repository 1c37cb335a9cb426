"""`avg-mlx generate`: an image and a question → a streamed answer."""

import argparse
import dataclasses
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from . import Parser, number, run, text

if TYPE_CHECKING:
    from ..generation import Answer
    from ..view import View


def main(arguments: list[str] | None = None, prog: str = "generate.py") -> int:
    return run(build_parser(prog), generate, arguments)


def build_parser(prog: str) -> Parser:
    parser = Parser(prog=prog, description="Ask AVG-LLaVA about an image; it decides how closely to look.")
    count, fraction = number(int, 1, 2**31 - 1), number(float, 0, 1)
    add = parser.add_argument
    add("--model", default="mlx_model", help="converted folder or Hub repository (default: %(default)s)")
    add("--revision", help="branch, tag or commit of the Hub repository")
    add("--adapter-path", help="adapters to put on top: a folder that training wrote")
    add("--prompt", "-p", type=text, required=True, help="the question; <image> marks a place; - reads standard input")
    add("--image", nargs="+", action="extend", default=[], help="path, http(s) URL, data URI, or - for standard input")
    add("--system-prompt", type=text, help="instead of the one the model was trained with")
    add("--granularity", type=granularity, default="auto", help="visual tokens per crop, or auto: the router picks")
    add("--max-visual-tokens", type=count, metavar="N", help="let the router pick within N visual tokens an image")
    add("--max-pixels", type=count, default=64_000_000, metavar="N", help="refuse larger images (default: 64 million)")
    add("--json", action="store_true", help="print one JSON object instead of the streamed text")
    add("--quiet", action="store_true", help="no summary on standard error")
    group = parser.add_argument_group("decoding", "as in mlx-lm")
    add = group.add_argument
    add("--max-tokens", "-m", type=count, default=256, metavar="N", help="new tokens at most (default: %(default)s)")
    add("--temp", "--temperature", type=number(float, 0), default=0.0, help="0 is greedy (default: %(default)s)")
    add("--top-p", type=number(float, 0, 1, exclusive=True), default=1.0)
    add("--top-k", type=number(int, 0), default=0)
    add("--min-p", type=fraction, default=0.0)
    add("--repetition-penalty", type=number(float, 0, exclusive=True), help="above 1 discourages repetition")
    add("--repetition-context-size", type=count, default=20, metavar="N", help="tokens it looks back (default: 20)")
    add("--seed", type=number(int, 0, 2**64 - 1), help="of the sampling")
    add("--extra-eos-token", type=text, nargs="+", default=[], help="more tokens that end the answer")
    add("--max-kv-size", type=number(int, 5), metavar="N", help="keep only the prompt's first and the last positions")
    add("--kv-bits", type=int, choices=(2, 3, 4, 5, 6, 8), help="quantize the KV cache")
    add("--kv-group-size", type=int, choices=(32, 64, 128), default=64)
    add("--quantized-kv-start", type=number(int, 0), default=5000, metavar="N", help="position it begins at")
    add("--prefill-step-size", type=count, default=2048, metavar="N", help="prompt positions processed at a time")
    return parser


def granularity(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is neither auto nor a number of visual tokens per crop") from None


def generate(args: argparse.Namespace) -> None:
    """Load, stream the answer to stdout, summarize on stderr."""
    prompt, images = _read_stdin(args.prompt, args.image)
    start = time.perf_counter()
    import mlx.core as mx
    from mlx_lm.sample_utils import make_logits_processors, make_sampler

    from .. import load, stream_generate

    model, tokenizer = load(args.model, args.revision, args.adapter_path)
    load_seconds = time.perf_counter() - start
    vocab_size = model.config.vocab_size
    if args.top_k >= vocab_size:
        raise InputError(f"--top-k is {args.top_k}, but this model has {vocab_size} tokens; give less, or 0 for all")
    for token in args.extra_eos_token:
        _add_eos_token(tokenizer, vocab_size, token)
    if args.seed is not None:
        mx.random.seed(args.seed)
    segments = stream_generate(
        model,
        tokenizer,
        prompt,
        images,
        granularity=args.granularity,
        max_visual_tokens=args.max_visual_tokens,
        system_prompt=args.system_prompt,
        max_pixels=args.max_pixels,
        max_tokens=args.max_tokens,
        max_kv_size=args.max_kv_size,
        sampler=make_sampler(args.temp, args.top_p, args.min_p, top_k=args.top_k),
        logits_processors=make_logits_processors(
            repetition_penalty=args.repetition_penalty, repetition_context_size=args.repetition_context_size
        ),
        kv_bits=args.kv_bits,
        kv_group_size=args.kv_group_size,
        quantized_kv_start=args.quantized_kv_start,
        prefill_step_size=args.prefill_step_size,
    )
    for segment in segments:
        if not args.json:
            print(segment.text, end="", flush=True)
    answer = segment.answer
    assert answer is not None
    print(json.dumps(report(answer, load_seconds), ensure_ascii=False) if args.json else "")
    if not args.quiet:
        sys.stdout.flush()
        print(summary(answer), file=sys.stderr)


def _read_stdin(prompt: str, images: list[str]) -> tuple[str, list[str | bytes]]:
    if [prompt, *images].count("-") > 1:
        raise InputError("standard input can be read once; give - for the prompt or for one image")
    if prompt == "-":
        try:
            prompt = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError:
            raise InputError("the prompt on standard input is not UTF-8 text; save it as UTF-8") from None
    return prompt, [sys.stdin.buffer.read() if image == "-" else image for image in images]


def _add_eos_token(tokenizer, vocab_size: int, token: str) -> None:
    if token not in tokenizer.get_vocab() and not (token.isdecimal() and int(token) < vocab_size):
        raise InputError(f"{token!r} is not a token of this model; --extra-eos-token takes tokens or their numbers")
    tokenizer.add_eos_token(token)


def report(answer: "Answer", load_seconds: float) -> dict[str, Any]:
    """The JSON object. What belongs to an image is a list when there are several, and null when there is none."""
    views, timings = answer.views, answer.timings

    def each(values: list) -> Any:
        return values if len(values) > 1 else values[0] if values else None

    return {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "granularity": each([v.granularity for v in views]),
        "granularity_source": max((v.source for v in views), key=("router", "forced", "budget").index, default=None),
        "router": each([_router_report(v) for v in views]),
        "crops": each([v.crops for v in views]),
        "crop_grid": each([v.crop_grid for v in views]),
        "visual_tokens": each([v.visual_tokens for v in views]),
        "visual_tokens_finest": sum(v.visual_tokens_finest for v in views),
        "prompt_tokens": answer.prompt_tokens,
        "prompt_token_ids": answer.prompt_token_ids,
        "timings": {
            "load": load_seconds,
            "preprocess": timings.preprocess,
            "vision": timings.vision,
            "router": timings.router,
            "prefill": timings.prefill,
            "time_to_first_token": timings.time_to_first_token,
            "prompt_tokens_per_second": timings.prompt_tokens_per_second,
            "generation_tokens_per_second": timings.generation_tokens_per_second,
        },
        "peak_memory_gb": answer.peak_memory_gb,
    }


def _router_report(view: "View") -> dict[str, Any] | None:
    return dataclasses.asdict(view.routing) if view.routing else None


def summary(answer: "Answer") -> str:
    """What was looked at and how, then mlx-lm's closing lines with the time to the first token."""
    t = answer.timings
    return "\n".join(
        [
            "=" * 10,
            *(_describe(view) for view in answer.views),
            f"Prompt: {answer.prompt_tokens} tokens, {t.prompt_tokens_per_second:.3f} tokens-per-sec",
            f"Generation: {len(answer.token_ids)} tokens, {t.generation_tokens_per_second:.3f} tokens-per-sec",
            f"Peak memory: {answer.peak_memory_gb:.3f} GB",
            f"Time to first token: {t.time_to_first_token:.3f} s = preprocess {t.preprocess:.3f} "
            f"+ vision {t.vision:.3f} + router {t.router:.3f} + prefill {t.prefill:.3f}",
        ]
    )


def _describe(view: "View") -> str:
    rows, columns = view.crop_grid
    lines = [f"Image: {view.crops} crops (the whole and {rows}×{columns})" if rows else "Image: 1 crop (the whole)"]
    if view.routing is None:
        lines.append(f"Granularity: {view.granularity}, forced")
    else:
        pairs = zip(view.routing.granularities, view.routing.probabilities, strict=True)
        odds = ", ".join(f"{g}: {probability:.1%}" for g, probability in pairs)
        lines.append(f"Granularity: {view.granularity}, by the {view.source} ({odds})")
    saved = 1 - view.visual_tokens / view.visual_tokens_finest
    lines.append(f"Visual tokens: {view.visual_tokens} of {view.visual_tokens_finest} ({saved:.1%} saved)")
    return "\n".join(lines)
