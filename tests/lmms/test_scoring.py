"""lmms-eval's scores of answers of which some are right: the same as from its own evaluation, and with an interval."""

import argparse

import pytest

from avg_mlx.benchmark.paper import PAPER
from avg_mlx.benchmark.scoring import score
from avg_mlx.benchmark.tasks import Tasks

pytestmark = pytest.mark.slow

RIGHT = {
    "gqa": ["yes", "circle", "no", "5185"],
    "scienceqa_img": ["A", "B", "A", "B"],
    "vizwiz_vqa_val": ["yes", "circle", "no", "unanswerable"],
    "textvqa_val": ["yes", "circle", "no", "unanswerable"],
    "chartqa": ["yes", "circle", "no", "5185"],
    "docvqa_val": ["yes", "circle", "no", "51"],
    "ai2d": ["A. yes", "B", "A", "B"],
    "mme": ["Yes", "No", "Yes", "No"],
    "mmbench_en_dev_static": ["A", "A", "A"],
    "pope": ["Yes", "No", "Yes", "No"],
    "mmmu_val": ["B", "A", "3"],
}


@pytest.fixture(scope="module")
def known():
    return Tasks()


@pytest.mark.parametrize("benchmark", PAPER, ids=lambda benchmark: benchmark.title)
def test_scores(benchmark, known, data_root, tmp_path):
    from lmms_eval.api.model import lmms
    from lmms_eval.evaluator import simple_evaluate

    answers = dict(enumerate(RIGHT[benchmark.task]))
    wrong = {"pope": (0, "No")}.get(benchmark.task, (len(answers) - 1, "nothing"))
    answers |= dict([wrong])

    class Told(lmms):
        is_simple = False

        def generate_until(self, requests):
            return [answers[request.doc_id] for request in requests]

        loglikelihood = generate_until_multi_round = generate_until

    task = known.load(known.source(benchmark.task, data_root), data_root)
    found = score(task, answers, None, tmp_path)
    options = argparse.Namespace(process_with_media=False, output_path=str(tmp_path))
    own = simple_evaluate(model=Told(), tasks=[task], cli_args=options, batch_size=1, bootstrap_iters=0)
    for metric in benchmark.metrics:
        (theirs,) = (
            value for key, value in own["results"][benchmark.task].items() if key.startswith(f"{metric.name},")
        )
        shown = found[metric.name]
        assert shown.value == theirs
        assert 0 <= shown.interval.low <= shown.value + 1e-9
        assert shown.value - 1e-9 <= shown.interval.high <= metric.highest / metric.scale + 1e-9
    assert 0 < found[benchmark.metrics[0].name].value < benchmark.metrics[0].highest / benchmark.metrics[0].scale
