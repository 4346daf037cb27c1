"""Tool calls: the prompt, the grammar, the reader, and the whole over HTTP with OpenAI's client."""

import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from live_server import LiveServer, live_server
from openai import BadRequestError, OpenAI
from patience import PATIENCE
from tiny_model import CHATML, make_tokenizer, write_tiny_model

from svdengine.errors import RequestError
from svdengine.scheduling.constraint import ConstraintMaker
from svdengine.server import event_stream
from svdengine.text.chat_template import ChatTemplate
from svdengine.text.grammar import Grammar, json_grammar
from svdengine.text.tool_calls import Tool, ToolCall, ToolCallReader, tool_grammar, tool_prompt

pytest.importorskip("llguidance", reason="llguidance, which follows grammars, is not installed")

WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "tomorrow": {"type": "boolean"}},
    "required": ["city", "tomorrow"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "the weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "time"}},
]
HELLO: list[Any] = [{"role": "user", "content": "hello"}]
HISTORY: list[Any] = [
    *HELLO,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}},
            {"id": "2", "type": "function", "function": {"name": "time", "arguments": ""}},
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "rain"},
    {"role": "tool", "tool_call_id": "2", "content": "noon"},
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "tomorrow": true}}\n</tool_call>'
NATIVE = (
    "{% if tools %}TOOLS:{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls %}<tool_call>{{ c.function.arguments | tojson }}</tool_call>{% endfor %}{% endfor %}"
)

MAKER = ConstraintMaker(make_tokenizer("byte_level"), 400)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("tools")
    write_tiny_model(folder / "tiny.svdp", max_position=2048)
    with live_server(folder, context=2048) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: LiveServer) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)


def read(pieces: list[str]) -> tuple[str, list[ToolCall]]:
    reader = ToolCallReader()
    said, calls = "", []
    for piece in pieces:
        text, found = reader.push(piece)
        said += text
        calls += found
    said += reader.flush()
    assert calls == reader.calls
    return said, calls


@pytest.mark.parametrize(
    ("text", "said", "count"),
    [
        ("hello", "hello", 0),
        ("a < b and <tool", "a < b and <tool", 0),
        (CALL, "", 1),
        (f"Let me see.\n\n{CALL}", "Let me see.", 1),
        (f"{CALL}\n{CALL}\n", "", 2),
        ("x <tool_call>\nnot JSON\n</tool_call> y", "x <tool_call>\nnot JSON\n</tool_call> y", 0),
        ('<tool_call>\n{"name": "wea', '<tool_call>\n{"name": "wea', 0),
        (" \n ", " \n ", 0),
    ],
)
@given(data=st.data())
def test_the_reader_sees_the_same_however_the_text_is_cut(text: str, said: str, count: int, data: Any) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    found, calls = read(pieces)
    assert (found, len(calls)) == (said, count)
    assert all(c == ToolCall("weather", '{"city": "Oslo", "tomorrow": true}') for c in calls)


def test_prompts_for_templates_without_tools() -> None:
    tools = [Tool(t["function"]["name"], {}, t) for t in TOOLS]
    template = ChatTemplate(CHATML, make_tokenizer("byte_level"))
    messages: list[Any] = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "time", "arguments": {}}}]},
        {"role": "tool", "content": "noon"},
        {"role": "tool", "content": "one"},
    ]
    told, variables = tool_prompt(messages, tools, template)
    assert variables == {} and [m["role"] for m in told] == ["system", "user", "assistant", "user"]
    assert told[0]["content"].startswith("be kind\n\n") and '"name": "weather"' in told[0]["content"]
    assert told[2]["content"] == '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
    assert told[3]["content"].count("<tool_response>") == 2
    template.render(told)
    assert [m["role"] for m in tool_prompt(messages[1:], tools, template)[0]][:2] == ["system", "user"]
    assert "system" not in [m["role"] for m in tool_prompt(messages[1:], [], template)[0]]


def test_prompts_for_templates_that_know_tools() -> None:
    tools = [Tool(t["function"]["name"], {}, t) for t in TOOLS]
    template = ChatTemplate(NATIVE, make_tokenizer("byte_level"))
    messages: list[Any] = [{"role": "assistant", "content": "", "tool_calls": [{"function": {"arguments": {"a": 1}}}]}]
    told, variables = tool_prompt(messages, tools, template)
    text = template.render(told, **variables).plain
    assert text.startswith(f"TOOLS:{json.dumps(TOOLS)}") and '<tool_call>{"a": 1}</tool_call>' in text
    assert template.render(*tool_prompt(messages, [], template)[:1]).plain.startswith("<assistant>")


@pytest.mark.parametrize(
    ("required", "several", "text", "refused"),
    [
        (False, True, "hello <tool", None),
        (False, True, f"hello\n{CALL}", None),
        (False, True, f"{CALL}\n{CALL}", None),
        (False, True, "hello <tool_call> not JSON", " not JSON"),
        (False, True, CALL.replace("Oslo", "Bonn"), "Bonn"),
        (False, True, CALL + "bye", "bye"),
        (False, False, f"{CALL}\n{CALL}", f"\n{CALL}"),
        (True, True, CALL, None),
        (True, True, "hello", "hello"),
        (True, False, f"{CALL}\n{CALL}", f"\n{CALL}"),
    ],
)
def test_what_the_model_may_write(required: bool, several: bool, text: str, refused: str | None) -> None:
    tokenizer = make_tokenizer("byte_level")
    tools = [Tool("weather", WEATHER, TOOLS[0])]
    constraint = MAKER.make(tool_grammar(tools, required=required, several=several))
    written = b""
    for token in tokenizer.encode(text):
        if token not in constraint.allowed():
            break
        constraint.accept(token)
        written += tokenizer.token_bytes(token)
    else:
        assert refused is None and 3 in constraint.allowed()  # the end token
        return
    assert refused is not None
    assert text.rindex(refused) - 1 <= len(written) < text.rindex(refused) + len(refused)


NODE: dict[str, Any] = {
    "type": "object",
    "properties": {"value": {"type": "integer"}, "next": {"$ref": "#"}},
    "required": ["value"],
    "additionalProperties": False,
}
POINTERS: dict[str, dict[str, Any]] = {
    "root": NODE,
    "root in a list": {
        "type": "object",
        "properties": {"children": {"type": "array", "items": {"$ref": "#"}}},
        "additionalProperties": False,
    },
    "$defs": {
        "$defs": {"A": {"enum": ["x"]}, "B": {"type": "array", "items": {"$ref": "#/$defs/A"}}},
        "properties": {"b": {"$ref": "#/$defs/B"}},
        "required": ["b"],
        "additionalProperties": False,
    },
    "definitions": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "definitions": {"a/b~c": {"type": "boolean"}},
        "properties": {"b": {"$ref": "#/definitions/a~1b~0c"}},
        "required": ["b"],
        "additionalProperties": False,
    },
    "all by name": {"$ref": "#/$defs/All", "$defs": {"All": {"properties": {"b": {"const": 1}}, "required": ["b"]}}},
    "a property": {
        "properties": {"a": {"type": "integer"}, "b": {"$ref": "#/properties/a"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
    "data that looks like one": {
        "properties": {"$ref": {"const": {"$ref": "#/nowhere"}}},
        "required": ["$ref"],
        "additionalProperties": False,
    },
}


@pytest.mark.parametrize(
    ("name", "fits", "refused"),
    [
        ("root", '{"value": 1, "next": {"value": 2}}', '{"value": 1, "next": {"name": 2}}'),
        ("root in a list", '{"children": [{"children": []}]}', '{"children": [{"x": []}]}'),
        ("$defs", '{"b": ["x", "x"]}', '{"b": ["y"]}'),
        ("definitions", '{"b": true}', '{"b": 1}'),
        ("all by name", '{"b": 1}', '{"b": 2}'),
        ("a property", '{"a": 1, "b": 2}', '{"a": 1, "b": "x"}'),
        ("data that looks like one", '{"$ref": {"$ref": "#/nowhere"}}', '{"$ref": {"$ref": "#"}}'),
    ],
)
def test_pointers_keep_their_meaning(name: str, fits: str, refused: str) -> None:
    tools = [Tool("weather", WEATHER, {}), Tool("walk", POINTERS[name], {})]
    grammar = tool_grammar(tools, required=True, several=False)
    for arguments, good in ((fits, True), (refused, False), ("3", False)):
        text = f'<tool_call>\n{{"name": "walk", "arguments": {arguments}}}\n</tool_call>'
        assert may_be_written(grammar, text) == good, arguments


def test_a_call_or_an_answer_that_fits() -> None:
    answer = json_grammar({"type": "object", "properties": {"a": {"$ref": "#/$defs/x"}}, "required": ["a"],
                           "additionalProperties": False, "$defs": {"x": {"enum": ["<tool_call>", "b"]}}})  # fmt: skip
    tools = [Tool("weather", WEATHER, {})]
    for required in (False, True):
        grammar = tool_grammar(tools, required=required, several=True, answer=answer)
        assert may_be_written(grammar, CALL) and may_be_written(grammar, f"{CALL}\n{CALL}")
        assert may_be_written(grammar, '{"a": "b"}') != required
        assert may_be_written(grammar, '{"a": "<tool_call>"}') != required
        assert not may_be_written(grammar, "hello") and not may_be_written(grammar, '{"a": "c"}')
        assert not may_be_written(grammar, '{"a": "b"}\n' + CALL)
    with pytest.raises(RequestError, match="JSON schema only"):
        tool_grammar(tools, required=False, several=True, answer=Grammar("lark", 'start: "yes"'))


def may_be_written(grammar: Grammar, text: str) -> bool:
    tokenizer = make_tokenizer("byte_level")
    constraint = MAKER.make(grammar)
    for token in tokenizer.encode(text):
        if token not in constraint.allowed():
            return False
        constraint.accept(token)
    return 3 in constraint.allowed()


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_calls_that_are_required(client: OpenAI, choice: Any) -> None:
    fields: dict[str, Any] = {"model": "tiny", "messages": HELLO, "tools": TOOLS, "tool_choice": choice, "seed": 5}
    fields |= {"temperature": 30, "max_tokens": 200, "parallel_tool_calls": False}
    done = client.chat.completions.create(**fields).choices[0]
    assert done.finish_reason == "tool_calls" and done.message.content is None
    (call,) = done.message.tool_calls or []
    assert call.type == "function" and call.id.startswith("call_")
    names = ["weather"] if isinstance(choice, dict) else ["weather", "time"]
    assert call.function.name in names
    arguments = json.loads(call.function.arguments)
    assert arguments == {} if call.function.name == "time" else arguments["city"] in ("Oslo", "Rome")
    pieces = list(client.chat.completions.create(stream=True, **fields))
    (delta,) = [t for p in pieces for t in p.choices[0].delta.tool_calls or ()]
    assert delta.index == 0 and delta.function is not None
    assert (delta.function.name, delta.function.arguments) == (call.function.name, call.function.arguments)
    assert pieces[-1].choices[0].finish_reason == "tool_calls"
    assert all(not p.choices[0].delta.content for p in pieces)


def test_choices_that_leave_it_to_the_model(client: OpenAI) -> None:
    fields: dict[str, Any] = {"model": "tiny", "messages": HISTORY, "temperature": 0, "max_tokens": 8}
    fields["extra_body"] = {"ignore_eos": True}
    plain = client.chat.completions.create(**fields).choices[0]
    none = client.chat.completions.create(tools=TOOLS, tool_choice="none", **fields).choices[0]
    assert plain.message.content == none.message.content and none.message.tool_calls is None
    auto = client.chat.completions.create(tools=TOOLS, **fields).choices[0]
    assert auto.finish_reason in ("length", "stop") and auto.message.tool_calls is None


def test_tools_and_a_response_format_together(client: OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "w", "schema": {"enum": [{"a": 1}, [2]]}}}
    fields: dict[str, Any] = {"model": "tiny", "messages": HELLO, "tools": TOOLS, "max_tokens": 200}
    for seed in range(6):
        done = client.chat.completions.create(response_format=form, seed=seed, temperature=5, **fields).choices[0]
        if done.finish_reason == "tool_calls":
            assert done.message.tool_calls and not done.message.content
        else:
            assert json.loads(done.message.content or "") in ({"a": 1}, [2])


def test_answers_as_json(client: OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "w", "schema": WEATHER, "strict": True}}
    fields: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 200, "response_format": form}
    done = client.chat.completions.create(messages=HELLO, **fields).choices[0]
    assert json.loads(done.message.content or "")["city"] in ("Oslo", "Rome") and done.finish_reason == "stop"
    streamed = client.chat.completions.create(messages=HELLO, stream=True, **fields)
    assert "".join(p.choices[0].delta.content or "" for p in streamed) == done.message.content
    del fields["response_format"]
    text = client.completions.create(prompt="x", extra_body={"response_format": form}, **fields).choices[0].text
    assert set(json.loads(text)) == {"city", "tomorrow"}


def _with_schema(name: str, schema: Any) -> Any:
    return {"type": "function", "function": {"name": name, "parameters": schema}}


UNHELD: list[tuple[Any, str]] = [
    ({"type": "array", "uniqueItems": True}, "keyword 'uniqueItems'"),
    ({"not": {"type": "string"}}, "keyword 'not' at /"),
    ({"if": {"type": "string"}, "then": {}}, "keyword '(if|then)'"),
    ({"type": "string", "pattern": "(?=a)b"}, r"pattern \(\?=a\)b: look-around.* is not supported"),
    ({"type": "string", "pattern": "(a)\\1"}, "pattern .*backreferences are not supported"),
]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tool_choice": "required"}, "tool_choice", "only for requests with tools"),
        ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice", "none, auto, required"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
            "none of the",
        ),
        ({"tools": ["x"]}, "tools[0]", "must be an object"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type", "not supported as 'custom'"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "must be an object"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "letters"),
        ({"tools": TOOLS * 65}, "tools", "at most 128"),
        ({"tools": TOOLS, "logprobs": True}, "logprobs", "together with tools"),
        ({"response_format": {"type": "xml"}}, "response_format", "must have the type"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "nothing"}}}]},
            "tools[0].function.parameters",
            "the parameters of the tool 'f'.*Invalid type: nothing",
        ),
        *(
            (
                {"tools": [*TOOLS, _with_schema("github.search", {"type": "object", "properties": {"x": schema}})]},
                f"tools[{len(TOOLS)}].function.parameters",
                f"the parameters of the tool 'github.search'.*{keyword}",
            )
            for schema, keyword in UNHELD
        ),
        *(
            (
                {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}},
                "response_format",
                keyword,
            )
            for schema, keyword in UNHELD
        ),
    ],
)
def test_errors(client: OpenAI, fields: Any, param: str | None, message: str) -> None:
    with pytest.raises(BadRequestError, match=message) as raised:
        client.chat.completions.create(model="tiny", messages=HELLO, **fields)
    assert raised.value.param == param


def test_a_name_with_a_point_is_called(client: OpenAI) -> None:
    tool = _with_schema("github.search", {"type": "object", "properties": {}, "additionalProperties": False})
    fields: dict[str, Any] = {"model": "tiny", "messages": HELLO, "tools": [tool], "tool_choice": "required"}
    calls = client.chat.completions.create(max_tokens=200, **fields).choices[0].message.tool_calls
    assert calls and calls[0].function.name == "github.search"  # type: ignore[union-attr]


def test_earlier_calls_with_arguments_that_are_no_json(client: OpenAI) -> None:
    for arguments in ('{"city": "Oslo"', "{'city': 1}", "", "[NaN]", '{"n": %s}' % ("9" * 400)):
        call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        asked: Any = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}]
        asked.append({"role": "tool", "tool_call_id": "1", "content": "no"})
        assert client.chat.completions.create(model="tiny", messages=asked, tools=TOOLS, max_tokens=3).choices


def test_a_stream_with_a_long_call_is_never_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "QUIET_SECONDS", 0.2)
    write_tiny_model(tmp_path / "tiny.svdp", max_position=2048)
    with live_server(tmp_path, context=2048) as server:
        server.gate.hold()
        fields: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 60}
        body = json.dumps({"messages": HELLO, "stream": True, **fields}).encode()
        request = urllib.request.Request(f"{server.url}/v1/chat/completions", body)
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            assert response.readline().startswith(b"data: ")
            begun = time.monotonic()
            for _ in range(25):
                server.gate.allow(1)
                time.sleep(0.05)
            assert response.readline() == b"\n" and response.readline() == b": still at work\n"
            assert time.monotonic() - begun < PATIENCE
            server.gate.let_go()
            assert response.read().endswith(b"data: [DONE]\n\n")


def test_a_model_without_template_needs_none_for_text(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "tiny.svdp", template=None)
    with live_server(tmp_path) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(BadRequestError, match="no chat template"):
            client.chat.completions.create(model="tiny", messages=HELLO)
        assert client.completions.create(model="tiny", prompt="hello").usage
