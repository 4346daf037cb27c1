"""Constrained decoding: whatever the model, the text fits the grammar."""

import json
import sys
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
        ({"type": "json_schema", "json_schema": {"schema": "x"}}, "must be a JSON schema"),
        ({"type": "json_schema", "json_schema": {"schema": {"x": {1, 2}}}}, "cannot be written as JSON"),
    ],
)
def test_unusable_formats(value: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(response_format=value)


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
