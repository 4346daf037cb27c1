"""Filters, operators and methods of chat templates, with a bound on what they make. `template_sandbox` applies them.

Each check comes before the work: it looks at how large the result can be.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import wraps
from itertools import islice
from string import Formatter
from typing import Any

import jinja2
from jinja2.filters import FILTERS as JINJA_FILTERS
from jinja2.sandbox import SandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter
from markupsafe import Markup

MAX_TEXT = 4_000_000  # characters of any one string
MAX_ITEMS = 1_000_000  # of any one list
MAX_BITS = 4096  # of a whole number
MAX_WIDTH = 9999  # of a formatted field

_PERCENT = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(\*|\d*)(?:\.(\*|\d*))?")


class TemplateLimitError(jinja2.TemplateError):
    """A template does more work, or makes more text, than a chat template can need."""


def check_size(value: Any) -> Any:
    """The value. Raises TemplateLimitError when it is large, or bytes, whose methods nobody bounds."""
    if isinstance(value, str):
        _check_length(len(value))
    elif isinstance(value, list | tuple | dict | set):
        _check_count(len(value))
    elif isinstance(value, int):
        _check_bits(value.bit_length())
    elif isinstance(value, bytes | bytearray | memoryview):
        raise TemplateLimitError("bytes are not available to chat templates")
    return value


def check_written(value: Any) -> Any:
    """The value. Raises TemplateLimitError when it would be long when it is written out.

    A list may hold another one twice, and that one a third twice: small in memory, and endless in text.
    """
    if not isinstance(value, list | tuple | dict | set):
        return value
    left, size, count = [value], 0, 0
    while left:
        item = left.pop()
        count += 1
        if isinstance(item, dict):
            left += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set):
            left += item
        elif isinstance(item, str):
            size += len(item)
        _check_length(size)
        _check_count(count + len(left))
    return value


def check_operator(operator: str, left: Any, right: Any) -> None:
    """Raise TemplateLimitError when the result would be large."""
    if operator == "%" and isinstance(left, str):
        _check_percent(left, right)
    elif operator == "*" and (hasattr(left, "__len__") or hasattr(right, "__len__")):
        thing, count = (left, right) if hasattr(left, "__len__") else (right, left)
        if isinstance(count, int):
            (_check_length if isinstance(thing, str) else _check_count)(len(thing) * count)
    elif isinstance(left, int) and isinstance(right, int):
        if operator == "*":
            _check_bits(left.bit_length() + right.bit_length())
        elif operator == "**" and right > 0:
            _check_bits(left.bit_length() * right)


def check_method(own: Any, name: str, args: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, ...]:
    """Raise TemplateLimitError when a method of a text or number would make something large; else its arguments."""
    if not isinstance(own, str):
        if name == "to_bytes":
            raise TemplateLimitError("bytes are not available to chat templates")
        return args
    given = [*args, *named.values()]
    if name in ("center", "ljust", "rjust", "zfill"):
        _check_length(max(filter(_is_int, given), default=0))
    elif name == "expandtabs":
        _check_length(len(own) + own.count("\t") * max(filter(_is_int, given), default=8))
    elif name == "replace" and len(args) > 1:
        _check_replace(own, args[0], args[1])
    elif name == "translate" and given and isinstance(given[0], Mapping):
        _check_length(len(own) * max((len(v) for v in given[0].values() if isinstance(v, str)), default=1))
    elif name == "join" and args:
        texts = list(args[0])
        _check_joined(own, texts)
        return (texts, *args[1:])
    return args


class BoundedFormat:
    """`str.format` and `str.format_map` as jinja2's sandbox has them, with bounded widths."""

    def __init__(self, sandbox: SandboxedEnvironment, text: str, name: str) -> None:
        self._formatter = (
            _MarkupFormatter(sandbox, escape=text.escape) if isinstance(text, Markup) else _TextFormatter(sandbox)
        )
        self._text = text
        self._map = name == "format_map"

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        """The text with its fields filled in."""
        if self._map:
            (kwargs,), args = args, ()
        return type(self._text)(self._formatter.vformat(self._text, args, kwargs))


class _BoundedFields(Formatter):
    _size = 0

    def format_field(self, value: Any, format_spec: str) -> Any:
        _check_digits(format_spec)
        text = super().format_field(check_written(value), format_spec)
        self._size += len(text)
        _check_length(self._size)
        return text


class _TextFormatter(_BoundedFields, SandboxedFormatter):
    pass


class _MarkupFormatter(_BoundedFields, SandboxedEscapeFormatter):
    pass


def concat(parts: Iterable[str]) -> str:
    """The parts in one string."""
    texts = list(parts)
    _check_length(sum(map(len, texts)))
    return "".join(texts)


def join_parts(*parts: Any) -> str:
    """What `~` gives."""
    return concat(str(check_written(part)) for part in parts)


def join_items(separator: Any, items: Iterable[Any]) -> str:
    """What the filter `join` gives."""
    texts = [str(check_written(item)) for item in islice(items, MAX_ITEMS + 1)]
    _check_count(len(texts))
    _check_joined(str(separator), texts)
    return str(separator).join(texts)


def _replace(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = str(check_written(text)), str(old), str(new)
    _check_replace(text, old, new)
    return text.replace(old, new, -1 if count is None else count)


def _indent(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> Any:
    wide = width if isinstance(width, int) else len(width)
    _check_length(len(text) + (text.count("\n") + 1) * wide)
    return JINJA_FILTERS["indent"](text, width, first, blank)


def _center(value: Any, width: int = 80) -> Any:
    _check_length(width)
    return JINJA_FILTERS["center"](value, width)


@jinja2.pass_environment
def _wordwrap(
    environment: jinja2.Environment,
    s: str,
    width: int = 79,
    break_long_words: bool = True,
    wrapstring: str | None = None,
    break_on_hyphens: bool = True,
) -> str:
    if isinstance(width, int) and width > 0:
        _check_length(len(s) + (s.count("\n") + s.count(" ") + len(s) // width) * len(wrapstring or ""))
    return JINJA_FILTERS["wordwrap"](environment, s, width, break_long_words, wrapstring, break_on_hyphens)


def _format(value: str, *args: Any, **kwargs: Any) -> Any:
    _check_percent(str(value), kwargs or args)
    return JINJA_FILTERS["format"](value, *args, **kwargs)


def _batch(value: Iterable[Any], linecount: int, fill_with: Any = None) -> Any:
    _check_count(linecount)
    return JINJA_FILTERS["batch"](value, linecount, fill_with)


@jinja2.pass_eval_context
def _slice(context: Any, value: Any, slices: int, fill_with: Any = None) -> Any:
    _check_count(slices)
    return JINJA_FILTERS["slice"](context, value, slices, fill_with)


def _round(value: float, precision: int = 0, method: Any = "common") -> Any:
    if abs(precision) > 300:
        raise TemplateLimitError("round takes a precision of at most 300")
    return JINJA_FILTERS["round"](value, precision, method)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | str | None = None, **options: Any) -> str:
    """JSON as chat templates expect it: no HTML escapes."""
    if indent is not None and not 0 <= (indent if isinstance(indent, int) else len(indent)) <= 16:
        raise TemplateLimitError("tojson takes an indent of 0 to 16")
    return json.dumps(check_written(value), ensure_ascii=ensure_ascii, indent=indent, **options)


def _written(name: str) -> Callable[..., Any]:
    """A filter of jinja2 that writes its value out."""

    @wraps(JINJA_FILTERS[name])
    def function(value: Any, *args: Any, **kwargs: Any) -> Any:
        return JINJA_FILTERS[name](check_written(value), *args, **kwargs)

    return function


def _itemised(name: str) -> Callable[..., Any]:
    """A filter of jinja2 that makes a list of the characters of a text."""

    @wraps(JINJA_FILTERS[name])
    def function(*args: Any, **kwargs: Any) -> Any:
        _check_count(max((len(value) for value in args if isinstance(value, str)), default=0))
        return JINJA_FILTERS[name](*args, **kwargs)

    return function


def take_slice(value: Any, start: Any, stop: Any, step: Any) -> Any:
    """`value[start:stop:step]`."""
    return value[start:stop:step]


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(str(check_written(message)))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(str(pattern)[:100])


FILTERS: Mapping[str, Callable[..., Any]] = {
    "replace": _replace,
    "indent": _indent,
    "center": _center,
    "wordwrap": _wordwrap,
    "format": _format,
    "batch": _batch,
    "slice": _slice,
    "round": _round,
    "tojson": _tojson,
    **{name: _written(name) for name in ("string", "pprint", "trim", "upper", "lower", "escape", "e", "forceescape")},
    **{name: _itemised(name) for name in ("sort", "list", "unique", "reverse", "groupby", "first")},
    **{name: _written(name) for name in ("capitalize", "title", "striptags", "urlencode", "wordcount", "safe")},
}
FUNCTIONS: Mapping[str, Callable[..., Any]] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}


def _is_int(value: Any) -> bool:
    return isinstance(value, int)


def _check_length(length: int) -> None:
    if length > MAX_TEXT:
        raise TemplateLimitError("the text is too long")


def _check_count(count: int) -> None:
    if count > MAX_ITEMS:
        raise TemplateLimitError("the list is too long")


def _check_bits(bits: int) -> None:
    if bits > MAX_BITS:
        raise TemplateLimitError("the number is too large")


def _check_digits(spec: str) -> None:
    if any(int(digits) > MAX_WIDTH for digits in re.findall(r"[0-9]+", spec)):
        raise TemplateLimitError(f"a format takes a width of at most {MAX_WIDTH}")


def _check_joined(separator: str, texts: list[Any]) -> None:
    _check_length(sum(len(text) for text in texts if isinstance(text, str)) + len(texts) * len(separator))


def _check_replace(text: str, old: Any, new: Any) -> None:
    if isinstance(old, str) and isinstance(new, str):
        _check_length(len(text) + (text.count(old) if old else len(text) + 1) * len(new))


def _check_percent(text: str, values: Any) -> None:
    """A width that stands in the values is refused: nothing needs it."""
    fields = _PERCENT.findall(text)
    if "*" in (width for field in fields for width in field):
        raise TemplateLimitError("a format takes no width from its values")
    _check_digits(" ".join(width for field in fields for width in field))
    written = [str(check_written(value)) for value in _values_of(values)]
    _check_length(len(text) + len(fields) * (MAX_WIDTH if any(map(any, fields)) else 0))
    named = isinstance(values, Mapping)
    _check_length(len(text) + (len(fields) * max(map(len, written), default=0) if named else sum(map(len, written))))


def _values_of(values: Any) -> list[Any]:
    if isinstance(values, Mapping):
        return [*values.values(), values]
    return list(values) if isinstance(values, tuple) else [values]
