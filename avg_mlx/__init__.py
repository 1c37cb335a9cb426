"""AVG-LLaVA on MLX: a vision-language model that decides for itself how closely to look.

    from avg_mlx import load, generate

    model, tokenizer = load("mlx_model")
    print(generate(model, tokenizer, "What is in this image?", "photo.jpg").text)

Names are imported when they are used, so that `--help` need not wait for MLX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import AvgMlxError, InputError
from .version import VERSION

if TYPE_CHECKING:
    from .batch import Request, generate_batch, stream_batch
    from .chat import ChatSession
    from .checkpoint import load
    from .conversion import convert
    from .evaluation.questions import Question, read_questions
    from .evaluation.run import Evaluation, evaluate
    from .generation import Answer, Counters, Segment, Timings, generate, route, stream_generate
    from .quantization import Quantization
    from .view import Routing, View

__version__ = VERSION

__all__ = [
    "Answer",
    "AvgMlxError",
    "ChatSession",
    "Counters",
    "Evaluation",
    "InputError",
    "Quantization",
    "Question",
    "Request",
    "Routing",
    "Segment",
    "Timings",
    "View",
    "convert",
    "evaluate",
    "generate",
    "generate_batch",
    "load",
    "read_questions",
    "route",
    "stream_batch",
    "stream_generate",
]

_HOMES = {
    "batch": ("Request", "generate_batch", "stream_batch"),
    "chat": ("ChatSession",),
    "checkpoint": ("load",),
    "conversion": ("convert",),
    "evaluation.questions": ("Question", "read_questions"),
    "evaluation.run": ("Evaluation", "evaluate"),
    "generation": ("Answer", "Counters", "Segment", "Timings", "generate", "route", "stream_generate"),
    "quantization": ("Quantization",),
    "view": ("Routing", "View"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'avg_mlx' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
