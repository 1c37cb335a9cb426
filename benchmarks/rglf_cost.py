"""What RGLF's epochs cost when feedback is kept, against a plain loop that reruns the language model: a Markdown table.

    python benchmarks/rglf_cost.py

Trains the router of the golden checkpoint, restricted to its three coarser granularities (the whole list takes many
times longer on a CPU), on a dozen samples: two questions about each golden image, one optimizer step an epoch. All rows
are measured in one run, on the clock and in processor time, which other work on the machine disturbs less.

The plain loop computes the losses anew in every epoch: each sample passes the language model once for every
granularity, with the logits of all positions. It is granted one pass through the vision tower a sample, which feedback
and router share.
"""

import itertools
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from avg_mlx import convert, load
from avg_mlx.model.avg_llava import Model
from avg_mlx.training import rglf
from avg_mlx.training.data import Sample, read_samples
from avg_mlx.training.forward import answer_positions, instruction_embeddings, load_crops, seen_sample
from avg_mlx.training.losses import rglf_loss, token_losses
from avg_mlx.training.options import RouterOptions
from avg_mlx.training.stages import train_router

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
GRANULARITIES = (36, 72, 144)
QUESTIONS = (("What is this?", "a drawing"), ("Is there a dog?", "There is no dog here."))
PREFILL_TFLOP = {36: 3.4, 72: 5.9, 144: 10.7, 288: 20.8, 576: 41.0}  # of the released 7B
TOWER_TFLOP, ROUTER_TFLOP = 2.0, 1.35
EPOCHS = 4
PLAIN_EPOCHS = 3


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        write_stage3(home / "checkpoint")
        convert(home / "checkpoint", home / "model")
        data = write_data(home / "data.json")
        rows = []
        first, later = router_epochs(home, data, "recomputed", None)
        rows += [("first epoch: feedback, features, router", [first]), ("a later epoch: features, router", later)]
        first, later = router_epochs(home, data, "cached", home / "features")
        rows += [
            ("first epoch with `--feature-cache`", [first]),
            ("a later epoch with `--feature-cache`: router", later),
        ]
        model, tokenizer = load(home / "model")
        samples = read_samples(data, GOLDEN, tokenizer, model.config)
        plain = plain_epochs(model, samples)
    reference = median(plain)
    print("| | epochs | seconds, median | of a plain epoch | processor seconds, median | of a plain epoch |")
    print("|---|---|---|---|---|---|")
    for label, epochs in [*rows, ("an epoch of the plain loop", plain)]:
        clock, processor = median(epochs)
        print(
            f"| {label} | {len(epochs)} | {clock:.1f} | {clock / reference[0]:.1%} "
            f"| {processor:.1f} | {processor / reference[1]:.1%} |"
        )
    print(f"\n{counted_table()}")


def counted_table() -> str:
    """The released 7B's operations, from the reference's figures for one 672×672 image with 60 text tokens."""
    language_model, router = sum(PREFILL_TFLOP.values()), 3 * ROUTER_TFLOP  # the router's: forward and backward
    plain = TOWER_TFLOP + language_model + router
    counts = {
        "an epoch of the plain loop": plain,
        "first epoch without a cache, at most (nothing shared between granularities)": plain + TOWER_TFLOP,
        "first epoch with `--feature-cache`, at most": plain,
        "a later epoch": TOWER_TFLOP + router,
        "a later epoch with `--feature-cache`": router,
    }
    rows = [f"| {label} | {count:.1f} | {count / plain:.1%} |" for label, count in counts.items()]
    return "\n".join(["| | TFLOP a sample | of a plain epoch |", "|---|---|---|", *rows])


Seconds = tuple[float, float]  # on the clock, of the processors


def now() -> Seconds:
    return time.perf_counter(), time.process_time()


def between(start: Seconds, end: Seconds) -> Seconds:
    return end[0] - start[0], end[1] - start[1]


def median(epochs: list[Seconds]) -> Seconds:
    return statistics.median(clock for clock, _ in epochs), statistics.median(processor for _, processor in epochs)


def write_stage3(folder: Path) -> None:
    """The golden checkpoint before its router was trained, with the coarser granularities only."""
    shutil.copytree(GOLDEN / "checkpoint", folder)
    for file in folder.glob("*.safetensors"):
        tensors = mx.load(str(file))
        assert isinstance(tensors, dict)
        kept = {name: array for name, array in tensors.items() if not name.startswith("model.router.")}
        mx.eval(kept)
        mx.save_safetensors(str(file), kept)
    (folder / "model.safetensors.index.json").unlink()
    keys = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(keys | {"vis_token_granularity": GRANULARITIES}))


def write_data(file: Path) -> Path:
    def record(image: Path, question: str, answer: str) -> dict[str, object]:
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        return {"image": image.name, "conversations": turns}

    images = sorted(GOLDEN.glob("image_*.png"))
    file.write_text(json.dumps([record(image, *pair) for image in images for pair in QUESTIONS]))
    return file


def router_epochs(home: Path, data: Path, name: str, feature_cache: Path | None) -> tuple[Seconds, list[Seconds]]:
    """Seconds of the first epoch, from the first sample's feedback on, and of each later one."""
    times: list[Seconds] = []

    def feedback_report(done: int, total: int) -> None:
        if done == 0:
            times.append(now())

    options = RouterOptions(
        model=str(home / "model"),
        data=data,
        image_folder=GOLDEN,
        adapter_path=home / name,
        feature_cache=feature_cache,
        epochs=EPOCHS,
        batch_size=6 * len(QUESTIONS),
    )
    train_router(options, lambda record, steps: times.append(now()), feedback_report)
    first, *later = [between(*pair) for pair in itertools.pairwise(times)]
    return first, later


def plain_epochs(model: Model, samples: list[Sample]) -> list[Seconds]:
    """Seconds of each epoch in which nothing is kept."""
    rglf.prepare(model, fresh=True)
    optimizer = optim.AdamW(1e-3, weight_decay=0.0)
    seconds = []
    for _ in range(PLAIN_EPOCHS):
        start = now()
        plain_epoch(model, samples, optimizer)
        seconds.append(between(start, now()))
    return seconds


def plain_epoch(model: Model, samples: list[Sample], optimizer: optim.Optimizer) -> None:
    seen, feedback = [], []
    for sample in samples:
        crops = load_crops(model, sample)
        features = [model.encode(c) for c in crops]
        mx.eval(features)
        prompt, losses = seen_sample(model, sample, features, crops), []
        for granularity in GRANULARITIES:
            logits = model(prompt.embeddings(model, [granularity] * len(crops))[None])[0]
            mx.eval(logits)
            positions, labels = answer_positions(model, sample, granularity)
            losses.append(token_losses(logits[mx.array(positions)], mx.array(labels)).mean().item())
        feedback.append(losses)
        seen.append((features[0], instruction_embeddings(model, sample)))

    def loss() -> mx.array:
        logits = mx.stack([model.route(features, text) for features, text in seen])
        return rglf_loss(logits, mx.array(feedback)).mean()

    _, gradients = nn.value_and_grad(model, loss)()
    optimizer.update(model, gradients)
    mx.eval(model.trainable_parameters(), optimizer.state)


if __name__ == "__main__":
    main()
