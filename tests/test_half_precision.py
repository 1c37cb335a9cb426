"""Half precision and 8 bits against the reference, and what dequantized weights are."""

import functools
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import CASES, CHECKPOINT, GOLDEN, GRANULARITIES, Reference

from avg_mlx import Quantization, convert, load
from avg_mlx.inference.options import Looking
from avg_mlx.inference.steps import score, see
from avg_mlx.model.inventory import tensors_of


@dataclass(frozen=True)
class Precision:
    """How the golden checkpoint is converted, and how close to the reference it then stays.

    The bounds come from benchmarks/divergence.py, whose figures docs/numerics.md gives: tolerances are the largest
    differences found and 30 % or more, in bfloat16 eight times those of float16, as its mantissa is three bits
    shorter; leads are the largest changes found, rounded up.
    """

    options: dict[str, Any]
    tolerance: float  # of router logits and last logits; a quarter of it for the mean of the latter
    lead: float  # by how much the best router logit may lead the second and still lose


FLOAT16 = Precision({"dtype": "float16"}, tolerance=0.05, lead=0.017)
BFLOAT16 = Precision({"dtype": "bfloat16"}, tolerance=0.4, lead=0.2)
EIGHT_BITS = Precision({"quantization": Quantization(bits=8, group_size=32)}, tolerance=0.4, lead=0.04)


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """`golden(**options)` converts the golden checkpoint so, once: (model, tokenizer)."""

    @functools.cache
    def convert_once(dtype=None, quantization=None):
        folder = tmp_path_factory.mktemp("golden") / "model"
        convert(CHECKPOINT, folder, dtype=dtype, quantization=quantization)
        return load(folder)

    return convert_once


@pytest.mark.parametrize(
    ("precision", "case"),
    [
        *(pytest.param(FLOAT16, case, id=f"float16-{case}") for case in range(len(CASES))),
        *(pytest.param(BFLOAT16, case, id=f"bfloat16-{case}") for case in range(len(CASES))),
        pytest.param(EIGHT_BITS, 4, id="8 bits-4"),  # the fewest crops: quantized layers are slow on a CPU
    ],
)
def test_choice_and_logits_stay_close_to_the_references(precision, case, golden):
    model, tokenizer = golden(**precision.options)
    reference = Reference(case)
    seen = see(model, tokenizer, CASES[case]["prompt"], GOLDEN / CASES[case]["image"], Looking())

    [routing], logits = score(model, seen), reference("router_logits")
    assert np.abs(np.array(routing.logits) - logits).max() < precision.tolerance
    best, second = np.argsort(-logits)[:2]
    decided = logits[best] - logits[second] > precision.lead
    assert GRANULARITIES.index(routing.choice) in ([best] if decided else [best, second])

    last = model(seen.embeddings(model, GRANULARITIES[:1])[None])[0, -1]
    error = np.abs(np.array(last.astype(mx.float32)) - reference("last_logits")[0])
    assert error.max() < precision.tolerance
    assert error.mean() < precision.tolerance / 4


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4", "mxfp8"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_dequantized_weights_have_the_dtype_of_the_rest(tiny_checkpoint, tmp_path, dtype, mode):
    quantization = Quantization(mode=mode, group_size=32 if mode == "affine" else None)
    convert(tiny_checkpoint, tmp_path / "quantized", dtype=dtype, quantization=quantization)
    parts = convert(tmp_path / "quantized", tmp_path / "model", dequantize=True)
    tensors = tensors_of(load(tmp_path / "model")[0])
    assert {array.dtype for array in tensors.values()} == {getattr(mx, dtype)}
    assert sum(part.bytes for part in parts) == sum(array.nbytes for array in tensors.values())
