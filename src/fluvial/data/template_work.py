"""A bound of the work of a chat template, which is a program that others may have written.

The sandbox of Jinja hides what lies outside of a template, and bounds neither its time nor its
memory. So a template is rendered here first, where steps of loops, calls and characters are
counted, each before it is made. What transformers renders after it is the same.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from functools import lru_cache, wraps
from typing import Any

from jinja2 import Template, TemplateError, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import generate_lorem_ipsum
from jinja2.visitor import NodeTransformer

from fluvial.errors import ConfigError
from fluvial.models.hf import PreTrainedTokenizerBase

MOST = 5_000_000
"""Characters that the rendering of a conversation may take; seconds, if all of it are steps."""
_STEP = 10
"""Characters as which a step of a loop, or a call, counts, by the time that they take."""
EACH = 50
"""Further characters for each character of the conversation."""
_WHOLE = ("join", "string", "tojson", "pprint", "format", "replace", "list", "sum")
"""Filters that write all that a value holds."""
_TIMES = ("indent", "wordwrap", "sum", "translate", "expandtabs", "replace", "join", "tojson")
"""Filters and methods whose result grows with the product of value and options."""


class _TooMuchError(ConfigError):
    """The rendering of a conversation takes more work than a template needs."""


_left: ContextVar[list[int] | None] = ContextVar("work that is left", default=None)


def check_work(
    template: str, messages: Sequence[Mapping[str, Any]], tokens: Mapping[str, Any], **options: Any
) -> None:
    """Raise `ConfigError` if a template takes more work than `MOST` characters, and `EACH` for each
    character of it, to render a conversation; `tokens` are the special tokens by name."""
    told = [{key: value for key, value in each.items() if value is not None} for each in messages]
    characters = sum(len(str(value)) for each in told for value in each.values())
    token = _left.set([MOST + EACH * characters])
    try:
        values = {"messages": told, "tools": None, "documents": None, **tokens, **options}
        for _ in _compiled(template).generate(values):
            pass
    except MemoryError as error:
        raise _TooMuchError("it needs too much memory") from error
    finally:
        _left.reset(token)


def check_template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], prompts: bool
) -> None:
    """Check the work of a tokenizer's chat template (see `check_work`); `prompts` says that it
    writes what stands before an answer."""
    template = tokenizer.get_chat_template()
    tokens = tokenizer.special_tokens_map
    check_work(template, messages, tokens, add_generation_prompt=prompts)


def _charge(amount: float) -> None:
    left = _left.get()
    if left is None:  # Jinja computes constants where it compiles
        return
    left[0] -= int(min(amount, 10 * MOST))
    if left[0] < 0:
        raise _TooMuchError(f"it takes more work than {MOST:,} characters of one conversation")


def _charge_whole(value: Any) -> None:
    """Charge the characters that a value has when it is written."""
    if isinstance(value, str):
        _charge(len(value))
    elif isinstance(value, int):
        _charge(value.bit_length() // 3)
    elif isinstance(value, Mapping | list | tuple):
        _charge(1)
        for item in value.items() if isinstance(value, Mapping) else value:
            _charge_whole(item)


def _charge_options(name: str, value: Any, options: Iterable[Any]) -> None:
    """Charge the result of a filter or method, before it is computed."""
    sizes = 0
    for option in options:
        if isinstance(option, int):
            sizes += min(abs(option), 10 * MOST)
        elif isinstance(option, str):
            sizes += len(option)
    size = len(value) if hasattr(value, "__len__") else 1
    if name == "replace" or (name == "join" and sizes <= 1):
        first, second = [*map(str, options), "", ""][:2]
        sizes = len(second) if name == "replace" else len(first)
        size = str(value).count(first) if name == "replace" else size
    if name in _WHOLE:
        _charge_whole(value)
    if name in ("format", "format_map") and isinstance(value, str):
        _charge(sum(int(digits[:9]) for digits in re.findall(r"\d+", value)))
        for option in options:
            _charge_whole(option)
    _charge(_STEP + (size * sizes if name in _TIMES else sizes))


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter of Jinja that charges its work."""
    place = 1 if hasattr(function, "jinja_pass_arg") else 0  # an environment or a context is first

    @wraps(function)
    def charged(*values: Any, **options: Any) -> Any:
        _charge_options(name, values[place], [*values[place + 1 :], *options.values()])
        result = function(*values, **options)
        _charge(len(result) if hasattr(result, "__len__") else 1)
        return result

    return charged


class _Counted(NodeTransformer):
    """Add a step to the start of each loop and macro, and a count to each `~`."""

    def _stepped(self, node: Any) -> Any:
        node = self.generic_visit(node)
        text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        node.body = [_call("step", [nodes.Const(_STEP + text)], node.lineno), *node.body]
        return node

    visit_For = visit_Macro = visit_CallBlock = _stepped  # noqa: N815

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        """Return a call that charges the text before it is joined."""
        node = self.generic_visit(node)  # type: ignore[assignment]
        call = nodes.Call(nodes.EnvironmentAttribute("joined"), node.nodes, [], None, None)
        return call.set_lineno(node.lineno)


def _call(name: str, values: list[nodes.Expr], line: int) -> nodes.Node:
    call = nodes.Call(nodes.EnvironmentAttribute(name), values, [], None, None)
    return nodes.ExprStmt(call).set_lineno(line)


class _Generation(Extension):
    """Read the tag that transformers adds around what the assistant says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return what stands in the tag, as a part of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [nodes.Scope(body).set_lineno(line)]


@pass_context
def _written(_: Context, value: Any) -> Any:
    _charge_whole(value)
    return value


class _Bounded(ImmutableSandboxedEnvironment):
    """The environment of transformers' chat templates, in which work is charged."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            finalize=_written,
        )
        self.filters["tojson"] = _tojson
        self.filters = {name: _bounded(name, each) for name, each in self.filters.items()}
        self.globals |= {"raise_exception": _raise, "strftime_now": lambda form: form}

    def _generate(self, source: nodes.Template, *names: Any, **options: Any) -> str:
        return super()._generate(_Counted().visit(source), *names, **options)

    def step(self, count: int) -> None:
        """Charge a step of a loop or a call of a macro."""
        _charge(count)

    def joined(self, *values: Any) -> str:
        """Return the text of `~`."""
        for value in values:
            _charge_whole(value)
        return "".join(map(str, values))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Charge the result of an operator before it is computed."""
        sizes = [len(side) if hasattr(side, "__len__") else 0 for side in (left, right)]
        numbers = [side for side in (left, right) if isinstance(side, int)]
        if operator == "*" and len(numbers) == 1:
            _charge(sum(sizes) * max(0, numbers[0]))
        elif len(numbers) == 2:
            bits = left.bit_length(), right.bit_length()
            _charge(bits[0] * min(abs(right), MOST) if operator == "**" else sum(bits))
        elif operator == "%" and isinstance(left, str):
            _charge_options("format", left, right if isinstance(right, tuple) else [right])
        else:
            _charge(sum(sizes))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, /, *values: Any, **options: Any) -> Any:
        """Charge a call before it is made."""
        if function is generate_lorem_ipsum:
            raise TemplateError("lipsum writes text by chance")
        name = getattr(function, "__name__", "")
        target = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        if function == self.step or function == self.joined:
            return function(*values)
        numbers = [] if name == "safe_range" else [*values, *options.values()]
        _charge_options(name, target, numbers)
        return super().call(context, function, *values, **options)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


@lru_cache(maxsize=64)
def _compiled(template: str) -> Template:
    return _Bounded().from_string(template)
