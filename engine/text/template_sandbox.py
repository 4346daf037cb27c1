"""A jinja2 sandbox for templates of model files: they change nothing, and their work is bounded.

What a template does is counted and its sizes are looked at before something large is made. That finds nearly all;
what it cannot find, such as comparing two long texts again and again, the limits of `template_program` end.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from svdengine.text import template_bounds as bounds
from svdengine.text.template_bounds import MAX_TEXT, TemplateLimitError, check_size

MAX_STEPS = 200_000  # loop rounds, calls and filters of one rendering; large values count as several

_LOOP, _JOIN, _SLICE = "__bounded_loop", "__bounded_join", "__bounded_slice"


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """Counts loop rounds and calls, and looks at the size of every value made. One rendering at a time.

    The parsed template is changed before it is compiled: what a loop runs over, the parts of `~` and slices go through
    functions that count.
    """

    intercepted_binops = frozenset(["*", "+", "%", "**"])
    concat = staticmethod(bounds.concat)  # of what a macro or a block gives

    def __init__(self) -> None:
        extensions = [LoopControlExtension, GenerationExtension]
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=extensions, cache_size=0, finalize=bounds.check_written
        )
        self._steps = 0
        self.filters |= bounds.FILTERS
        self.filters["join"] = self._join_items
        self.filters = {name: self._counted(function) for name, function in self.filters.items()}
        self.globals.pop("lipsum", None)
        self.globals |= bounds.FUNCTIONS
        self._own_loop = self._loop  # one object, to know it again
        self.globals |= {_LOOP: self._own_loop, _JOIN: bounds.join_parts, _SLICE: bounds.take_slice}

    def render(self, template: jinja2.Template, variables: dict[str, Any]) -> str:
        """Render with a fresh budget. Raises jinja2.TemplateError, or whatever else the template provokes."""
        self._steps = 0
        parts, size = [], 0
        for part in template.generate(variables):
            size += len(part)
            parts.append(part)
            if size > MAX_TEXT:
                raise TemplateLimitError("the text is too long")
        return "".join(parts)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Count the call, refuse what would make something large, and check what it gives."""
        if obj is self._own_loop:
            return obj(*args)
        if obj is bounds.join_parts:
            return self._counted_value(obj(*args))
        own = getattr(obj, "__self__", None)
        self._count(own, *args)
        if isinstance(obj, LoopContext):  # a recursive loop
            args = (*map(self._loop, args[:1]), *args[1:])
        elif isinstance(own, str | int | float):
            given = {name: value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")}
            args = bounds.check_method(own, obj.__name__, args, given)
        return self._counted_value(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refuse what makes a small value into a huge one: repetition, powers, % with a width."""
        bounds.check_operator(operator, left, right)
        return self._counted_value(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Any:
        """`str.format` of jinja2's sandbox, with bounded widths."""
        safe = super().wrap_str_format(value)
        return bounds.BoundedFormat(self, value.__self__, value.__name__) if safe is not None else None

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _bounded(super()._parse(source, name, filename))

    def _count(self, *values: Any) -> None:
        """A step, and more for large values."""
        self._steps += 1
        for value in values:
            if isinstance(value, str):
                self._steps += len(value) >> 9
            elif isinstance(value, list | tuple | dict):
                self._steps += len(value) >> 3
        if self._steps > MAX_STEPS:
            raise TemplateLimitError("it loops too often")

    def _counted_value(self, value: Any) -> Any:
        self._count(value)
        return check_size(value)

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that counts. Marks for what it wants to be passed are kept by `wraps`."""

        @wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._count(*args)
            return self._counted_value(function(*args, **kwargs))

        return counted

    def _loop(self, items: Iterable[Any]) -> Any:
        if isinstance(items, jinja2.Undefined):
            return items  # its own error is the clearer one
        return _CountedItems(items, self._count)

    def _join_items(self, items: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        get = make_attrgetter(self, attribute) if attribute is not None else None
        return bounds.join_items(d, items if get is None else map(get, items))


class _CountedItems:
    """The items of a loop, with their number where it is known: `loop.last` and `loop.length` need it."""

    def __init__(self, items: Iterable[Any], step: Callable[[], None]) -> None:
        self._items = items if isinstance(items, Collection) else list(items)
        self._step = step

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            self._step()
            yield item


class GenerationExtension(Extension):
    """`{% generation %}` marks the assistant's part for training; here it is only its contents."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Parse the block and return its body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _bounded(tree: nodes.Template) -> nodes.Template:
    for loop in tree.find_all(nodes.For):
        loop.iter = _call(_LOOP, [loop.iter])
    for parent in [tree, *tree.find_all(nodes.Node)]:
        for field, value in parent.iter_fields():
            if isinstance(value, list):
                value[:] = map(_bounded_node, value)
            else:
                setattr(parent, field, _bounded_node(value))
    return tree


def _bounded_node(node: Any) -> Any:
    if isinstance(node, nodes.Concat):
        return _call(_JOIN, node.nodes)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        cut = (node.arg.start, node.arg.stop, node.arg.step)
        return _call(_SLICE, [node.node, *(part or nodes.Const(None, lineno=node.lineno) for part in cut)])
    return node


def _call(name: str, arguments: list[Any]) -> nodes.Call:
    line = arguments[0].lineno if arguments else 1
    return nodes.Call(nodes.Name(name, "load", lineno=line), arguments, [], None, None, lineno=line)
