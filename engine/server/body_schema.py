"""What a JSON body may hold: JSON schemas that check it, and that /openapi.json shows.

Of JSON Schema there is what the builders here make. Each alternative of `either` has a JSON type of its own, and each
of `tagged` a value of its own in one field, so that an error can say what is wrong and where.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from svdengine.server.api_error import ApiError, unsupported

Schema = dict[str, Any]

_UNSUPPORTED = "x-unsupported"  # fields that the interface has elsewhere, and not here
_TAG = "x-tag"
_DEFAULT_TAG = "x-default-tag"

_KINDS: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "array": (list,),
    "object": (dict,),
}
_SAID = {
    "string": "a string",
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "array": "a list",
    "object": "an object",
}

ANY: Schema = {}


def text(shortest: int = 0) -> Schema:
    """A string."""
    return {"type": "string", "minLength": shortest} if shortest else {"type": "string"}


def choice(*values: str) -> Schema:
    """One of some strings."""
    return {"type": "string", "enum": list(values)}


def flag() -> Schema:
    """True or false."""
    return {"type": "boolean"}


def constant(value: bool) -> Schema:
    """True or false, and only one of them."""
    return {"type": "boolean", "enum": [value]}


def whole(low: int, high: int) -> Schema:
    """A whole number of a range."""
    return {"type": "integer", "minimum": low, "maximum": high}


def number(low: float, high: float) -> Schema:
    """A number of a range."""
    return {"type": "number", "minimum": low, "maximum": high}


def listing(items: Schema, shortest: int = 0, longest: int | None = None) -> Schema:
    """A list."""
    most = {} if longest is None else {"maxItems": longest}
    return {"type": "array", "items": items, "minItems": shortest, **most}


def mapping(values: Schema = ANY) -> Schema:
    """An object with any names."""
    return {"type": "object", "additionalProperties": values}


def record(fields: Mapping[str, Schema], required: Sequence[str] = (), unsupported: Sequence[str] = ()) -> Schema:
    """An object with these fields and no others. Null stands for one that is not given."""
    known = {"type": "object", "properties": dict(fields), "required": list(required), "additionalProperties": False}
    return {**known, _UNSUPPORTED: list(unsupported)} if unsupported else known


def either(*alternatives: Schema) -> Schema:
    """One of several, each of another JSON type."""
    return {"anyOf": list(alternatives)}


def tagged(tag: str, default: str | None = None, /, **alternatives: Schema) -> Schema:
    """Records that a field tells apart; `default`: what it means when that is not given."""
    schemas = []
    for name, schema in alternatives.items():
        fields = {tag: choice(name), **schema["properties"]}
        required = schema["required"] if name == default else [tag, *schema["required"]]
        schemas.append({**schema, "properties": fields, "required": required})
    found = {"oneOf": schemas, _TAG: tag}
    return found if default is None else {**found, _DEFAULT_TAG: default}


def read(value: Any, schema: Schema, where: str = "") -> Any:
    """The value, without fields that are null. Raises ApiError, which names the field, when it does not fit.

    `where`: what the value is called; the body itself has no name.
    """
    if "anyOf" in schema:
        return read(value, _alternative(value, schema["anyOf"], where), where)
    if "oneOf" in schema:
        return read(value, _tagged_schema(value, schema, where), where)
    kind = schema.get("type")
    if kind is None:
        return value
    if not _is(value, kind):
        raise ApiError(400, f"{where or 'the body'} must be {_SAID[kind]}, found {_said(value)}", where or None)
    if kind == "object":
        return _read_object(value, schema, where)
    if kind == "array":
        return _read_list(value, schema, where)
    _check_value(value, schema, where)
    return value


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, _KINDS[kind]) and (not isinstance(value, bool) or kind == "boolean")


def _said(value: Any) -> str:
    return "null" if value is None else next((_SAID[kind] for kind in _KINDS if _is(value, kind)), "nothing known")


def _check_value(value: Any, schema: Schema, where: str) -> None:
    if "enum" in schema and value not in schema["enum"]:
        # True and false as JSON has them.
        values = ", ".join(str(each).lower() if isinstance(each, bool) else repr(each) for each in schema["enum"])
        wanted = values if len(schema["enum"]) == 1 else f"one of {values}"
        raise ApiError(400, f"{where} must be {wanted}, found {value!r:.100}", where, "invalid_value")
    if "minimum" in schema and not schema["minimum"] <= value <= schema["maximum"]:
        message = f"{where} must lie between {schema['minimum']} and {schema['maximum']}, found {value!r:.100}"
        raise ApiError(400, message, where, "invalid_value")
    if len(value) < schema.get("minLength", 0) if isinstance(value, str) else False:
        raise ApiError(400, f"{where} must not be empty", where, "invalid_value")


def _read_list(value: list[Any], schema: Schema, where: str) -> list[Any]:
    fewest, most = schema["minItems"], schema.get("maxItems", len(value))
    if len(value) < fewest:
        raise ApiError(400, f"{where} is empty" if not value else f"{where} must have {fewest} items", where)
    if len(value) > most:
        raise ApiError(400, f"{where} may have {most} items, found {len(value)}", where, "invalid_value")
    return [read(item, schema["items"], f"{where}[{i}]") for i, item in enumerate(value)]


def _read_object(value: dict[str, Any], schema: Schema, where: str) -> dict[str, Any]:
    fields, others = schema.get("properties", {}), schema["additionalProperties"]
    if others is not False:
        return {name: read(item, others, _inside(where, name)) for name, item in value.items()}
    found = {}
    for name, item in value.items():
        if item is None:
            continue
        if name in schema.get(_UNSUPPORTED, ()):
            raise unsupported(_inside(where, name))
        if name not in fields:
            place = _inside(where, name)[:200]
            raise ApiError(400, f"{place!r} is not a field of this request", place, "unknown_parameter")
        found[name] = read(item, fields[name], _inside(where, name))
    for name in schema["required"]:
        if name not in found:
            place = _inside(where, name)
            raise ApiError(400, f"{place} is missing", place, "missing_required_parameter")
    return found


def _inside(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _alternative(value: Any, alternatives: Sequence[Schema], where: str) -> Schema:
    for schema in alternatives:
        if _is(value, schema.get("type", "object")):
            return schema
    kinds = " or ".join(_SAID[schema.get("type", "object")] for schema in alternatives)
    raise ApiError(400, f"{where} must be {kinds}, found {_said(value)}", where)


def _tagged_schema(value: Any, schema: Schema, where: str) -> Schema:
    if not isinstance(value, dict):
        raise ApiError(400, f"{where} must be an object, found {_said(value)}", where)
    tag = schema[_TAG]
    given = value.get(tag)
    name = schema.get(_DEFAULT_TAG) if given is None else given
    names = []
    for each in schema["oneOf"]:
        (known,) = each["properties"][tag]["enum"]
        if known == name:
            return each
        names.append(known)
    place = _inside(where, tag)
    if name is None:
        raise ApiError(400, f"{place} is missing", place, "missing_required_parameter")
    raise unsupported(place, f" as {name!r:.100}; there is {', '.join(names)}")
