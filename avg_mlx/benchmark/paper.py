"""The paper's eleven benchmarks as lmms-eval has them, and what the paper reports of them (arXiv 2410.02745)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A score of a benchmark."""

    name: str  # lmms-eval's
    label: str = ""  # set apart from the benchmark's other scores
    scale: float = 100.0  # from lmms-eval's number to the paper's
    highest: float = 100.0  # that the score can be, in the paper's scale
    llava_next: float | None = None  # the paper's figures; None: it has none
    avg_llava: float | None = None


@dataclass(frozen=True)
class Benchmark:
    """A benchmark, which is a task of lmms-eval; the first of its metrics is the one that tables and pictures show."""

    title: str
    task: str
    metrics: tuple[Metric, ...]
    reduction: float | None = None  # the share of visual tokens that the paper's router saves; None: not reported
    speed_up: float | None = None
    together: int = 1  # neighbouring questions that are scored together


PAPER = (
    Benchmark("GQA", "gqa", (Metric("exact_match", llava_next=64.2, avg_llava=63.0),), 0.800, 1.14),
    Benchmark("ScienceQA", "scienceqa_img", (Metric("exact_match", llava_next=70.1, avg_llava=71.1),), 0.549, 1.41),
    Benchmark("VizWiz", "vizwiz_vqa_val", (Metric("exact_match", llava_next=57.6, avg_llava=59.8),), 0.264, 1.77),
    Benchmark("TextVQA", "textvqa_val", (Metric("exact_match", llava_next=64.9, avg_llava=67.1),)),
    Benchmark("ChartQA", "chartqa", (Metric("relaxed_overall", llava_next=54.8, avg_llava=66.3),), 0.009, 0.97),
    Benchmark("DocVQA", "docvqa_val", (Metric("anls", llava_next=74.4, avg_llava=74.6),)),
    Benchmark("AI2D", "ai2d", (Metric("exact_match", llava_next=66.6, avg_llava=67.3),), 0.853, 2.53),
    Benchmark(
        "MME",
        "mme",
        (
            Metric("mme_perception_score", "perception", 1.0, 2000.0, llava_next=1519.0, avg_llava=1557.4),
            Metric("mme_cognition_score", "cognition", 1.0, 800.0),
        ),
        0.693,
        1.19,
        together=2,
    ),
    Benchmark(
        "MMBench", "mmbench_en_dev_static", (Metric("gpt_eval_score", "", 1.0, llava_next=67.4, avg_llava=69.9),)
    ),
    Benchmark(
        "POPE",
        "pope",
        (Metric("pope_f1_score", "F1", llava_next=86.5, avg_llava=87.4), Metric("pope_accuracy", "accuracy")),
    ),
    Benchmark("MMMU", "mmmu_val", (Metric("mmmu_acc", llava_next=35.8, avg_llava=37.4),), 0.300, 1.87),
)
BY_TASK = {benchmark.task: benchmark for benchmark in PAPER}


def benchmark_of(task: str) -> Benchmark:
    """What the paper says of a task; nothing, if it is not one of its eleven."""
    return BY_TASK.get(task) or Benchmark(task, task, ())
