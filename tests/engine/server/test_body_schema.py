"""Schemas of bodies: what they accept is what JSON Schema accepts, and what they refuse is named."""

from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svdengine.server import messages_fields, ollama_fields, responses_fields
from svdengine.server.api_error import ApiError
from svdengine.server.body_schema import (
    ANY,
    choice,
    constant,
    either,
    flag,
    listing,
    mapping,
    number,
    read,
    record,
    tagged,
    text,
    whole,
)

NAMES = st.sampled_from(["a", "b", "kind", "c"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([0.5, 10**400, "", "x", "one", "two"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
LEAVES = st.sampled_from(
    [text(), text(1), choice("one", "two"), flag(), constant(False), whole(0, 2), number(-1, 1), mapping(), ANY]
)
RECORDS = st.builds(
    lambda fields, needed: record(fields, [name for name in fields if needed]),
    st.dictionaries(st.sampled_from(["a", "b"]), LEAVES, max_size=2),
    st.booleans(),
)
SCHEMAS = st.one_of(
    LEAVES,
    RECORDS,
    st.builds(listing, LEAVES | RECORDS, st.integers(0, 1), st.none() | st.integers(1, 2)),
    st.builds(either, st.just(text()), st.builds(listing, LEAVES)),
    st.builds(lambda one, two: tagged("kind", one=one, two=two), RECORDS, RECORDS),
    st.builds(lambda one, two: tagged("kind", "one", one=one, two=two), RECORDS, RECORDS),
    st.builds(mapping, LEAVES),
)


def without_nulls(value: Any) -> Any:
    """As the server reads it: null stands for a field that is not given, where fields are known."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


@settings(max_examples=400, deadline=None)
@given(SCHEMAS, VALUES)
def test_it_accepts_what_json_schema_accepts(schema: Any, value: Any) -> None:
    value = without_nulls(value)
    try:
        found = read(value, schema)
        accepted = True
    except ApiError as error:
        accepted = False
        assert error.status == 400 and error.message
    assert accepted == jsonschema_rs.is_valid(schema, value), (schema, value)
    assert not accepted or found == value


def test_all_schemas_of_the_server_are_schemas() -> None:
    for module in (responses_fields, messages_fields, ollama_fields):
        for name, schema in vars(module).items():
            if name.isupper() and isinstance(schema, dict) and "properties" in schema:
                jsonschema_rs.meta.validate(schema)
                assert not jsonschema_rs.is_valid(schema, {"no such field": 1}), name


NESTED = record(
    {
        "items": listing(tagged("type", "text", text=record({"text": text(1)}, ["text"]), more=record({}))),
        "limit": whole(1, 5),
        "mode": choice("fast", "slow"),
        "off": constant(False),
        "stop": either(text(), listing(text())),
    },
    ["items"],
    unsupported=["audio"],
)


@pytest.mark.parametrize(
    ("value", "param", "message"),
    [
        ([], None, "the body must be an object, found a list"),
        ({}, "items", "items is missing"),
        ({"items": None}, "items", "items is missing"),
        ({"items": {}}, "items", "items must be a list, found an object"),
        ({"items": [3]}, "items[0]", "items[0] must be an object"),
        ({"items": [{"text": "a"}, {"text": ""}]}, "items[1].text", "items[1].text must not be empty"),
        ({"items": [{"type": "audio"}]}, "items[0].type", "not supported as 'audio'; there is text, more"),
        ({"items": [{"type": []}]}, "items[0].type", "not supported as []"),
        ({"items": [], "limit": 6}, "limit", "limit must lie between 1 and 5, found 6"),
        ({"items": [], "limit": True}, "limit", "limit must be a whole number, found true or false"),
        ({"items": [], "limit": 2.0}, "limit", "limit must be a whole number, found a number"),
        ({"items": [], "limit": 10**4200}, "limit", "must lie between"),
        ({"items": [], "mode": "odd"}, "mode", "mode must be one of 'fast', 'slow', found 'odd'"),
        ({"items": [], "off": True}, "off", "off must be false, found True"),
        ({"items": [], "stop": 3}, "stop", "stop must be a string or a list, found a whole number"),
        ({"items": [], "stop": ["a", 3]}, "stop[1]", "stop[1] must be a string"),
        ({"items": [], "audio": 1}, "audio", "audio is not supported"),
        ({"items": [], "x" * 5000: 1}, "x" * 200, "is not a field of this request"),
    ],
)
def test_errors_name_the_place(value: Any, param: str | None, message: str) -> None:
    with pytest.raises(ApiError) as raised:
        read(value, NESTED)
    assert raised.value.param == param and message in raised.value.message and len(raised.value.message) < 400


def test_null_stands_for_what_is_not_given() -> None:
    assert read({"items": [{"type": None, "text": "a"}], "stop": None}, NESTED) == {"items": [{"text": "a"}]}
    assert read({"a": None}, mapping()) == {"a": None}
