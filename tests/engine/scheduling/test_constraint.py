"""Constrained decoding: whatever the model, the text fits the grammar."""

import json
import re
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import CHATML, make_tokenizer, write_tiny_model

import svdengine
from svdengine import LLM, RequestError, SamplingParams
from svdengine.scheduling.constraint import ConstraintMaker
from svdengine.scheduling.sampler import Sampler
from svdengine.text.grammar import Grammar, json_grammar, read_response_format
from svdengine.text.tool_calls import Tool, tool_grammar

pytest.importorskip("llguidance", reason="llguidance, which follows grammars, is not installed")

KINDS = ("byte_level", "llama", "llama_first", "sentencepiece")
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "blue", "grün"]},
        "fine": {"type": "boolean"},
        "parts": {"type": "array", "items": {"const": "x"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["colour", "fine", "parts"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}


def fits(value: Any) -> bool:
    return (
        set(value) == {"colour", "fine", "parts"}
        and value["colour"] in ("red", "blue", "grün")
        and isinstance(value["fine"], bool)
        and 1 <= len(value["parts"]) <= 3
        and set(value["parts"]) == {"x"}
    )


MAKERS = {kind: (make_tokenizer(kind), ConstraintMaker(make_tokenizer(kind), 0x1000)) for kind in KINDS}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = write_tiny_model(tmp_path_factory.mktemp("constraint") / "tiny.svdp")
    with svdengine.load(path, device="reference", context=256) as llm:
        yield llm


@settings(max_examples=25, deadline=None)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**32), temperature=st.sampled_from([0.0, 1.0, 5.0]))
def test_any_model_writes_what_fits(kind: str, seed: int, temperature: float) -> None:
    tokenizer, maker = MAKERS[kind]
    constraint = maker.make(json_grammar(SCHEMA))
    random = np.random.default_rng(seed)
    sampler = Sampler(SamplingParams(temperature=temperature, top_p=0.9, seed=seed), 0x1000, (), constraint)
    tokens: list[int] = []
    while not constraint.complete:
        assert len(tokens) < 300
        tokens.append(sampler.sample(random.standard_normal(0x1000).astype(np.float32)))
    text = b"".join(map(tokenizer.token_bytes, tokens)).decode()
    assert fits(json.loads(text)), text
    assert set(constraint.allowed().tolist()) == set(tokenizer.eos_token_ids)


def test_a_model_is_held_to_a_schema(llm: LLM) -> None:
    for temperature in (0, 30):
        done = llm.generate("hello", temperature=temperature, seed=1, max_tokens=200, response_format=FORMAT)[0]
        assert done.finish_reason == "stop" and fits(json.loads(done.text))
    chat = llm.chat([{"role": "user", "content": "x"}], temperature=0, max_tokens=200, response_format=FORMAT)
    assert fits(json.loads(chat.text))
    greedy = llm.chat([{"role": "user", "content": "x"}], temperature=0, max_tokens=200, response_format=FORMAT)
    assert greedy.token_ids == chat.token_ids


def test_no_executor_chooses_a_token_past_a_constraint() -> None:
    _, maker = MAKERS["byte_level"]
    assert Sampler(SamplingParams(), 0x1000).choice() is not None
    assert Sampler(SamplingParams(), 0x1000, (), maker.make(json_grammar(SCHEMA))).choice() is None


def test_requests_with_and_without_a_grammar_run_together(llm: LLM) -> None:
    free = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    held = SamplingParams(temperature=0, max_tokens=200, response_format=FORMAT)
    alone = llm.generate("hello", free)[0].token_ids
    first, second, third = llm.generate(["hello"] * 3, [held, free, held])
    assert second.token_ids == alone and first.token_ids == third.token_ids and fits(json.loads(first.text))


def test_a_text_that_is_cut_says_so(llm: LLM) -> None:
    done = llm.generate("hello", temperature=0, max_tokens=3, response_format=FORMAT)[0]
    assert done.finish_reason == "length" and done.text.startswith("{")


def test_other_grammars(llm: LLM) -> None:
    done = llm.generate("hello", temperature=0, response_format=Grammar("lark", 'start: "yes" | "no"'))[0]
    assert done.text in ("yes", "no") and done.finish_reason == "stop"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("json", "must have the type"),
        ({"type": "xml"}, "must have the type"),
        ({"type": "json_schema"}, "must be a JSON schema"),
        ({"type": "json_object", "schema": 3}, "must be a JSON schema"),
        ({"type": "json_object", "schemas": {}}, "has the field 'schemas'"),
        ({"type": "json_schema", "json_schema": {"schema": "x"}}, "must be a JSON schema"),
        ({"type": "json_schema", "json_schema": {"schema": {"x": {1, 2}}}}, "cannot be written as JSON"),
    ],
)
def test_unusable_formats(value: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(response_format=value)


def test_json_objects_keep_to_their_schema() -> None:
    asked = {"type": "json_object", "schema": SCHEMA}
    assert read_response_format(asked) == read_response_format(FORMAT)
    assert read_response_format({"type": "json_schema", "schema": SCHEMA}) == read_response_format(FORMAT)
    assert read_response_format({"type": "json_object"}) == json_grammar({"type": "object"})


@pytest.mark.parametrize(
    ("part", "keyword", "place"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems", "/properties/a"),
        ({"not": {"type": "string"}}, "not", "/properties/a"),
        ({"if": {"type": "string"}, "then": False}, "if|then", "/properties/a"),
        ({"type": "array", "contains": {"const": 1}}, "contains", "/properties/a"),
        ({"type": "object", "propertyNames": {"maxLength": 3}}, "propertyNames", "/properties/a"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired", "/properties/a"),
        ({"type": "string", "pattern": "(?=a)b"}, "pattern", "/properties/a"),
        ({"type": "string", "pattern": "("}, "pattern", "/properties/a"),
        ({"type": "string", "format": "idn-hostname"}, "format", "/properties/a"),
        ({"type": "array", "items": {"type": "string", "pattern": "(a)\\1"}}, "pattern", "/properties/a/items"),
        ({"$ref": "#/$defs/A"}, "uniqueItems", "/$defs/A"),
    ],
)
def test_keywords_that_cannot_be_held_are_named(part: Any, keyword: str, place: str) -> None:
    schema = {
        "type": "object",
        "properties": {"fine": {"type": "string", "pattern": "a+"}, "a": part},
        "$defs": {"A": {"type": "array", "uniqueItems": True}},
        "required": ["a"],
    }
    tools = [Tool("fine", SCHEMA, {}), Tool("odd", schema, {})]
    named = f"has the keyword '({keyword})' at {re.escape(place)}, which cannot be held"
    for grammar, whose in (
        (json_grammar(schema), "response_format"),
        (tool_grammar(tools, required=True, several=True), "the parameters of the tool 'odd'"),
        (tool_grammar(tools[:1], required=False, several=True, answer=json_grammar(schema)), "response_format"),
    ):
        with pytest.raises(RequestError, match=f"{whose} {named}"):
            MAKERS["byte_level"][1].make(grammar)


def test_what_changes_nothing_is_left_out() -> None:
    parts = [{"type": "string", "format": name} for name in ("password", "binary", "int32", "path")]
    parts += [{"type": "array", "uniqueItems": False}, {"deprecated": True, "type": "null"}, {"default": {"format": 1}}]
    parts += [{"type": "object", "properties": {"format": {"type": "null"}, "uniqueItems": {"type": "null"}}}]
    schema = {"type": "object", "properties": {f"p{i}": part for i, part in enumerate(parts)}}
    MAKERS["byte_level"][1].make(json_grammar(schema))
    assert '"format": {"type": "null"}' in json_grammar(schema).text


def hostile_schemas() -> dict[str, dict[str, Any]]:
    letters = "abcdefghijklmnopqrst"
    choice = {"anyOf": [{"type": "object", "properties": {c: {"type": "string"}}} for c in letters]}
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(60):
        deep = {"anyOf": [deep, {"type": "array", "items": deep}]}
    return {
        "patterns": {"allOf": [{"type": "string", "pattern": f".*{c}.*"} for c in letters]},
        "properties": {"allOf": [{"properties": {"x": {"type": "string", "pattern": f".*{c}.*"}}} for c in letters]},
        "negated": {"allOf": [{"type": "string", "pattern": f"[^{c}]*{c}[^{c}]*{c}.*"} for c in letters]},
        "choices": {"allOf": [choice] * 8},
        "one of": {"allOf": [{**choice, "oneOf": choice["anyOf"]}] * 6},
        "long": {"type": "string", "pattern": "(a|b)*a(a|b){40000}"},
        "states": {"type": "string", "pattern": "(a|b)*a(a|b){18}"},
        "counted": {"type": "string", "pattern": "((a{1000}){1000}){1000}"},
        "many items": {"type": "array", "items": {"type": "string", "minLength": 3}, "minItems": 10**9},
        "deep": deep,
    }


@pytest.mark.parametrize("name", hostile_schemas())
def test_the_work_of_a_grammar_is_bounded(name: str) -> None:
    _, maker = MAKERS["byte_level"]
    begin, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        constraint = maker.make(json_grammar(hostile_schemas()[name]))
        random = np.random.default_rng(3)
        for _ in range(60):
            allowed = constraint.allowed()
            constraint.accept(int(random.choice(allowed)))
    except RequestError as error:
        assert "grammar" in str(error) or "nested" in str(error)
    assert time.process_time() - begin < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 500_000  # kB


def test_twenty_patterns_at_once_are_refused_with_the_limit() -> None:
    with pytest.raises(RequestError, match=r"compiling it was stopped, it (took|needs) more than"):
        MAKERS["byte_level"][1].make(json_grammar(hostile_schemas()["patterns"]))


def test_unusable_grammars(llm: LLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for grammar in (json_grammar({"type": "nothing"}), Grammar("lark", "start: ("), json_grammar({"$ref": "#/x"})):
        with pytest.raises(RequestError, match="the grammar cannot be used"):
            llm.generate("a", response_format=grammar)
    assert read_response_format({"type": "text"}) is None
    with svdengine.load(write_tiny_model(tmp_path / "x.svdp"), device="reference", context=64) as other:
        monkeypatch.setitem(sys.modules, "llguidance", None)
        with pytest.raises(RequestError, match=r'run: pip install "svdengine\[grammar\]"'):
            other.generate("a", response_format={"type": "json_object"})


def test_the_template_says_what_it_reads(llm: LLM) -> None:
    assert llm.chat_template.variables == {"messages", "add_generation_prompt"} and llm.chat_template.source == CHATML
