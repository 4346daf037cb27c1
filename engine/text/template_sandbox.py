"""A jinja2 sandbox for templates of model files: they change nothing, and their work is bounded."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.filters import do_indent
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_STEPS = 200_000  # loop rounds and calls of one rendering
MAX_TEXT = 4_000_000  # characters of any one string

_LOOP, _JOIN = "__bounded_loop", "__bounded_join"
# Filters whose argument is a size, which no chat template needs.
_REMOVED_FILTERS = ("center", "format", "wordwrap", "batch", "slice", "xmlattr", "random", "pprint")


class TemplateLimitError(jinja2.TemplateError):
    """A template does more work, or makes more text, than a chat template can need."""


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """Counts loop rounds and calls, and looks at the size of every string made. One rendering at a time.

    The parsed template is changed before it is compiled: what a loop runs over, and the parts of `~`, go through
    functions that count.
    """

    intercepted_binops = frozenset(["*", "+", "%", "**"])

    def __init__(self) -> None:
        extensions = [LoopControlExtension, GenerationExtension]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, cache_size=0)
        for name in _REMOVED_FILTERS:
            self.filters.pop(name, None)
        self.filters["tojson"] = _tojson
        self.filters |= {"replace": _replace, "join": _join_items, "indent": _indent}
        self.globals.pop("lipsum", None)
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals[_LOOP] = self._loop
        self.globals[_JOIN] = _join
        self._steps = 0

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

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Count the call and check the size of what it gives."""
        if obj not in (self._loop, _join):
            self._step()
        if getattr(obj, "__name__", "") in ("center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map"):
            raise TemplateLimitError(f"{obj.__name__}() is not available to chat templates")
        if getattr(obj, "__name__", "") == "replace" and isinstance(getattr(obj, "__self__", None), str):
            return _replace(obj.__self__, *args, **kwargs)
        return _checked(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refuse what makes a small text into a huge one: repetition, powers, % with a width."""
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            raise TemplateLimitError(f"the operator {operator} is not available to chat templates here")
        if operator == "*" and (hasattr(left, "__len__") or hasattr(right, "__len__")):
            thing, count = (left, right) if hasattr(left, "__len__") else (right, left)
            if not isinstance(count, int) or len(thing) * count > MAX_TEXT:
                raise TemplateLimitError("the text is too long")
        return _checked(super().call_binop(context, operator, left, right))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _bounded(super()._parse(source, name, filename))

    def _step(self) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise TemplateLimitError("it loops too often")

    def _loop(self, items: Iterable[Any]) -> Any:
        if isinstance(items, jinja2.Undefined):
            return items  # its own error is the clearer one
        return _CountedItems(items, self._step)


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
            if isinstance(value, nodes.Concat):
                setattr(parent, field, _call(_JOIN, value.nodes))
            elif isinstance(value, list):
                value[:] = [_call(_JOIN, v.nodes) if isinstance(v, nodes.Concat) else v for v in value]
    return tree


def _call(name: str, arguments: list[Any]) -> nodes.Call:
    line = arguments[0].lineno if arguments else 1
    return nodes.Call(nodes.Name(name, "load", lineno=line), arguments, [], None, None, lineno=line)


def _checked(value: Any) -> Any:
    if isinstance(value, str | list | tuple) and len(value) > MAX_TEXT:
        raise TemplateLimitError("the text is too long")
    return value


def _join(*parts: Any) -> str:
    return str(_checked("".join(map(str, parts))))


def _replace(text: Any, old: str, new: str, count: int | None = None) -> str:
    text, old, new = str(text), str(old), str(new)
    if (text.count(old) if old else len(text) + 1) * len(new) > MAX_TEXT:
        raise TemplateLimitError("the text is too long")
    return text.replace(old, new, -1 if count is None else count)


def _join_items(items: Iterable[Any], separator: str = "", attribute: str | None = None) -> str:
    texts = [str(item if attribute is None else item[attribute]) for item in items]
    if sum(map(len, texts)) + len(texts) * len(str(separator)) > MAX_TEXT:
        raise TemplateLimitError("the text is too long")
    return str(separator).join(texts)


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    if (width if isinstance(width, int) else len(width)) > 64:
        raise TemplateLimitError("indent takes a width of at most 64")
    return do_indent(text, width, first, blank)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON as chat templates expect it: no HTML escapes."""
    if indent is not None and not 0 <= indent <= 16:
        raise TemplateLimitError("tojson takes an indent of 0 to 16")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(str(pattern)[:100])
