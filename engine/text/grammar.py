"""Grammars that an answer must keep to: what may be asked for. `constraint` applies them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from svdengine.errors import RequestError, shown
from svdengine.text.json_schema import schema_text

_FORMAT_FIELDS = ("type", "schema", "json_schema", "name", "description", "strict")


@dataclass(frozen=True)
class Grammar:
    """What a text must keep to.

    kind: json_schema, or lark: a grammar in llguidance's dialect of Lark.
    text: the schema as JSON, or the grammar.
    schemas: the JSON schemas that stand in it, each with whose it is, for messages.
    """

    kind: Literal["json_schema", "lark"]
    text: str
    schemas: tuple[tuple[str, str], ...] = ()


def read_response_format(value: Any) -> Grammar | None:
    """The grammar of an OpenAI `response_format`: text (None), json_object, or json_schema with its schema.

    json_object takes a schema too, as other servers do. A Grammar is taken as it is. Raises RequestError on anything
    else.
    """
    if value is None or isinstance(value, Grammar):
        return value
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "text":
        return None
    if kind not in ("json_object", "json_schema"):
        raise RequestError(f"response_format must have the type text, json_object or json_schema, found {shown(value)}")
    unknown = [name for name in value if name not in _FORMAT_FIELDS]
    if unknown:
        known = ", ".join(_FORMAT_FIELDS)
        raise RequestError(f"response_format has the field {unknown[0]!r:.100}; known are {known}")
    named = value.get("json_schema")
    schema = value.get("schema", named.get("schema") if isinstance(named, Mapping) else named)
    if schema is None and kind == "json_object":
        schema = {"type": "object"}
    if not isinstance(schema, Mapping):
        where = "json_schema.schema" if "schema" not in value else "schema"
        raise RequestError(f"response_format.{where} must be a JSON schema, an object")
    return json_grammar(schema)


def json_grammar(schema: Mapping[str, Any]) -> Grammar:
    """The grammar of JSON values that fit a schema. Raises RequestError when that cannot be written as JSON."""
    text = schema_text(schema)
    return Grammar("json_schema", text, (("response_format", text),))
