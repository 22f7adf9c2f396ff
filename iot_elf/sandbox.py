# SPDX-License-Identifier: Apache-2.0
"""What a template may do: Jinja2's sandbox, in which no single step holds the interpreter.

Python hears Ctrl-C only between two steps, and `9 ** 9 ** 9` is one. So a value has at most MAX_SIZE characters and
elements, those of its elements included, and a number MAX_DIGITS; what would be larger is refused before it is made.
Then only loops can take long, and these Ctrl-C ends.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import StrictUndefined, Undefined, nodes, pass_context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from iot_elf import defaults

MAX_SIZE = defaults.MAX_PAYLOAD_BYTES
MAX_WRITTEN = 64 * MAX_SIZE  # by one template in all, with what it does not send
MAX_DIGITS = 4300  # as Python allows in a text (sys.get_int_max_str_digits)
MAX_BITS = int(MAX_DIGITS * 3.33)
MAX_WIDTH = 1000  # to which something is padded, indented or rounded
_PADDING = frozenset("ljust rjust center zfill expandtabs indent batch slice round tojson wordwrap".split())
_BARRED = frozenset("encode to_bytes translate maketrans".split())  # methods whose results have no bounds
# In a text for %: a width of four digits, or one that is a value; a parenthesis in a name, which could hide one.
_WIDE_PERCENT = re.compile(r"%(\([^()]*\))?[#0 +-]*(\d*\.)?(\d{4,}|\*)|%\([^()]*\(")


class TooLargeError(Exception):
    """A template would make something too large."""


def weight(value: Any) -> int:
    """Return how many characters and elements a value has, those of its elements included. Raises TooLargeError."""
    total, left = 0, [value]
    while left:
        each = left.pop()
        if isinstance(each, str | bytes):
            total += len(each)
        elif isinstance(each, int):
            if (bits := each.bit_length()) > MAX_BITS:
                raise TooLargeError(f"a number has more than {MAX_DIGITS:,} digits")
            total += 1 + bits // 4
        elif isinstance(each, list | tuple | set | frozenset | dict):
            refuse_beyond(total := total + 1 + len(each))
            left += each
            left += each.values() if isinstance(each, dict) else ()
        elif isinstance(each, Namespace):
            left += object.__getattribute__(each, "_Namespace__attrs").values()
            total += 1
        refuse_beyond(total)
    return total


def refuse_beyond(size: int, most: int = MAX_SIZE) -> None:
    if size > most:
        raise TooLargeError(f"it makes more than {most:,} characters or elements")


def bounded(value: Any) -> Any:
    """Return the value. Raises TooLargeError."""
    weight(value)
    return value


def joined(separator: str, parts: Any) -> str:
    """Join texts, or what becomes one. Raises TooLargeError."""
    texts = [str(_writable(bounded(part))) for part in itertools.islice(parts, MAX_SIZE + 1)]
    refuse_beyond(sum(map(len, texts)) + len(separator) * len(texts))
    return separator.join(texts)


def _writable(value: Any) -> Any:
    """Return a value that can stand in a message. Raises TypeError for one of the program."""
    if callable(value) and not isinstance(value, Undefined):
        raise TypeError(f"{getattr(value, '__name__', 'this')} is a function: write its arguments in parentheses")
    if not isinstance(value, str | int | float | list | tuple | dict | set | range | Undefined | None):
        raise TypeError("this is not a text, a number or a list: `| list` makes a list of what map and select give")
    return value


def _refuse_operation(operator: str, left: Any, right: Any) -> None:
    if operator == "%" and isinstance(left, str):
        _refuse_format(left, left.count("%"), right)
    elif isinstance(left, int) and isinstance(right, int):
        bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * max(right, 0)}
        if bits.get(operator, 0) > MAX_BITS:
            raise TooLargeError(f"a number has more than {MAX_DIGITS:,} digits")
    elif operator == "*":
        for value, times in ((left, right), (right, left)):
            if isinstance(times, int):
                refuse_beyond(weight(value) * times)


def _refuse_format(text: str, fields: int, values: Any) -> None:
    """Refuse a text with fields in which each of the values may stand, some of them again and again."""
    if _WIDE_PERCENT.search(text):
        raise TooLargeError(f"a width or precision is {MAX_WIDTH:,} or more, or one of the values")
    refuse_beyond(fields * weight(values), 10 * MAX_SIZE)


def _refuse_call(name: str, value: Any, arguments: Sequence[Any]) -> None:
    """Raise TooLargeError for what a filter, or a method of a text, would make of `value`."""
    if name in _PADDING:
        sizes = [len(it) if isinstance(it, str) else it for it in arguments if isinstance(it, str | int)]
        if max(map(abs, sizes), default=0) > MAX_WIDTH:
            raise TooLargeError(f"{name} has an argument of more than {MAX_WIDTH:,}")
    elif name == "replace" and len(arguments) > 1:
        text = str(bounded(value))
        refuse_beyond(len(text) + text.count(str(arguments[0])) * len(str(arguments[1])))
    elif name == "format":  # of the filter: % has the same syntax
        _refuse_format(str(bounded(value)), str(value).count("%"), list(arguments))


def _filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter of Jinja2's with bounds."""
    at = 1 if hasattr(function, "jinja_pass_arg") else 0  # of the value; first there may be Jinja2's context

    @functools.wraps(function)
    def bounded_filter(*arguments: Any, **named: Any) -> Any:
        value, *others = arguments[at:]
        if name in ("join", "list"):
            value = bounded(list(itertools.islice(value, MAX_SIZE + 1)))
            refuse_beyond(len(value) * sum(len(each) for each in (*others, *named.values()) if isinstance(each, str)))
        _refuse_call(name, value, [*others, *named.values()])
        return bounded(function(*arguments[:at], value, *others, **named))

    return bounded_filter


@pass_context
def written(context: Any, value: Any) -> Any:
    """Return what {{ }} writes: true, null, lists and members as JSON has them."""
    context.written = getattr(context, "written", 0) + weight(value)
    refuse_beyond(context.written, MAX_WRITTEN)
    if isinstance(value, bool | list | tuple | dict | None):
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    return _writable(value)


class _Formatter(SandboxedFormatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        if any(len(digits.lstrip("0")) > 3 for digits in re.findall(r"\d+", format_spec)):
            raise TooLargeError(f"a width or precision is {MAX_WIDTH:,} or more")
        return super().format_field(bounded(value), format_spec)


class _Bounds(NodeTransformer):
    """Puts bounds around what makes a value without a call: lists and the like, and ~."""

    def _bounded(self, node: Any) -> Any:
        node = self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load":  # names that get a value
            return node
        return nodes.Filter(node, "bounded", [], [], None, None, lineno=node.lineno)

    visit_List = visit_Tuple = visit_Dict = _bounded  # noqa: N815 - Jinja2's names

    def visit_Concat(self, node: Any) -> Any:  # noqa: N802
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, "joined", [], [], None, None, lineno=node.lineno)


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja2's sandbox with these bounds, without what has random numbers that --seed does not repeat."""

    intercepted_binops = frozenset(("*", "**", "%", "+"))

    def __init__(self) -> None:
        super().__init__(undefined=StrictUndefined, keep_trailing_newline=True, finalize=written)
        del self.filters["random"], self.globals["lipsum"]
        self.filters = {name: _filter(name, function) for name, function in self.filters.items()}
        self.filters |= {"bounded": bounded, "joined": functools.partial(joined, "")}
        vars(self)["concat"] = functools.partial(joined, "")  # of what a macro or {% set %} makes piece by piece

    def compiled(self, tree: nodes.Template) -> Any:
        """Return what renders a template that parse() has read. Raises Jinja2's errors."""
        tree = _Bounds().visit(tree)
        tree.set_environment(self)
        return self.from_string(tree)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _BARRED and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _refuse_operation(operator, left, right)
        return bounded(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Any:
        if super().wrap_str_format(value) is None:
            return None
        text, formatter, takes_dict = value.__self__, _Formatter(self), value.__name__ == "format_map"

        def format(*values: Any, **named: Any) -> str:
            refuse_beyond(text.count("{") * weight([*values, named]), 10 * MAX_SIZE)
            return formatter.vformat(text, () if takes_dict else values, values[0] if takes_dict else named)

        return format

    def call(self, context: Any, function: Any, *arguments: Any, **named: Any) -> Any:
        name, owner = getattr(function, "__name__", ""), getattr(function, "__self__", None)
        if isinstance(owner, str):
            if name == "join":
                return joined(owner, *arguments)
            _refuse_call(name, owner, [*arguments, *named.values()])
        return bounded(super().call(context, function, *arguments, **named))
