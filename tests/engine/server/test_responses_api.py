"""/v1/responses, asked by OpenAI's own client and by hand."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from http_ask import ask
from live_server import LiveServer, live_server
from openai import OpenAI
from patience import PATIENCE
from pydantic import BaseModel
from tiny_model import write_tiny_model

from svdengine.server.api_error import ApiError
from svdengine.server.response_store import ResponseStore
from svdengine.server.responses_input import input_messages

GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "extra_body": {"ignore_eos": True}}
SHORT: dict[str, Any] = {**GREEDY, "max_output_tokens": 8}
TOOL: dict[str, Any] = {
    "type": "function",
    "name": "paint",
    "parameters": {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    },
    "strict": True,
}


class Animal(BaseModel):
    tame: bool


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("responses")
    write_tiny_model(folder / "tiny.svdp", max_position=2048)
    with live_server(folder, context=1024) as server:
        yield server
        assert server.service.loop.request_count == 0 and server.blocks_in_use() == 0


@pytest.fixture(scope="module")
def client(server: LiveServer) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)


def test_a_response_is_the_chat_answer(client: OpenAI) -> None:
    chat = client.chat.completions.create(
        messages=[{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}],
        max_tokens=8,
        **GREEDY,
    )
    done = client.responses.create(input="hello", instructions="be kind", metadata={"a": "b"}, **SHORT)
    assert done.output_text == chat.choices[0].message.content and done.id.startswith("resp_")
    assert done.status == "incomplete" and done.incomplete_details is not None
    assert done.incomplete_details.reason == "max_output_tokens"
    assert done.usage is not None and chat.usage is not None and done.usage.input_tokens == chat.usage.prompt_tokens
    assert done.usage.output_tokens == 8 and done.usage.total_tokens == done.usage.input_tokens + 8
    assert (done.instructions, done.metadata, done.max_output_tokens) == ("be kind", {"a": "b"}, 8)
    assert done.temperature == 0 and done.error is None and done.store  # type: ignore[attr-defined]


def test_items_of_the_input(client: OpenAI) -> None:
    texts: list[Any] = [
        {"role": "developer", "content": "be kind"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hello"}]},
    ]
    expected = client.responses.create(input="hello", instructions="be kind", **SHORT)
    assert client.responses.create(input=texts, **SHORT).output_text == expected.output_text
    both = client.responses.create(input=texts, instructions="be brief", **SHORT)  # in one message of the system
    joined = client.responses.create(input="hello", instructions="be brief\nbe kind", **SHORT)
    assert both.output_text == joined.output_text


def test_calls_that_follow_each_other_are_one_turn() -> None:
    call = {"type": "function_call", "name": "f", "arguments": "{}"}
    said = {"type": "message", "role": "assistant", "content": "wait"}
    thought = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]}
    result = {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "4"}]}
    messages = input_messages([thought, said, {**call, "call_id": "1"}, {**call, "call_id": "2"}, result])
    assert [m["role"] for m in messages] == ["assistant", "tool"]
    assert [c["id"] for c in messages[0]["tool_calls"]] == ["1", "2"] and messages[0]["content"] == "wait"
    assert messages[0]["reasoning_content"] == "hm"
    assert messages[1] == {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "4"}]}


def test_events_come_in_their_order(client: OpenAI) -> None:
    whole = client.responses.create(input="hello", **SHORT)
    events = list(client.responses.create(input="hello", stream=True, **SHORT))
    kinds = [event.type for event in events]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert kinds == [
        *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"),
        *["response.output_text.delta"] * len(deltas),
        *("response.output_text.done", "response.content_part.done", "response.output_item.done"),
        "response.incomplete",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in deltas) == whole.output_text  # type: ignore[union-attr]
    last: Any = events[-1]
    assert last.response.output_text == whole.output_text and last.response.usage.output_tokens == 8
    assert len({item.item_id for item in deltas}) == 1  # type: ignore[union-attr]


def test_the_stream_has_named_events(server: LiveServer) -> None:
    body = {"input": "hello", "stream": True, "max_output_tokens": 2, "ignore_eos": True}
    status, text, headers = ask(server, "/v1/responses", body)
    assert status == 200 and headers.get_content_type() == "text/event-stream"
    for event in text.strip().split("\n\n"):
        name, data = event.split("\n")
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"


def test_the_stream_helper_and_structured_output(client: OpenAI) -> None:
    with client.responses.stream(input="a cat", text_format=Animal, model="tiny", temperature=0) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_response()
    parsed = client.responses.parse(input="a cat", text_format=Animal, model="tiny", temperature=0)
    assert isinstance(parsed.output_parsed, Animal) and parsed.output_text == streamed.output_text
    json_object = client.responses.create(input="a", text={"format": {"type": "text"}}, **SHORT)
    assert json_object.output_text


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_and_its_result(client: OpenAI, stream: bool) -> None:
    fields: dict[str, Any] = {"model": "tiny", "temperature": 0, "tools": [TOOL], "parallel_tool_calls": False}
    choice: Any = {"type": "function", "name": "paint"}
    if stream:
        events = list(client.responses.create(input="red?", stream=True, tool_choice=choice, **fields))
        done: Any = events[-1].response  # type: ignore[union-attr]
        kinds = [e.type for e in events if "function" in e.type or "item" in e.type]
        assert kinds[0] == "response.output_item.added" and kinds[-1] == "response.output_item.done"
        assert kinds[-2] == "response.function_call_arguments.done"
        parts = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
        assert "".join(parts) == done.output[-1].arguments
    else:
        done = client.responses.create(input="red?", tool_choice=choice, **fields)
    call = done.output[-1]
    assert done.status == "completed" and call.type == "function_call" and call.name == "paint"
    assert json.loads(call.arguments)["colour"] in ("red", "blue") and done.tools[0].name == "paint"
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    more = client.responses.create(
        input=[{"role": "user", "content": "red?"}, *done.output, result], tool_choice="none", **{**fields, **SHORT}
    )
    after = client.responses.create(
        input=[result], previous_response_id=done.id, tool_choice="none", **{**fields, **SHORT}
    )
    assert more.output_text == after.output_text and after.previous_response_id == done.id


def test_a_conversation_goes_on_from_what_is_kept(client: OpenAI) -> None:
    first = client.responses.create(input="hello", instructions="be kind", **SHORT)
    second = client.responses.create(input="and?", previous_response_id=first.id, **SHORT)
    turns: list[Any] = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "and?"},
    ]
    expected = client.responses.create(input=turns, **SHORT)  # without the instructions of the first
    assert second.output_text == expected.output_text
    assert client.responses.retrieve(first.id) == first
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match="not kept here"):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.delete(first.id)
    third = client.responses.create(input="so?", previous_response_id=second.id, **SHORT)  # has the whole of it
    assert third.usage is not None and expected.usage is not None
    assert third.usage.input_tokens > expected.usage.input_tokens


def test_what_is_not_stored_is_not_kept(client: OpenAI) -> None:
    done = client.responses.create(input="hello", store=False, **SHORT)
    with pytest.raises(openai.BadRequestError) as raised:
        client.responses.create(input="and?", previous_response_id=done.id, **SHORT)
    assert raised.value.param == "previous_response_id" and raised.value.code == "previous_response_not_found"


def test_the_store_is_bounded() -> None:
    store = ResponseStore(most=3, most_bytes=1000)
    for i in range(10):
        store.add({"id": f"r{i}", "text": "x" * 50}, [{"role": "user", "content": "y"}])
    assert len(store) == 3 and store.get("r9").response["id"] == "r9"
    store.add({"id": "large", "text": "x" * 800}, [])
    assert len(store) < 3 and store.size <= 1000
    store.add({"id": "too large", "text": "x" * 2000}, [])
    for name in ("too large", "r0"):
        with pytest.raises(ApiError, match="not kept"):
            store.get(name)
    store.remove("large")
    assert store.size == sum(store.get(name).size for name in ("r9",) if len(store))


def test_logprobs(client: OpenAI) -> None:
    chat = client.chat.completions.create(
        messages=[{"role": "user", "content": "hello"}], max_tokens=8, logprobs=True, top_logprobs=2, **GREEDY
    )
    assert chat.choices[0].logprobs is not None and chat.choices[0].logprobs.content is not None
    expected = [entry.token for entry in chat.choices[0].logprobs.content]
    fields: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "input": "hello", **SHORT}
    part: Any = client.responses.create(**fields).output[0].content[0]  # type: ignore[union-attr]
    assert [entry.token for entry in part.logprobs] == expected and len(part.logprobs[0].top_logprobs) == 2
    deltas = [e for e in client.responses.create(stream=True, **fields) if e.type == "response.output_text.delta"]
    assert [entry.token for event in deltas for entry in event.logprobs] == expected


def test_an_error_ends_the_stream(server: LiveServer, client: OpenAI) -> None:
    server.gate.fail = True
    try:
        last: Any = list(client.responses.create(input="hello", stream=True, **SHORT))[-1]
    finally:
        server.gate.fail = False
    assert last.type == "response.failed" and last.response.status == "failed"
    assert last.response.error.code == "server_error" and "on fire" in last.response.error.message


@pytest.mark.parametrize(
    ("fields", "status", "param", "message"),
    [
        ({"input": None}, 400, "input", "input is missing"),
        ({"input": []}, 400, "input", "input is empty"),
        ({"input": 3}, 400, "input", "must be a string or a list"),
        ({"input": [{"role": "robot", "content": "a"}]}, 400, "input[0].role", "one of"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, 400, "input[0].type", "'item_reference'"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            400,
            "input[0].content[0].type",
            "not supported as 'input_image'",
        ),
        ({"input": [{"role": "user", "content": "a", "x": 1}]}, 400, "input[0].x", "not a field"),
        ({"input": "x" * 3000}, 400, "input", "context"),
        ({"background": True}, 400, "background", "must be false"),
        ({"conversation": "c"}, 400, "conversation", "not supported"),
        ({"truncation": "auto"}, 400, "truncation", "'disabled'"),
        ({"tools": [{"type": "web_search"}]}, 400, "tools[0].type", "'web_search'"),
        ({"max_output_tokens": 0}, 400, "max_output_tokens", "between 1"),
        ({"max_output_tokens": 1 << 40}, 400, "max_output_tokens", "between 1"),
        ({"temperature": "hot"}, 400, "temperature", "a number"),
        ({"text": {"format": {"type": "grammar"}}}, 400, "text.format.type", "'grammar'"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, 400, "text.format.schema", "missing"),
        ({"temprature": 1}, 400, "temprature", "not a field"),
        ({"model": "other"}, 404, "model", "not served here"),
        ({"stream": "yes"}, 400, "stream", "true or false"),
        ({"tool_choice": "required"}, 400, "tool_choice", "tools"),
        ({"top_p": 2}, 400, "top_p", "between 0"),
    ],
)
def test_errors(server: LiveServer, fields: Any, status: int, param: str, message: str) -> None:
    found, body, _ = ask(server, "/v1/responses", {"input": "a", **fields})
    assert found == status, body
    assert body["error"]["param"] == param and message in body["error"]["message"]


def test_paths(server: LiveServer) -> None:
    assert ask(server, "/v1/responses/none")[0] == 404
    status, body, headers = ask(server, "/v1/responses")
    assert status == 405 and headers["allow"] == "POST" and "takes POST" in body["error"]["message"]
    assert ask(server, "/v1/responses/none?stream=true")[0] == 400
