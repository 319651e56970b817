"""Where chat templates run: jinja's immutable sandbox, with a bound on how much they make and how often they go round.

A template is somebody's program. What it makes of a conversation is not much longer than the conversation, so whatever grows
is weighed before it is made: products, joined and formatted text, widths, rounds of loops, and values written out.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import GeneratorType
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

LARGEST = 10**6  # characters or items that a value may have, beside what was passed in
ROUND = 100  # characters that one call, or one round of a loop, counts as
_WIDTHS = {"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "tojson", "batch", "slice", "round", "truncate"}
_LINES = {"expandtabs": "\t", "indent": "\n", "tojson": "\n"}  # what a width stands beside each of
_SMALLER = {"length", "count", "first", "last", "attr", "default", "d"}  # give a number, or what is there already
_LEFT_OUT = ("striptags", "urlize", "xmlattr", "wordwrap")  # of HTML; their time grows with the square of a text


def _refuse(name: str, *_: Any, **__: Any) -> Any:
    raise SecurityError(f"the filter {name!r} is not offered to templates")


def weight(value: Any, most: float) -> float:
    """How many characters and items there are in a value, written out; stops counting beyond `most`."""
    total, rest = 0.0, [value]
    while rest and total <= most:
        item = rest.pop()
        total += 1
        if isinstance(item, str | bytes):
            total += len(item)
        elif isinstance(item, Mapping):
            total += len(item)
            rest += [*item.keys(), *item.values()] if len(item) <= most else ()
        elif isinstance(item, list | tuple | set | frozenset):
            total += len(item)
            rest += item if len(item) <= most else ()
        elif isinstance(item, int):
            total += item.bit_length() // 3
    return total


class _Generator(CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat((")
        for part in node.nodes:
            self.write("environment.finalize(")
            self.visit(part, frame)
            self.write("), ")
        self.write("))")


def _weigh_literals(node: Any) -> Any:
    """`node` with each list, tuple and mapping written in it passed through `made`."""
    for name, value in node.iter_fields():
        if isinstance(value, list):
            value[:] = [_weigh_literals(v) if isinstance(v, nodes.Node) else v for v in value]
        elif isinstance(value, nodes.Node):
            setattr(node, name, _weigh_literals(value))
    if isinstance(node, nodes.List | nodes.Dict) or (isinstance(node, nodes.Tuple) and node.ctx == "load"):
        return nodes.Call(nodes.EnvironmentAttribute("made"), [node], [], None, None, lineno=node.lineno)
    return node


class Sandbox(ImmutableSandboxedEnvironment):
    """No attributes beginning with an underscore, no changing of what is passed in, nothing that grows beyond bounds.

    given: what the template gets, which may be as large as it likes.
    """

    code_generator_class = _Generator
    intercepted_binops = frozenset(["*", "**", "%", "+"])

    def __init__(self, given: Any, **options: Any):
        super().__init__(finalize=self.written, **options)
        self.most = LARGEST + 16 * weight(given, float("inf"))  # of one value
        self.left = 100 * self.most  # of all that is made: text that grows message by message is made anew each time
        self.concat = self.joined  # type: ignore[assignment]
        for name in _LEFT_OUT:
            self.filters[name] = functools.partial(_refuse, name)
        del self.globals["lipsum"]
        for name, function in self.filters.items():
            if name not in _LEFT_OUT:
                self.filters[name] = self.bounded(name, function)

    def spend(self, amount: float) -> None:
        """Counts what is about to be made. Raises SecurityError where it is too much."""
        self.left -= amount
        if amount > self.most or self.left < 0:
            raise SecurityError(f"it would make more than {LARGEST} characters of this, or go round too often")

    def written(self, value: Any) -> Any:
        """A value that is about to be text."""
        if not isinstance(value, str):
            self.spend(weight(value, self.most))
        return value

    def joined(self, parts: Iterable[Any]) -> str:
        """Text in pieces as one."""
        found = []
        for part in parts:
            text = str(part)
            self.spend(len(text) + 1)
            found.append(text)
        total = sum(map(len, found))
        if total > self.most:
            self.spend(total)
        return "".join(found)

    def rounds(self, items: Iterable[Any]) -> Iterator[Any]:
        """What a loop goes through."""
        for item in items:
            self.spend(ROUND)
            yield item

    def made(self, value: Any) -> Any:
        """A list or the like that was written down: in a few lines they hold one another until nothing can go through them."""
        self.spend(weight(value, self.most))
        return value

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = nodes.Call(nodes.EnvironmentAttribute("rounds"), [loop.iter], [], None, None)
        return _weigh_literals(tree)

    def bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that is weighed first. Some get the environment or the like before the value."""
        first = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if name in _SMALLER:
                self.spend(ROUND)
                return function(*args, **kwargs)
            before, (value, *rest) = args[:first], args[first:]
            value = self.weighed(name, value, rest, kwargs)
            result = function(*before, value, *rest, **kwargs)
            self.spend(weight(result, self.most))
            return result

        return run

    def weighed(self, name: str, value: Any, rest: list[Any], kwargs: dict[str, Any]) -> Any:
        """Spends what a filter or a method of this name makes of a value. Returns the value, gone through if it must be."""
        if isinstance(value, GeneratorType):
            value = list(self.rounds(value))
        size = weight([value, rest, kwargs], self.most)
        self.spend(ROUND if size <= self.most else size)
        others = [*rest, *kwargs.values()]
        if name in _WIDTHS:
            text = value if isinstance(value, str) else ""
            lines = text.count(_LINES[name]) + 1 if name in _LINES and text else size if name in _LINES else 1
            widest = max(
                (abs(o) if isinstance(o, int) else len(o) for o in others if isinstance(o, int | str)), default=0
            )
            self.spend(lines * widest)
        elif name in ("replace", "join", "translate"):
            times = len(value) + 1 if isinstance(value, str | list | tuple | Mapping) else size
            if name == "replace" and isinstance(value, str) and rest and isinstance(rest[0], str):
                times = value.count(rest[0]) if rest[0] else times
            longest = max((weight(o, self.most) for o in others), default=0)
            self.spend(times * longest if name != "join" else size + times * longest)
        elif name in ("format", "format_map", "%"):
            self.spend(self.formatted(str(value), others))
        elif name == "sum" and not isinstance(kwargs.get("start", rest[1] if len(rest) > 1 else 0), int | float):
            self.spend(size * size)
        return value

    def formatted(self, form: str, values: list[Any]) -> float:
        """The width of what a format makes of values: theirs, and all that it asks to be filled."""
        places = re.findall(r"%[^%a-zA-Z]*|\{[^{}]*:[^}]*\}?", form)
        asked = sum(float(digits) for place in places for digits in re.findall(r"\d+", place))
        if any("*" in place or "{" in place[1:] for place in places):  # widths among the values
            asked += sum(abs(v) for v in self.leaves(values) if isinstance(v, int))
        return asked + (len(places) + 1) * weight(values, self.most)

    def leaves(self, value: Any) -> Iterator[Any]:
        inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else None
        if inside is None:
            yield value
        else:
            for item in inside:
                yield from self.leaves(item)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        method = getattr(__obj, "__wrapped__", __obj)
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str):
            if name == "join" and args:
                args = (__self.weighed("join", list(__self.rounds(args[0])), [owner], {}), *args[1:])
            else:
                __self.weighed(name, owner, list(args), kwargs)
        else:
            __self.spend(ROUND)
        result = super().call(__context, __obj, *args, **kwargs)
        __self.spend(weight(result, __self.most))
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            self.spend(left.bit_length() * max(right, 0))
        elif operator == "*":
            for some, times in ((left, right), (right, left)):
                if isinstance(times, int):
                    several = isinstance(some, str | bytes | list | tuple)
                    self.spend(weight(some, self.most) * max(times, 0) if several else weight([some, times], self.most))
        elif operator == "%" and isinstance(left, str):
            self.weighed("%", left, [right], {})
        elif operator == "+":
            self.spend(weight(left, self.most) + weight(right, self.most))
        return super().call_binop(context, operator, left, right)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__}")
