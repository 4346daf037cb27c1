"""Grammars that an answer must keep to: what may be asked for. `constraint` applies them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from svdengine.errors import RequestError, shown

# Between the tokens of JSON: nothing, a space, or a new line with its indent. Unbounded space would let a small model
# go on with it for ever.
WHITE_SPACE = r"(\n {0,32}| )?"


@dataclass(frozen=True)
class Grammar:
    """What a text must keep to.

    kind: json_schema, or lark: a grammar in llguidance's dialect of Lark.
    text: the schema as JSON, or the grammar.
    """

    kind: Literal["json_schema", "lark"]
    text: str


def read_response_format(value: Any) -> Grammar | None:
    """The grammar of an OpenAI `response_format`: text (None), json_object, or json_schema with its schema.

    A Grammar is taken as it is. Raises RequestError on anything else.
    """
    if value is None or isinstance(value, Grammar):
        return value
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return json_grammar({"type": "object"})
    if kind != "json_schema":
        raise RequestError(f"response_format must have the type text, json_object or json_schema, found {shown(value)}")
    named = value.get("json_schema")
    schema = named.get("schema") if isinstance(named, Mapping) else None
    if not isinstance(schema, Mapping):
        raise RequestError("response_format.json_schema.schema must be a JSON schema, an object")
    return json_grammar(schema)


def json_grammar(schema: Mapping[str, Any]) -> Grammar:
    """The grammar of JSON values that fit a schema. Raises RequestError when that cannot be written as JSON."""
    return Grammar("json_schema", schema_text(schema))


def schema_text(schema: Mapping[str, Any]) -> str:
    """A schema as text, with how much white space its values may have."""
    try:
        return json.dumps({**schema, "x-guidance": {"whitespace_pattern": WHITE_SPACE}})
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"the JSON schema cannot be written as JSON: {error}") from error
