"""Chat templates are programs of strangers: they are rendered in Jinja's sandbox, and each of their steps is counted.

What a template can say, and what it means, is as in transformers, of which this is the part that writes conversations.
The counting is ours, since a program that runs for ever cannot be stopped from outside: no thread can be, and macOS
limits no process's memory. It rests on four rules. Whatever copies, compares or writes a value takes as many steps as
the value is large. A loop takes as many at each turn, and a macro at each call, as its body is long. Functions and
filters may multiply what they are given, so they take as many as the product. What has no such bound is refused.
"""

import json
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from types import BuiltinMethodType, FunctionType, MethodType, NoneType
from typing import Any

from jinja2 import Template, TemplateError, Undefined, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from ..errors import InputError, printable

MAX_STEPS = 1_000_000  # of one rendering: about a second
MAX_SOURCE = 32 * 1024  # characters; the longest templates of language models have some 20,000
CHARACTERS_A_STEP = 8


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What a template may use, by the names of Jinja's syntax tree, of its filters, and of the methods of Python's values.
SYNTAX = _names(
    "Template Output For If Macro CallBlock FilterBlock With Assign AssignBlock Scope Break Continue "
    "Add Sub Mul Div FloorDiv Mod Pow And Or Not Neg Pos Name NSRef Const TemplateData Tuple List Dict Pair Keyword "
    "CondExpr Filter Test Call Getitem Getattr Slice Concat Compare Operand"
)
FILTERS = _names(
    "abs capitalize count d default dictsort e escape first float indent int items join last length list lower map max "
    "min reject rejectattr replace reverse round safe select selectattr sort string title trim truncate unique upper"
)
METHODS = _names(
    "strip lstrip rstrip removeprefix removesuffix split rsplit splitlines partition rpartition join replace "
    "startswith endswith find rfind index rindex count lower upper title capitalize swapcase isalnum isalpha isdecimal "
    "isdigit islower isnumeric isspace istitle isupper get items keys values cycle"
)

LISTS = (list, tuple, range, KeysView, ValuesView, ItemsView)
SINGLES = (NoneType, int, float, Undefined)


def render(source: str, variables: Mapping[str, Any]) -> str:
    """Return what a chat template writes, given its variables. Raises InputError that says why it cannot."""
    _meter.set(_Meter())
    try:
        return _compile(source).render({"tools": None, "documents": None, **variables})
    except Exception as error:  # of Jinja, or of any function that the template calls
        reason = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
        raise InputError(f"the chat template cannot write this conversation: {printable(reason)}") from error


class _Meter:
    """Counts the steps of one rendering."""

    def __init__(self) -> None:
        self.left = MAX_STEPS

    def take(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise SecurityError("it takes too many steps")

    def weigh(self, *values: Any) -> int:
        """Take as many steps as values are large, with all that is in them, and return how many these were.

        Refuses what is not data: the text of a namespace may be larger than anything that was counted.
        """
        before, stack = self.left, list(values)
        while stack:
            value = stack.pop()
            if isinstance(value, str):
                self.take(1 + len(value) // CHARACTERS_A_STEP)
            elif isinstance(value, dict):
                self.take(1 + 2 * len(value))
                stack += [*value.keys(), *value.values()]
            elif isinstance(value, LISTS):
                self.take(1 + len(value))
                stack += value
            elif isinstance(value, SINGLES):
                self.take(1)
            else:
                raise SecurityError(f"it uses a {type(value).__name__} as text")
        return before - self.left

    def multiply(self, *values: Any) -> None:
        """Take as many steps as what a function may make of values: the product of their sizes, and of numbers."""
        product = 1
        for value in values:
            product *= 1 + abs(value) if isinstance(value, int) else self.weigh(value)
        self.take(product)


_meter: ContextVar[_Meter] = ContextVar("meter")


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with transformers' settings, less what cannot be counted."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension])
        self.filters = {name: self.filters[name] for name in FILTERS} | {"tojson": _to_json}
        functions = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.globals = {name: self.globals[name] for name in ("dict", "namespace", "range")} | functions

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        known = not callable(value) or isinstance(value, Macro) or attr in METHODS
        return known and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Leave `format` to `is_safe_attribute`, which refuses it: the width in a format is a multiplication."""

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter = _meter.get()
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            raise SecurityError(f"it computes with {operator}, which has no bound")
        if operator == "*" and not (isinstance(left, int | float) and isinstance(right, int | float)):
            meter.multiply(left, right)
        else:
            meter.weigh(left, right)
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and result.bit_length() > 64:
            raise SecurityError("it computes with numbers beyond 64 bits")
        return result

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        values, meter = [*args, *kwargs.values()], _meter.get()
        if isinstance(__obj, BuiltinMethodType | MethodType) and isinstance(__obj.__self__, str | list | tuple | dict):
            meter.multiply(__obj.__self__, *values)
        elif isinstance(__obj, FunctionType):
            meter.multiply(*values)
        elif isinstance(__obj, Macro | MethodType | Undefined) or __obj in (dict, Namespace):
            meter.weigh(*_data(values))
        else:
            raise SecurityError(f"it calls a {type(__obj).__name__}")
        result = super().call(__context, __obj, *args, **kwargs)
        meter.weigh(*[result] * isinstance(result, str | list | tuple))
        return result


class _Metered(_Sandbox):
    """Compiles templates so that they count. The filters that count are `_Count`'s alone: a name has no hyphen."""

    def __init__(self) -> None:
        super().__init__()
        counting = {"-weigh": _weigh, "-steps": _steps, "-turns": _turns, "-join": _join}
        self.filters = {name: _metered_filter(name) for name in self.filters} | counting
        self.tests = {name: _metered_test(name) for name in self.tests}

    def call_filter(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a filter that is named by a text, as in `map("upper")`."""
        if name not in _SANDBOX.filters:
            raise SecurityError(f"No filter named {name!r}.")
        return super().call_filter(name, *args, **kwargs)


class _Generation(Extension):
    """`{% generation %}` marks what is learned, for transformers; here it is the text in it."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja has it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Count(NodeTransformer):
    """Puts the counting into a template's syntax tree."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        if type(node).__name__ not in SYNTAX:
            raise SecurityError(f"it has a part of the kind {type(node).__name__}")
        repeated = isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock)
        size = nodes.Const(sum(1 for _ in node.find_all(nodes.Node)) if repeated else 0)
        node = self.generic_visit(node)
        match node:
            case nodes.Output():
                node.nodes = [_filtered("-weigh", child) for child in node.nodes]
            case nodes.For(recursive=True):
                raise SecurityError("it has a recursive loop")
            case nodes.For():
                node.iter = _filtered("-turns", node.iter, size)
            case nodes.Macro() | nodes.CallBlock():
                node.body = [nodes.ExprStmt(_filtered("-steps", size)), *node.body]
            case nodes.Concat():
                return _filtered("-join", nodes.List(node.nodes))
            case nodes.Compare() | nodes.Operand():
                node.expr = _filtered("-weigh", node.expr)
            case nodes.Pair():
                node.key = _filtered("-weigh", node.key)
            case nodes.Getitem(arg=nodes.Slice()):
                node.node = _filtered("-weigh", node.node)
            case nodes.Getitem():
                node.arg = _filtered("-weigh", node.arg)
            case nodes.List() | nodes.Dict() | nodes.Tuple(ctx="load"):
                return _filtered("-weigh", node)
        return node


def _filtered(name: str, node: nodes.Node, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


def _data(values: Iterable[Any]) -> list[Any]:
    """Leave out namespaces, macros and functions, which are only handed on."""
    return [value for value in values if isinstance(value, (str, dict, *LISTS, *SINGLES))]


@pass_context  # so that none of these is called when the template is compiled
def _weigh(context: Context, value: Any) -> Any:
    _meter.get().weigh(value)
    return value


@pass_context
def _steps(context: Context, steps: int) -> None:
    _meter.get().take(steps)


@pass_context
def _turns(context: Context, values: Iterable[Any], steps: int) -> Iterator[Any]:
    for value in values:
        _meter.get().take(steps)
        yield value


@pass_context
def _join(context: Context, values: list[Any]) -> str:
    _meter.get().weigh(values)
    return "".join(map(str, values))


def _metered_filter(name: str) -> Callable[..., Any]:
    @pass_context
    def metered(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        _meter.get().multiply(value, *args, *kwargs.values())
        result = _SANDBOX.call_filter(name, value, args, kwargs, context, context.eval_ctx)
        if isinstance(result, Iterator):
            result = list(result)
        _meter.get().weigh(result)
        return result

    return metered


def _metered_test(name: str) -> Callable[..., bool]:
    @pass_context
    def metered(context: Context, *args: Any) -> bool:
        _meter.get().weigh(*_data(args))
        return bool(_SANDBOX.call_test(name, args[0], args[1:], {}, context, context.eval_ctx))

    return metered


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


_SANDBOX = _Sandbox()
_METERED = _Metered()


@lru_cache(maxsize=8)
def _compile(source: str) -> Template:
    if len(source) > MAX_SOURCE:
        raise SecurityError(f"it has {len(source)} characters, and {MAX_SOURCE} are allowed")
    return _METERED.from_string(_Count().visit(_METERED.parse(source)))
