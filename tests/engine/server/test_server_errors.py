"""Requests that the server refuses, and what it says of them."""

import math
import socket
from typing import Any

import pytest
from http_ask import CHAT, HELLO, PLAIN, ask
from live_server import LiveServer
from patience import PATIENCE


@pytest.mark.parametrize(
    ("path", "fields", "status", "param", "message"),
    [
        (CHAT, {"audio": {"voice": "x"}}, 400, "audio", "audio is not supported"),
        (CHAT, {"service_tier": "flex"}, 400, "service_tier", "not supported"),
        (CHAT, {"functions": [{"name": "f"}]}, 400, "functions", "not supported"),
        (CHAT, {"temprature": 1}, 400, "temprature", "not a field"),
        (CHAT, {"temperature": "hot"}, 400, "temperature", "must be a number"),
        (CHAT, {"temperature": -1}, 400, "temperature", "between 0"),
        (CHAT, {"temperature": 1e999}, 400, None, "Infinity is not a JSON value"),
        (CHAT, {"temperature": math.nan}, 400, None, "NaN is not a JSON value"),
        (CHAT, {"temperature": 10**18}, 400, "temperature", "between 0"),
        (CHAT, {"max_tokens": 10**400}, 400, None, "beyond 64 bits"),
        (CHAT, {"seed": 1 << 64}, 400, None, "beyond 64 bits"),
        (CHAT, {"seed": -(1 << 63) - 1}, 400, None, "beyond 64 bits"),
        (CHAT, {"logit_bias": {"9" * 400: 1}}, 400, "logit_bias", "token ids"),
        (CHAT, {"logit_bias": {"1": 1e39}}, 400, "logit_bias", "at most 1e+30"),
        (CHAT, {"messages": [{"role": "user", "content": "x", "n": 10**400}]}, 400, None, "beyond 64 bits"),
        (CHAT, {"chat_template_kwargs": {"x": [10**400]}}, 400, None, "beyond 64 bits"),
        (CHAT, {"tool_choice": "required"}, 400, "tool_choice", "only for requests with tools"),
        (
            CHAT,
            {"continue_final_message": True, "add_generation_prompt": True},
            400,
            "continue_final_message",
            "begins",
        ),
        (CHAT, {"verbosity": "high"}, 400, "verbosity", "but as"),
        (CHAT, {"max_tokens": -2}, 400, "max_tokens", "between 1"),
        (CHAT, {"top_k": -2}, 400, "top_k", "between 0"),
        (CHAT, {"max_tokens": 0}, 400, "max_tokens", "between 1"),
        (CHAT, {"max_completion_tokens": True}, 400, "max_completion_tokens", "whole number"),
        (CHAT, {"n": 0}, 400, "n", "between 1"),
        (CHAT, {"n": 99}, 400, "n", "between 1"),
        (CHAT, {"n": "2"}, 400, "n", "whole number"),
        (CHAT, {"stream": 1}, 400, "stream", "true or false"),
        (CHAT, {"stream": True, "stream_options": {"x": 1}}, 400, "x", "not a field"),
        (CHAT, {"top_logprobs": 3}, 400, "top_logprobs", "only for logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "between 0 and 20"),
        (CHAT, {"stop": [""]}, 400, "stop", "not empty"),
        (CHAT, {"logit_bias": {"x": 1}}, 400, "logit_bias", "token ids"),
        (CHAT, {"logit_bias": {"99999": 1}}, 400, None, "names token 99999"),
        (CHAT, {"model": "gpt-4"}, 404, "model", "this server has 'tiny'"),
        (CHAT, {"messages": None}, 400, "messages", "messages is missing"),
        (CHAT, {"messages": []}, 400, "messages", "empty"),
        (CHAT, {"messages": "hi"}, 400, "messages", "a list"),
        (CHAT, {"messages": ["hi"]}, 400, "messages[0]", "an object"),
        (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, 400, "messages[0].role", "one of"),
        (CHAT, {"messages": [{"role": "user"}]}, 400, "messages[0].content", "no content"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "messages[0].content[0].type",
            "reads text only",
        ),
        (
            CHAT,
            {"messages": [{"role": "user", "content": "x" * 3000}]},
            400,
            "messages",
            "maximum context length is 256 tokens",
        ),
        (CHAT, {"chat_template_kwargs": []}, 400, "chat_template_kwargs", "an object"),
        (CHAT, {"chat_template_kwargs": {"messages": 1}}, 400, "chat_template_kwargs.messages", "cannot be given"),
        (CHAT, {"chat_template_kwargs": {"self": 1}}, 400, "chat_template_kwargs.self", "cannot be given"),
        (PLAIN, {"prompt": None}, 400, "prompt", "missing"),
        (PLAIN, {"prompt": ""}, 400, "prompt", "empty"),
        (PLAIN, {"prompt": [["a"]]}, 400, "prompt", "token ids"),
        (PLAIN, {"prompt": [10**15]}, 400, None, "token id"),
        (PLAIN, {"prompt": [10**30]}, 400, None, "beyond 64 bits"),
        (PLAIN, {"logprobs": True}, 400, "logprobs", "whole number"),
        ("/detokenize", {"tokens": [10**400]}, 400, None, "beyond 64 bits"),
        (PLAIN, {"prompt": [5] * 300}, 400, "prompt", "has 300 tokens and this model's maximum context length is 256"),
        (PLAIN, {"prompt": ["a"] * 65}, 400, "prompt", "1 to 64"),
        (PLAIN, {"prompt": ["a"] * 17}, 400, None, "at most 16"),
        (PLAIN, {"suffix": "x"}, 400, "suffix", "not supported"),
        (PLAIN, {"best_of": 3}, 400, "best_of", "not supported"),
        (PLAIN, {"logprobs": 99}, 400, "logprobs", "between 0"),
        (PLAIN, {"echo": True, "logprobs": 1, "stream": True}, 400, "stream", "logprobs of the prompt"),
        (PLAIN, {"max_tokens": 0}, 400, "max_tokens", "between 1"),
        ("/v1/embeddings", {"input": "a"}, 404, None, "serve --embeddings"),
        ("/tokenize", {}, 400, "content", "give content"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens", "token ids"),
    ],
)
def test_errors(server: LiveServer, path: str, fields: Any, status: int, param: str | None, message: str) -> None:
    base = {CHAT: {"messages": HELLO}, PLAIN: {"prompt": "a"}}.get(path, {})
    found, body, _ = ask(server, path, {**base, **fields})
    assert found == status, body
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["param"] == param and message in error["message"]
    assert (error["code"] == "context_length_exceeded") == ("context length" in error["message"])


@pytest.mark.parametrize(
    ("data", "status", "message"),
    [
        (b"", 400, "not JSON"),
        (b"{", 400, "not JSON"),
        (b"[]", 400, "must be a JSON object"),
        (b"\xff", 400, "not JSON"),
        (b'{"a":' + b"[" * 9000, 400, "nested too deep"),
        (b'{"messages": ' + b"9" * 9000 + b"}", 400, "beyond 64 bits"),
        (b'{"temperature": 1e999}', 400, "beyond 64 bits"),
        (b'{"temperature": -' + b"9" * 400 + b".5}", 400, "beyond 64 bits"),
        (b"[" * 9000, 400, "nested too deep"),
        (b'{"x": "' + b"x" * 30_000 + b'"}', 413, "more than 20000 bytes"),
    ],
)
def test_bodies_that_are_no_request(server: LiveServer, data: bytes, status: int, message: str) -> None:
    found, body, _ = ask(server, CHAT, data)
    assert found == status and message in body["error"]["message"]


def test_a_body_that_does_not_come(server: LiveServer) -> None:
    with socket.create_connection(server.address) as slow:
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        slow.settimeout(PATIENCE)
        assert slow.recv(1000).startswith(b"HTTP/1.1 408")


def test_paths_and_methods(server: LiveServer) -> None:
    assert ask(server, "/v1/nothing")[0] == 404
    status, body, headers = ask(server, CHAT)
    assert status == 405 and headers["allow"] == "POST" and "takes POST" in body["error"]["message"]


def test_paths_are_taken_with_slashes_to_spare(server: LiveServer) -> None:
    for path in ("/v1/completions/", "//v1/completions", "/v1//completions"):
        assert ask(server, path, {"prompt": "a", "max_tokens": 1})[0] == 200
    assert ask(server, "/health/")[0] == 200 and ask(server, "/v1/models/tiny/")[0] == 200
    assert ask(server, "/nothing/")[0] == 404 and ask(server, "//")[0] == 200
