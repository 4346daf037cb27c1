"""JSON schemas of requests, as far as this program looks into them itself; llguidance holds texts to them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from svdengine.errors import RequestError

MAX_DEPTH = 64  # of schemas in schemas

# Between the tokens of JSON: nothing, a space, or a new line with its indent. Unbounded space would let a small model
# go on with it for ever.
WHITE_SPACE = r"(\n {0,32}| )?"

# What the standard defines. Any other format is a note to people, such as OpenAPI's int32 and password.
_FORMATS = frozenset(
    (
        *("date-time", "date", "time", "duration", "email", "idn-email", "hostname", "idn-hostname", "ipv4", "ipv6"),
        *("uri", "uri-reference", "iri", "iri-reference", "uri-template", "uuid"),
        *("json-pointer", "relative-json-pointer", "regex"),
    )
)
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # schemas under any names
_DATA = ("const", "enum", "default", "examples", "x-guidance")  # values, not schemas


def schema_text(schema: Mapping[str, Any]) -> str:
    """A schema as llguidance reads it, with how much white space its values may have.

    Left out is what changes nothing and llguidance would refuse. Raises RequestError when it cannot be written as JSON.
    """
    try:
        return json.dumps({**_held(schema), "x-guidance": {"whitespace_pattern": WHITE_SPACE}})
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"the JSON schema cannot be written as JSON: {error}") from error


def subschemas(schema: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The schema and all those in it, each with a JSON pointer to it."""
    if isinstance(schema, list):
        for i, item in enumerate(schema):
            yield from subschemas(item, f"{path}/{i}")
    if not isinstance(schema, Mapping):
        return
    yield path, schema
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, Mapping):
            for name, item in value.items():
                yield from subschemas(item, f"{path}/{key}/{name}")
        elif key not in _DATA:
            yield from subschemas(value, f"{path}/{key}")


def _held(schema: Any, depth: int = 0) -> Any:
    if depth > MAX_DEPTH:
        raise RequestError(f"the JSON schema is nested more than {MAX_DEPTH} deep")
    if isinstance(schema, list):
        return [_held(item, depth + 1) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    kept = {}
    for key, value in schema.items():
        if _changes_nothing(key, value):
            continue
        if key in _NAMED and isinstance(value, Mapping):
            kept[key] = {name: _held(item, depth + 1) for name, item in value.items()}
        else:
            kept[key] = value if key in _DATA else _held(value, depth + 1)
    return kept


def _changes_nothing(key: str, value: Any) -> bool:
    if key == "format":
        return isinstance(value, str) and value not in _FORMATS
    return key in ("uniqueItems", "deprecated") and not value
