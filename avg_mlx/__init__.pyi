from .errors import AvgMlxError as AvgMlxError
from .errors import InputError as InputError
from .evaluation.questions import Question as Question
from .evaluation.questions import read_questions as read_questions
from .evaluation.run import Evaluation as Evaluation
from .evaluation.run import evaluate as evaluate
from .inference.batch import Request as Request
from .inference.batch import generate_batch as generate_batch
from .inference.batch import stream_batch as stream_batch
from .inference.chat import ChatSession as ChatSession
from .inference.generation import Answer as Answer
from .inference.generation import Counters as Counters
from .inference.generation import Segment as Segment
from .inference.generation import Timings as Timings
from .inference.generation import generate as generate
from .inference.generation import route as route
from .inference.generation import stream_generate as stream_generate
from .inference.view import Routing as Routing
from .inference.view import View as View
from .weights.checkpoint import load as load
from .weights.conversion import convert as convert
from .weights.quantization import Quantization as Quantization

__version__: str
