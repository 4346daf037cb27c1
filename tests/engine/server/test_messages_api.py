"""/v1/messages, as Anthropic's clients speak."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from http_ask import ask
from live_server import LiveServer, live_server
from tiny_model import write_tiny_model

PATH = "/v1/messages"
HELLO: list[Any] = [{"role": "user", "content": "hello"}]
SHORT: dict[str, Any] = {"model": "tiny", "max_tokens": 8, "temperature": 0, "ignore_eos": True, "messages": HELLO}
TOOL: dict[str, Any] = {
    "name": "paint",
    "description": "Paints.",
    "input_schema": {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    },
}
CALL: dict[str, Any] = {
    "tools": [TOOL],
    "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    "max_tokens": 200,
    "ignore_eos": False,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("messages")
    write_tiny_model(folder / "tiny.svdp", max_position=2048)
    with live_server(folder, context=1024) as server:
        yield server
        assert server.service.loop.request_count == 0 and server.blocks_in_use() == 0


def say(server: LiveServer, **fields: Any) -> Any:
    status, body, _ = ask(server, PATH, {**SHORT, **fields})
    assert status == 200, body
    return body


def chat(server: LiveServer, messages: Any, **fields: Any) -> str:
    body = {"messages": messages, "max_tokens": 8, "temperature": 0, "ignore_eos": True, **fields}
    return ask(server, "/v1/chat/completions", body)[1]["choices"][0]["message"]["content"]  # type: ignore[no-any-return]


def events(server: LiveServer, **fields: Any) -> list[Any]:
    status, text, headers = ask(server, PATH, {**SHORT, **fields, "stream": True})
    assert status == 200 and headers.get_content_type() == "text/event-stream"
    found = []
    for event in text.strip().split("\n\n"):
        name, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def test_a_message_is_the_chat_answer(server: LiveServer) -> None:
    done = say(server, system="be kind")
    expected = chat(server, [{"role": "system", "content": "be kind"}, *HELLO])
    assert done["content"] == [{"type": "text", "text": expected}]
    assert (done["type"], done["role"], done["model"]) == ("message", "assistant", "tiny")
    assert done["id"].startswith("msg_") and done["stop_reason"] == "max_tokens" and done["stop_sequence"] is None
    usage = done["usage"]
    counted = ask(server, f"{PATH}/count_tokens", {"model": "tiny", "messages": HELLO, "system": "be kind"})[1]
    assert usage["output_tokens"] == 8
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == counted["input_tokens"]


def test_blocks_are_joined_to_turns(server: LiveServer) -> None:
    blocks = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "b"}]
    system = [{"type": "text", "text": "be kind"}]
    done = say(server, system=system, messages=[{"role": "user", "content": blocks}, {"role": "user", "content": "c"}])
    turns = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "a\nb\nc"}]
    assert done["content"][0]["text"] == chat(server, turns)


def test_events_come_in_their_order(server: LiveServer) -> None:
    whole, found = say(server), events(server)
    kinds = [event["type"] for event in found]
    deltas = [event["delta"]["text"] for event in found if event["type"] == "content_block_delta"]
    assert kinds == [
        *("message_start", "content_block_start"),
        *["content_block_delta"] * len(deltas),
        *("content_block_stop", "message_delta", "message_stop"),
    ]
    assert found[0]["message"]["content"] == [] and found[0]["message"]["usage"]["input_tokens"] > 0
    assert "".join(deltas) == whole["content"][0]["text"]
    assert found[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert found[-2]["usage"]["output_tokens"] == 8


@pytest.mark.parametrize("stream", [False, True])
def test_the_stop_sequence_that_came_is_told(server: LiveServer, stream: bool) -> None:
    whole = say(server)["content"][0]["text"]
    stop = whole[2:4]
    fields = {"stop_sequences": ["never so", stop]}
    done = events(server, **fields)[-2]["delta"] if stream else say(server, **fields)
    assert (done["stop_reason"], done["stop_sequence"]) == ("stop_sequence", stop)
    if not stream:
        assert "".join(block["text"] for block in done["content"]) == whole[: whole.index(stop)]


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_and_its_result(server: LiveServer, stream: bool) -> None:
    if stream:
        found = events(server, **CALL)
        start = next(
            e for e in found if e["type"] == "content_block_start" and e["content_block"]["type"] == "tool_use"
        )
        parts = [e["delta"]["partial_json"] for e in found if e.get("delta", {}).get("type") == "input_json_delta"]
        call, reason = (
            {**start["content_block"], "input": json.loads("".join(parts))},
            found[-2]["delta"]["stop_reason"],
        )
        assert start["content_block"]["input"] == {}
    else:
        done = say(server, **CALL)
        call, reason = done["content"][-1], done["stop_reason"]
    assert call["type"] == "tool_use" and call["name"] == "paint" and call["input"]["colour"] in ("red", "blue")
    assert reason == "tool_use" and call["id"].startswith("toolu_")
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": [{"type": "text", "text": "dry"}]}
    turns = [*HELLO, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    after = say(server, messages=turns, tools=[TOOL], tool_choice={"type": "none"})
    function = {"name": "paint", "arguments": json.dumps(call["input"])}
    calls = [{"id": call["id"], "type": "function", "function": function}]
    told = [{"role": "assistant", "content": None, "tool_calls": calls}]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "dry"}
    assert after["content"][0]["text"] == chat(server, [*HELLO, *told, result])


def test_an_answer_that_fits_a_schema(server: LiveServer) -> None:
    schema = {"type": "object", "properties": {"tame": {"type": "boolean"}}, "required": ["tame"]}
    schema["additionalProperties"] = False
    form = {"format": {"type": "json_schema", "schema": schema}}
    done = say(server, output_config=form, ignore_eos=False, max_tokens=100)
    assert isinstance(json.loads(done["content"][0]["text"])["tame"], bool) and done["stop_reason"] == "end_turn"


def test_count_tokens_of_a_prompt_that_is_too_long(server: LiveServer) -> None:
    long = [{"role": "user", "content": "hello " * 2000}]
    status, body, _ = ask(server, f"{PATH}/count_tokens", {"model": "tiny", "messages": long})
    assert status == 200 and body["input_tokens"] > 2000
    with_tool = ask(server, f"{PATH}/count_tokens", {"messages": HELLO, "tools": [TOOL]})[1]["input_tokens"]
    assert with_tool > ask(server, f"{PATH}/count_tokens", {"messages": HELLO})[1]["input_tokens"]


def test_an_error_ends_the_stream(server: LiveServer) -> None:
    server.gate.fail = True
    try:
        last = events(server)[-1]
    finally:
        server.gate.fail = False
    assert last["type"] == "error" and last["error"]["type"] == "api_error" and "on fire" in last["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "status", "kind", "message"),
    [
        ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens is missing"),
        ({"messages": []}, 400, "invalid_request_error", "messages is empty"),
        ({"messages": [{"role": "tool", "content": "a"}]}, 400, "invalid_request_error", "messages[0].role"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "invalid_request_error", "the last message"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            400,
            "invalid_request_error",
            "messages[0].content[0].type is not supported as 'image'",
        ),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, 400, "invalid_request_error", "context"),
        ({"thinking": {"type": "enabled"}}, 400, "invalid_request_error", "thinking.type"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, 400, "invalid_request_error", "tools[0].type"),
        ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error", "tools"),
        ({"mcp_servers": []}, 400, "invalid_request_error", "mcp_servers is not supported"),
        ({"stop": ["a"]}, 400, "invalid_request_error", "'stop' is not a field"),
        ({"temperature": -1}, 400, "invalid_request_error", "temperature must lie"),
        ({"model": "claude"}, 404, "not_found_error", "this server has 'tiny'"),
    ],
)
def test_errors(server: LiveServer, fields: Any, status: int, kind: str, message: str) -> None:
    found, body, _ = ask(server, PATH, {**SHORT, **fields})
    assert found == status, body
    assert body["type"] == "error" and body["error"]["type"] == kind and message in body["error"]["message"]


def test_other_errors_have_its_form_too(server: LiveServer) -> None:
    for path, data, status in ((PATH, None, 405), (PATH, b"{", 400), (f"{PATH}/batches", b"{}", 404)):
        found, body, _ = ask(server, path, data)
        assert found == status and body["type"] == "error"


def test_the_key_comes_as_anthropic_sends_it(tmp_path_factory: pytest.TempPathFactory) -> None:
    with live_server(tmp_path_factory.mktemp("keys"), api_keys=("one",)) as server:
        status, body, _ = ask(server, PATH, SHORT, x_api_key="two")
        assert status == 401 and body["error"]["type"] == "authentication_error"
        assert ask(server, PATH, SHORT, x_api_key="one", authorization="Basic two")[0] == 200
