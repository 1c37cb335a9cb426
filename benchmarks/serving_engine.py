"""What the server's engine makes of a machine: Markdown tables.

    python benchmarks/serving_engine.py clients    # one client's tokens per second, and eight clients' together
    python benchmarks/serving_engine.py pause      # how long an answer stands still while an image arrives
    python benchmarks/serving_engine.py sizing     # KV of a position, and how many answers fit into memory

All run on random weights, which --random-weights and --dtype choose. On Linux the CPU backend needs OpenBLAS to make
anything of a batch: LD_PRELOAD=libopenblas.so.0 before the command.
"""

import argparse
import itertools
import statistics
import threading
import time
from collections.abc import Iterator

import mlx.core as mx

from avg_mlx.bench.measure import prompt_of, synthetic_image
from avg_mlx.bench.presets import preset_keys, random_model, word_tokenizer
from avg_mlx.config import Config
from avg_mlx.inference.options import Looking
from avg_mlx.inference.steps import read_crops
from avg_mlx.inputs.tokenizer import Tokenizer
from avg_mlx.markdown import table
from avg_mlx.model.avg_llava import Model
from avg_mlx.serving.engine.sizing import Sizing
from avg_mlx.serving.engine.thread import Engine
from avg_mlx.serving.jobs import Done, EngineOptions, Event, Failed, Job, Piece

CLIENTS, TOKENS = 8, 64
SIZES = {"one crop": (336, 336), "three crops": (1000, 300), "five crops": (800, 600)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the server's engine.")
    parser.add_argument("what", choices=("clients", "pause", "sizing"))
    parser.add_argument("--random-weights", choices=("tiny", "300m", "1b", "7b"), default="300m")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(f"{mx.default_device()}, {args.random_weights}, {args.dtype}\n")
    if args.what == "sizing":
        model = Model(Config.from_dict(preset_keys(args.random_weights)))  # of which nothing is ever computed
        model.set_dtype(getattr(mx, args.dtype))
        print(sizes(Sizing.of(model)))
        return
    model = random_model(args.random_weights, args.dtype)
    tokenizer = word_tokenizer(model.config.vocab_size)
    tokenizer.eos_token_ids = ()
    engine = Engine(lambda: (model, tokenizer), EngineOptions(slots=CLIENTS))
    engine.start()
    try:
        print((compare_clients if args.what == "clients" else measure_pause)(engine, model, tokenizer, args.repeats))
    finally:
        engine.stop(0)


class Client:
    """Asks, and notes when each piece of the answer came."""

    def __init__(self, engine: Engine, job: Job):
        self.times: list[float] = []
        self.done: Done | None = None
        self._ended = threading.Event()
        self.ticket = engine.submit(job, self._told)

    def _told(self, event: Event) -> None:
        if isinstance(event, Piece):
            self.times.append(time.perf_counter())
        elif isinstance(event, Done | Failed):
            self.done = event if isinstance(event, Done) else None
            self._ended.set()

    def wait(self) -> None:
        """Wait for the end of the answer."""
        self._ended.wait()
        assert self.done is not None, "the engine failed"

    def wait_for(self, pieces: int) -> None:
        """Wait for so many pieces of it."""
        while len(self.times) < pieces and not self._ended.is_set():
            time.sleep(0.001)


def question(tokenizer: Tokenizer, n: int, max_tokens: int) -> Job:
    """A question without an image; each `n` asks another, so that nothing is reused."""
    messages = ({"role": "user", "content": f"w{3 + n % 400} {prompt_of(tokenizer, 60)}"},)
    return Job(messages, max_tokens=max_tokens)


def compare_clients(engine: Engine, model: Model, tokenizer: Tokenizer, repeats: int) -> str:
    """Let one client and eight clients take turns. Each asks for TOKENS tokens, and only decoding is timed."""
    rates: dict[int, list[float]] = {1: [], CLIENTS: []}
    fresh = itertools.count()
    for n in range(1 + repeats):
        for clients in rates:
            asked = [Client(engine, question(tokenizer, next(fresh), TOKENS)) for _ in range(clients)]
            for client in asked:
                client.wait()
            begin, end = max(client.times[0] for client in asked), min(client.times[-1] for client in asked)
            tokens = sum(begin < at <= end for client in asked for at in client.times)
            if n:
                rates[clients].append(tokens / (end - begin))
    rows = [[clients, *spread(values, 1)] for clients, values in rates.items()]
    ratio = statistics.median(rates[CLIENTS]) / statistics.median(rates[1])
    return table(["clients", "tokens per second together, median", "least to most"], rows) + f"\n\n{ratio:.2f} times"


def measure_pause(engine: Engine, model: Model, tokenizer: Tokenizer, repeats: int) -> str:
    """Let an image arrive while an answer runs, at the finest granularity, and look for its longest pause."""
    rows, fresh = [], itertools.count()
    for name, size in SIZES.items():
        pauses, plain, steps = [], [], []
        for n in range(1 + repeats):
            client = Client(engine, question(tokenizer, next(fresh), 400))
            client.wait_for(20)
            [crops] = read_crops(synthetic_image(size[0] + n, size[1]), model.config)
            message = {"role": "user", "content": f"<image>\nw{3 + next(fresh)} w5?"}
            begun = time.perf_counter()
            other = Client(engine, Job((message,), (crops,), (Looking(granularity=576),), max_tokens=2))
            other.wait()
            ended = time.perf_counter()
            client.ticket.cancel()
            assert other.done is not None
            timings, prompt = other.done.answer.timings, other.done.answer.prompt_tokens
            stretches = -(-prompt // EngineOptions.prefill_step_size)
            if n:
                pauses.append(max(gaps(client.times, begun, ended)))
                plain.append(statistics.median(gaps(client.times, 0, begun)))
                steps.append(max(timings.vision, timings.prefill / stretches))
        rows.append([name, *spread(plain), *spread(steps), *spread(pauses)])
    header = [
        "arrives",
        "between tokens before, s",
        "",
        "vision pass or stretch of prefill, s",
        "",
        "longest pause, s",
        "",
    ]
    return table(header, rows)


def gaps(times: list[float], begun: float, ended: float) -> Iterator[float]:
    """The times between pieces, of which the second came within a stretch of time."""
    return (b - a for a, b in itertools.pairwise(times) if begun < b <= ended)


def sizes(sizing: Sizing) -> str:
    """How many answers fit, and what they take."""
    rows = [
        [positions, *(f"{sizing.kv_bytes(slots, positions) / 1e9:.2f}" for slots in (1, 4, 8))]
        for positions in (512, 1024, 2048, sizing.context_length)
    ]
    text = f"{sizing.per_position / 1e6:.3f} MB of KV for a position.\n\n"
    return text + table(["positions of prompt and answer", *(f"{n} answers, GB" for n in (1, 4, 8))], rows)


def spread(values: list[float], places: int = 3) -> tuple[str, str]:
    """The median, and the range."""
    return f"{statistics.median(values):.{places}f}", f"{min(values):.{places}f} to {max(values):.{places}f}"


if __name__ == "__main__":
    main()
