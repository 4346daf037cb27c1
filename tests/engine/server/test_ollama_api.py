"""Ollama's paths, as its clients speak."""

import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from http_ask import ask
from live_server import LiveServer, live_server
from tiny_model import write_tiny_model

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
OPTIONS: dict[str, Any] = {"temperature": 0, "num_predict": 8, "ignore_eos": True}
CHAT: dict[str, Any] = {"model": "tiny", "messages": HELLO, "options": OPTIONS}
GENERATE: dict[str, Any] = {"model": "tiny", "prompt": "hello", "options": OPTIONS}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "paint",
        "parameters": {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]},
    },
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("ollama")
    write_tiny_model(folder / "tiny.svdp", max_position=2048)
    with live_server(folder, context=1024) as server:
        yield server
        assert server.service.loop.request_count == 0 and server.blocks_in_use() == 0


def lines(server: LiveServer, path: str, body: Any) -> list[Any]:
    status, text, headers = ask(server, path, body)
    assert status == 200 and headers.get_content_type() == "application/x-ndjson", text
    return [json.loads(line) for line in text.splitlines()]


def openai_text(server: LiveServer, path: str, **fields: Any) -> str:
    body = {"max_tokens": 8, "temperature": 0, "ignore_eos": True, **fields}
    choice = ask(server, path, body)[1]["choices"][0]
    return choice["message"]["content"] if "message" in choice else choice["text"]  # type: ignore[no-any-return]


def test_chat(server: LiveServer) -> None:
    expected = openai_text(server, "/v1/chat/completions", messages=HELLO)
    status, done, _ = ask(server, "/api/chat", {**CHAT, "stream": False})
    assert status == 200 and done["message"] == {"role": "assistant", "content": expected}
    assert done["done"] is True and done["done_reason"] == "length" and done["model"] == "tiny"
    assert done["eval_count"] == 8 and done["prompt_eval_count"] > 8
    assert done["total_duration"] >= done["prompt_eval_duration"] > 0 and done["eval_duration"] >= 0
    assert datetime.fromisoformat(done["created_at"]).tzinfo is not None


def test_it_streams_unless_it_is_told_not_to(server: LiveServer) -> None:
    expected = openai_text(server, "/v1/chat/completions", messages=HELLO)
    *pieces, last = lines(server, "/api/chat", {**CHAT, "model": "tiny:latest"})
    assert "".join(piece["message"]["content"] for piece in pieces) == expected
    assert not any(piece["done"] for piece in pieces) and len(pieces) > 1
    assert last["done"] and last["message"]["content"] == "" and last["eval_count"] == 8
    assert last["model"] == "tiny:latest"


def test_generate(server: LiveServer) -> None:
    turns = [{"role": "system", "content": "be kind"}, *HELLO]
    expected = openai_text(server, "/v1/chat/completions", messages=turns)
    _, done, _ = ask(server, "/api/generate", {**GENERATE, "system": "be kind", "stream": False})
    assert done["response"] == expected and done["done_reason"] == "length" and "message" not in done
    raw = openai_text(server, "/v1/completions", prompt="hello")
    pieces = lines(server, "/api/generate", {**GENERATE, "raw": True})
    assert "".join(piece["response"] for piece in pieces) == raw and pieces[-1]["done"]
    long = {"temperature": 0, "ignore_eos": True, "num_predict": 40}
    _, done, _ = ask(server, "/api/generate", {**GENERATE, "raw": True, "options": long, "stream": False})
    assert done["eval_count"] == 40  # no short limit is left over from completions


def test_without_a_prompt_the_model_is_loaded(server: LiveServer) -> None:
    for path, body in (("/api/chat", {"messages": []}), ("/api/generate", {}), ("/api/generate", {"prompt": ""})):
        (piece,) = lines(server, path, {"model": "tiny", **body})
        assert piece["done"] and piece["done_reason"] == "load"
        assert ask(server, path, {"model": "tiny", "stream": False, **body})[1]["done_reason"] == "load"


def test_options_are_those_of_the_sampler(server: LiveServer) -> None:
    whole = openai_text(server, "/v1/chat/completions", messages=HELLO)
    _, done, _ = ask(server, "/api/chat", {**CHAT, "stream": False, "options": {**OPTIONS, "stop": [whole[2:4]]}})
    assert done["message"]["content"] == whole[: whole.index(whole[2:4])] and done["done_reason"] == "stop"
    options = {**OPTIONS, "temperature": 30, "seed": 7, "num_ctx": 8192, "mirostat": 0, "repeat_penalty": 1.1}
    first, second = (
        ask(server, "/api/chat", {**CHAT, "stream": False, "options": options, "keep_alive": "5m"})[1]["message"]
        for _ in range(2)
    )
    same = openai_text(server, "/v1/chat/completions", messages=HELLO, temperature=30, seed=7, repetition_penalty=1.1)
    assert first == second and first["content"] == same


@pytest.mark.parametrize("form", ["json", {"type": "object", "properties": {"a": {"type": "boolean"}}}])
def test_an_answer_in_a_format(server: LiveServer, form: Any) -> None:
    options = {"temperature": 0, "logit_bias": {}, "num_predict": 200}
    body = {**CHAT, "format": form, "options": options, "stream": False}
    _, done, _ = ask(server, "/api/chat", body)
    assert done["message"]["content"].startswith("{")
    if done["done_reason"] == "stop":
        assert isinstance(json.loads(done["message"]["content"]), dict)


def test_calls(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is free not to call: the text of its answer is put in its place."""
    from svdengine.server.ollama_api import OllamaJob

    job = OllamaJob(server.llm, "tiny", {**CHAT, "tools": [TOOL]}, chat=True)
    piece = {"choices": [{"delta": {"tool_calls": [_call("c1", "paint", '{"colour":')]}, "finish_reason": None}]}
    more = {"choices": [{"delta": {"tool_calls": [_call(None, None, ' "red"}')]}, "finish_reason": "tool_calls"}]}
    monkeypatch.setattr(job._inner, "pieces", lambda *_: [piece, more])
    assert job.pieces(0, None) == []  # type: ignore[arg-type]
    called, last = job.closing(())
    (call,) = called["message"]["tool_calls"]
    assert call["function"] == {"index": 0, "name": "paint", "arguments": {"colour": "red"}} and call["id"] == "c1"
    assert last["done_reason"] == "stop" and "tool_calls" not in last["message"]


def _call(id_: str | None, name: str | None, arguments: str) -> dict[str, Any]:
    head = {"id": id_} if id_ else {}
    return {"index": 0, **head, "function": {**({"name": name} if name else {}), "arguments": arguments}}


def test_a_call_and_its_result_are_told(server: LiveServer) -> None:
    call = {"function": {"name": "paint", "arguments": {"colour": "red"}}}
    turns = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "dry", "tool_name": "paint"}]
    _, done, _ = ask(server, "/api/chat", {**CHAT, "messages": [*HELLO, *turns], "stream": False})
    function = {"name": "paint", "arguments": '{"colour": "red"}'}
    calls = [{"id": "1", "type": "function", "function": function}]
    told = [{"role": "assistant", "content": None, "tool_calls": calls}, {"role": "tool", "content": "dry"}]
    assert done["message"]["content"] == openai_text(server, "/v1/chat/completions", messages=[*HELLO, *told])


def test_the_model(server: LiveServer) -> None:
    (model,) = ask(server, "/api/tags")[1]["models"]
    assert model["name"] == model["model"] == "tiny:latest" and model["size"] == server.llm.model_file.size_bytes
    assert len(model["digest"]) == 64 and model["details"]["format"] == "svdp"
    for body in ({"model": "tiny"}, {"name": "tiny:latest", "verbose": True}):
        _, shown, _ = ask(server, "/api/show", body)
        assert shown["template"] == server.llm.model_file.chat_template and "tools" in shown["capabilities"]
        family = shown["model_info"]["general.architecture"]
        assert shown["model_info"][f"{family}.context_length"] == 1024
        assert shown["model_info"]["general.parameter_count"] == server.llm.model_file.parameter_count
    version = ask(server, "/api/version")[1]["version"]
    assert tuple(map(int, version.split("."))) >= (0, 6, 4)


def test_an_error_ends_the_stream(server: LiveServer) -> None:
    server.gate.fail = True
    try:
        assert "on fire" in lines(server, "/api/chat", CHAT)[-1]["error"]
    finally:
        server.gate.fail = False


@pytest.mark.parametrize(
    ("path", "fields", "status", "message"),
    [
        ("/api/chat", {"model": None}, 400, "model is missing"),
        ("/api/chat", {"model": "llama3"}, 404, "model 'llama3' not found"),
        ("/api/chat", {"options": {"mirostat": 2}}, 400, "options.mirostat"),
        ("/api/chat", {"options": {"top_p": 2}}, 400, "options.top_p"),
        ("/api/chat", {"options": {"speed": 1}}, 400, "options.speed"),
        ("/api/chat", {"options": {"num_predict": 1 << 40}}, 400, "options.num_predict"),
        ("/api/chat", {"think": True}, 400, "think must be false"),
        ("/api/chat", {"logprobs": True}, 400, "logprobs is not supported"),
        ("/api/chat", {"format": "yaml"}, 400, "format must be"),
        ("/api/chat", {"messages": [{"role": "user", "content": "a", "images": ["x"]}]}, 400, "messages[0].images"),
        ("/api/generate", {"suffix": "x"}, 400, "suffix must be"),
        ("/api/generate", {"context": [1, 2]}, 400, "context may have 0"),
        ("/api/generate", {"prompt": "x" * 3000}, 400, "maximum context length is 1024"),
        ("/api/show", {"model": "other"}, 404, "not found"),
        ("/api/pull", {}, 404, "there is no '/api/pull'"),
    ],
)
def test_errors(server: LiveServer, path: str, fields: Any, status: int, message: str) -> None:
    base = {"/api/chat": CHAT, "/api/generate": GENERATE}.get(path, {})
    found, body, _ = ask(server, path, {**base, **fields})
    assert found == status, body
    assert list(body) == ["error"] and message in body["error"]
