"""The HTTP server on loopback, asked by OpenAI's own client and by hand."""

import concurrent.futures
import importlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from http_ask import ask
from live_server import LiveServer, live_server
from openai import OpenAI
from tiny_model import write_tiny_model

import svdengine
from svdengine import LLM
from svdengine.server.api_error import ApiError
from svdengine.server.messages import read_messages
from svdengine.server.settings import Settings, is_loopback, read_api_keys

HELLO: list[Any] = [{"role": "user", "content": "hello world"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[LiveServer]:
    with live_server(folder, capacity=16, max_body=20_000, body_seconds=1.0) as server:
        yield server
        assert server.service.loop.request_count == 0
        assert server.blocks_in_use() == 0


@pytest.fixture(scope="module")
def client(server: LiveServer) -> OpenAI:
    return client_of(server)


@pytest.fixture(scope="module")
def llm(server: LiveServer, folder: Path) -> Iterator[LLM]:
    """The same model, to say what is expected."""
    with svdengine.load(folder / "tiny.svdp", device="reference", context=256) as llm:
        yield llm


def client_of(server: LiveServer, key: str = "none") -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60)


def wait_until_idle(server: LiveServer) -> None:
    last = time.monotonic() + 30
    while server.service.loop.request_count or server.service.open_responses:
        assert time.monotonic() < last
        time.sleep(0.01)


def test_chat(client: OpenAI, llm: LLM) -> None:
    expected = llm.chat(HELLO, temperature=0, max_tokens=12, ignore_eos=True)
    done = client.chat.completions.create(model="tiny", messages=HELLO, **GREEDY)
    assert done.object == "chat.completion" and done.model == "tiny" and done.id.startswith("chatcmpl-")
    assert done.choices[0].message.content == expected.text and done.choices[0].message.role == "assistant"
    assert done.choices[0].finish_reason == "length"
    assert done.usage is not None and done.usage.completion_tokens == 12
    assert done.usage.prompt_tokens == expected.stats.prompt_tokens
    assert done.usage.total_tokens == done.usage.prompt_tokens + 12


def test_a_conversation_reuses_its_prefix(client: OpenAI) -> None:
    first = client.chat.completions.create(model="tiny", messages=HELLO, **GREEDY)
    more = [*HELLO, first.choices[0].message.model_dump(), {"role": "user", "content": "and?"}]
    second = client.chat.completions.create(model="tiny", messages=more, **GREEDY)  # type: ignore[arg-type]
    assert second.usage is not None and second.usage.prompt_tokens_details is not None
    assert (second.usage.prompt_tokens_details.cached_tokens or 0) >= 16


def test_chat_stream(client: OpenAI, llm: LLM) -> None:
    expected = llm.chat(HELLO, temperature=0, max_tokens=12, ignore_eos=True)
    pieces = list(
        client.chat.completions.create(
            model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in pieces[:-1]) == expected.text
    assert [p.choices[0].finish_reason for p in pieces[:-1]][-1] == "length"
    assert pieces[-1].choices == [] and pieces[-1].usage is not None and pieces[-1].usage.completion_tokens == 12
    assert len({p.id for p in pieces}) == 1
    measured = (pieces[-1].usage.model_extra or {})["svdengine"]
    assert measured["tokens_per_second"] > 0 and measured["predicted_density"] is None
    no_usage = client.chat.completions.create(model="tiny", messages=HELLO, stream=True, **GREEDY)
    assert all(p.choices and p.usage is None for p in no_usage)


def test_the_stream_ends_with_done(server: LiveServer) -> None:
    status, text, headers = ask(
        server, "/v1/chat/completions", {"messages": HELLO, "stream": True, "max_tokens": 3, "ignore_eos": True}
    )
    assert status == 200 and headers.get_content_type() == "text/event-stream"
    assert text.endswith("data: [DONE]\n\n")
    assert all(event.startswith("data: ") for event in text.split("\n\n")[:-1])


def test_contents_in_parts_and_all_roles(client: OpenAI, llm: LLM) -> None:
    parts: list[Any] = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "hello"}, {"type": "text", "text": "world"}]},
        {"role": "assistant", "content": "yes", "refusal": None},
        {"role": "user", "content": "more", "name": "ann"},
    ]
    plain: list[Any] = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hello\nworld"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "more"},
    ]
    expected = llm.chat(plain, temperature=0, max_tokens=12, ignore_eos=True)
    assert client.chat.completions.create(model="tiny", messages=parts, **GREEDY).choices[0].message.content == (
        expected.text
    )


def test_choices_differ_and_repeat(client: OpenAI) -> None:
    fields: dict[str, Any] = {"model": "tiny", "messages": HELLO, "n": 3, "seed": -7, **GREEDY, "temperature": 30}
    first, second = (client.chat.completions.create(**fields) for _ in range(2))
    texts = [c.message.content for c in first.choices]
    assert [c.index for c in first.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert [c.message.content for c in second.choices] == texts
    streamed = ["", "", ""]
    for piece in client.chat.completions.create(stream=True, **fields):
        streamed[piece.choices[0].index] += piece.choices[0].delta.content or ""
    assert streamed == texts


def test_chat_logprobs(client: OpenAI, llm: LLM) -> None:
    expected = llm.chat(HELLO, temperature=0, max_tokens=12, ignore_eos=True, logprobs=2)
    fields: dict[str, Any] = {"model": "tiny", "messages": HELLO, "logprobs": True, "top_logprobs": 2, **GREEDY}
    done = client.chat.completions.create(**fields)
    assert done.choices[0].logprobs is not None and done.choices[0].logprobs.content is not None
    content = done.choices[0].logprobs.content
    assert expected.logprobs is not None
    assert [c.logprob for c in content] == pytest.approx([p.logprob for p in expected.logprobs], abs=1e-5)
    assert b"".join(bytes(c.bytes or ()) for c in content).decode(errors="replace") == expected.text
    assert all(c.top_logprobs[0].token == c.token and len(c.top_logprobs) == 2 for c in content)
    streamed = []
    for piece in client.chat.completions.create(stream=True, **fields):
        if piece.choices[0].logprobs is not None:
            streamed += piece.choices[0].logprobs.content or []
    assert [c.token for c in streamed] == [c.token for c in content]


def test_stop_strings_and_their_logprobs(client: OpenAI, llm: LLM) -> None:
    whole = llm.chat(HELLO, temperature=0, max_tokens=12, ignore_eos=True).text
    stop = whole[4:7]
    done = client.chat.completions.create(model="tiny", messages=HELLO, stop=[stop], logprobs=True, **GREEDY)
    choice = done.choices[0]
    assert choice.finish_reason == "stop" and choice.message.content == whole[: whole.index(stop)]
    assert choice.logprobs is not None
    shown = b"".join(bytes(c.bytes or ()) for c in choice.logprobs.content or ())
    assert shown.decode(errors="replace").startswith(choice.message.content or "")
    assert len(choice.logprobs.content or ()) <= done.usage.completion_tokens  # type: ignore[union-attr]


def test_completions(client: OpenAI, llm: LLM) -> None:
    expected = [d.text for d in llm.generate(["hello", "once"], temperature=0, max_tokens=12, ignore_eos=True)]
    done = client.completions.create(model="tiny", prompt=["hello", "once"], **GREEDY)
    assert [c.text for c in done.choices] == expected and done.object == "text_completion"
    ids = llm.tokenizer.encode("hello")
    assert client.completions.create(model="tiny", prompt=ids, **GREEDY).choices[0].text == expected[0]
    assert [c.text for c in client.completions.create(model="tiny", prompt=[ids, ids], **GREEDY).choices] == (
        [expected[0]] * 2
    )
    echoed = client.completions.create(model="tiny", prompt="hello", echo=True, **GREEDY)
    assert echoed.choices[0].text == "hello" + expected[0]
    for echo in (False, True):
        streamed = ["", ""]
        for piece in client.completions.create(
            model="tiny", prompt=["hello", "once"], stream=True, echo=echo, **GREEDY
        ):
            streamed[piece.choices[0].index] += piece.choices[0].text
        assert streamed == [p * echo + e for p, e in zip(["hello", "once"], expected, strict=True)]
    short = client.completions.create(model="tiny", prompt="hello", extra_body={"ignore_eos": True})
    assert short.usage is not None and short.usage.completion_tokens == 16


def test_completion_logprobs(client: OpenAI) -> None:
    choice = client.completions.create(model="tiny", prompt="hello", logprobs=2, **GREEDY).choices[0]
    found = choice.logprobs
    assert found is not None and found.tokens is not None and found.text_offset is not None
    assert found.token_logprobs is not None and found.top_logprobs is not None
    assert len(found.tokens) == 12 == len(found.top_logprobs) == len(found.token_logprobs)
    for token, offset in zip(found.tokens, found.text_offset, strict=True):
        assert token.startswith("bytes:") or choice.text[offset:].startswith(token)


@pytest.mark.parametrize("prompt", ["hello world, wörld \U0001f600 of it", "a"])
@pytest.mark.parametrize("length", [0, 1, 5])
def test_logprobs_of_a_prompt(server: LiveServer, llm: LLM, prompt: str, length: int) -> None:
    ids = llm.tokenizer.encode(prompt)
    rows = llm.logits(ids).astype(np.float64)
    logs = rows - np.log(np.exp(rows - rows.max(1, keepdims=True)).sum(1, keepdims=True)) - rows.max(1, keepdims=True)
    body = {"prompt": [ids, ids], "echo": True, "logprobs": 2, "max_tokens": length, "temperature": 0}
    status, answer, _ = ask(server, PLAIN, {**body, "ignore_eos": length > 1})
    assert status == 200
    for choice in answer["choices"]:
        found = choice["logprobs"]
        assert len({len(values) for values in found.values()}) == 1
        assert len(found["tokens"]) == len(ids) + length and choice["text"].startswith(prompt)
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        expected = [logs[i, token] for i, token in enumerate(ids[1:])]
        assert found["token_logprobs"][1 : len(ids)] == pytest.approx(expected, abs=1e-4)
        for i, top in enumerate(found["top_logprobs"][1 : len(ids)]):
            assert max(top.values()) == pytest.approx(logs[i].max(), abs=1e-4) and len(top) in (1, 2, 3)
            assert top[found["tokens"][i + 1]] == found["token_logprobs"][i + 1]
        for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
            assert token.startswith("bytes:") or choice["text"][offset:].startswith(token)
    assert answer["usage"]["completion_tokens"] == 2 * length


def test_logprobs_count_the_token_that_ends_the_text(server: LiveServer, llm: LLM) -> None:
    """Programs that score texts drop one generated token, whatever it is."""
    end = str(llm.tokenizer.eos_id)
    body = {"prompt": "hello", "echo": True, "logprobs": 1, "max_tokens": 1, "logit_bias": {end: 100}}
    choice = ask(server, PLAIN, body)[1]["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["text"] == "hello"
    assert len(choice["logprobs"]["token_logprobs"]) == len(llm.tokenizer.encode("hello")) + 1


def test_an_echo_alone(server: LiveServer) -> None:
    _, body, _ = ask(server, PLAIN, {"prompt": "hello", "echo": True, "max_tokens": 0})
    assert body["choices"][0]["text"] == "hello" and body["choices"][0]["logprobs"] is None
    assert body["usage"]["completion_tokens"] == 0


def test_penalties_and_bias(client: OpenAI, llm: LLM) -> None:
    token = llm.tokenizer.encode("x")[0]
    done = client.chat.completions.create(model="tiny", messages=HELLO, logit_bias={str(token): 100}, **GREEDY)
    assert done.choices[0].message.content == "x" * 12
    fields: dict[str, Any] = {"presence_penalty": 2.0, "frequency_penalty": 1.5}
    expected = llm.chat(HELLO, temperature=0, max_tokens=12, ignore_eos=True, **fields)
    assert client.chat.completions.create(model="tiny", messages=HELLO, **GREEDY, **fields).choices[
        0
    ].message.content == (expected.text)


def test_a_full_context_can_be_shifted(client: OpenAI) -> None:
    fields: dict[str, Any] = {**GREEDY, "max_tokens": 300, "extra_body": {"ignore_eos": True, "context_shift": True}}
    done = client.chat.completions.create(model="tiny", messages=HELLO, **fields)
    assert done.usage is not None and done.usage.completion_tokens == 300
    long = client.completions.create(model="tiny", prompt=[5] * 400, **fields)
    assert long.usage is not None and long.usage.completion_tokens == 300


def test_fields_that_change_nothing_are_taken(client: OpenAI) -> None:
    more: dict[str, Any] = {"user": "ann", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}
    more |= {"max_completion_tokens": 3, "top_p": 0.9, "stop": None, "modalities": ["text"], "safety_identifier": "x"}
    done = client.chat.completions.create(model="tiny", messages=HELLO, **more)
    assert done.usage is not None and done.usage.completion_tokens <= 3


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "auto"},
        {"tool_choice": "none", "tools": [], "parallel_tool_calls": False},
        {"stream_options": {"include_usage": True}},
        {"store": True},
        {"prediction": {"type": "content", "content": "x"}},
        {"reasoning_effort": "low"},
        {"reasoning_effort": "none"},
        {"logprobs": False, "top_logprobs": 0},
        {"verbosity": "medium"},
        {"add_generation_prompt": True},
        {"functions": [], "function_call": "none"},
        {"min_tokens": 0, "length_penalty": 1, "use_beam_search": False, "skip_special_tokens": True},
        {"add_special_tokens": False},
        {"seed": -(1 << 63)},
        {"seed": (1 << 64) - 1},
        {"messages": [*HELLO, {"role": "assistant", "content": None}, *HELLO]},
        {"messages": [*HELLO, {"role": "assistant"}, *HELLO]},
        {"messages": [{"role": "user", "content": "hi", "reasoning_content": None, "x": {"y": [1]}}]},
    ],
)
def test_what_has_a_plain_meaning_is_taken(server: LiveServer, fields: dict[str, Any]) -> None:
    status, body, _ = ask(server, CHAT, {"messages": HELLO, "max_tokens": 2, **fields})
    assert status == 200, body


def test_values_that_say_all_or_the_likeliest(server: LiveServer, llm: LLM) -> None:
    def texts(**fields: Any) -> list[str]:
        base = {"prompt": "hello", "max_tokens": 9, "temperature": 50, "ignore_eos": True, "logprobs": False}
        return [ask(server, PLAIN, {**base, **fields})[1]["choices"][0]["text"] for _ in range(2)]

    greedy = llm.generate("hello", temperature=0, max_tokens=9, ignore_eos=True)[0].text
    assert texts(top_p=0) == [greedy] * 2
    assert texts(seed=3, top_k=-1) == texts(seed=3, top_k=0) != [greedy] * 2
    assert len(set(texts(seed=-1))) == 2
    _, body, _ = ask(server, PLAIN, {"prompt": "hello", "max_tokens": -1, "ignore_eos": True})
    assert body["usage"]["total_tokens"] == llm.context


CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"


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
        slow.settimeout(30)
        assert slow.recv(1000).startswith(b"HTTP/1.1 408")


def test_paths_and_methods(server: LiveServer) -> None:
    assert ask(server, "/v1/nothing")[0] == 404
    status, body, headers = ask(server, CHAT)
    assert status == 405 and headers["allow"] == "POST" and "takes POST" in body["error"]["message"]


def test_models(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny" and model.owned_by == "svdengine"
    assert (model.model_extra or {})["max_model_len"] == 256
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_an_answer_goes_on_with_the_last_message(server: LiveServer, llm: LLM) -> None:
    begun = [*HELLO, {"role": "assistant", "content": "well, <|im_end|> "}]
    prompt = llm.chat_template.encode(HELLO) + llm.tokenizer.encode(begun[1]["content"], bos=False)
    expected = llm.generate([prompt], temperature=0, max_tokens=9, ignore_eos=True)[0].text
    body = {"messages": begun, "temperature": 0, "max_tokens": 9, "ignore_eos": True}
    assert (
        ask(server, CHAT, {**body, "continue_final_message": True})[1]["choices"][0]["message"]["content"] == expected
    )
    bare = llm.chat_template.encode(begun, add_generation_prompt=False)
    assert ask(server, CHAT, {**body, "add_generation_prompt": False})[1]["usage"]["prompt_tokens"] == len(bare)


def test_paths_are_taken_with_slashes_to_spare(server: LiveServer) -> None:
    for path in ("/v1/completions/", "//v1/completions", "/v1//completions"):
        assert ask(server, path, {"prompt": "a", "max_tokens": 1})[0] == 200
    assert ask(server, "/health/")[0] == 200 and ask(server, "/v1/models/tiny/")[0] == 200
    assert ask(server, "/nothing/")[0] == 404 and ask(server, "//")[0] == 200


def test_tokenize(server: LiveServer, llm: LLM) -> None:
    ids = llm.tokenizer.encode("hello wörld")
    _, body, _ = ask(server, "/tokenize", {"content": "hello wörld"})
    assert body["tokens"] == ids and body["count"] == len(ids)
    assert ask(server, "/detokenize", {"tokens": ids})[1]["content"] == "hello wörld"
    _, body, _ = ask(server, "/tokenize", {"content": "hello world", "with_pieces": True})
    assert "".join(t["piece"] for t in body["tokens"]) == "hello world"
    _, body, _ = ask(server, "/tokenize", {"messages": HELLO})
    assert body["tokens"] == llm.chat_template.encode(HELLO)


def test_health_and_metrics(server: LiveServer, client: OpenAI) -> None:
    assert ask(server, "/health")[1]["status"] == "ok"
    client.chat.completions.create(model="tiny", messages=HELLO, **GREEDY)
    status, text, _ = ask(server, "/metrics")
    assert status == 200
    samples = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            samples[name] = float(value)
    assert samples["svdengine_generated_tokens_total"] >= 12
    assert samples["svdengine_requests"] == 0 and samples["svdengine_request_capacity"] == 16
    assert samples['svdengine_http_responses_total{path="/health",status="200"}'] >= 1
    blocks = [samples[f'svdengine_kv_blocks{{state="{state}"}}'] for state in ("used", "cached", "free")]
    assert sum(blocks) == server.llm.executor.block_count and blocks[0] == 0
    assert samples['svdengine_steps_total{ffn="dense"}'] >= 12 and samples["svdengine_preemptions_total"] >= 0
    count = samples["svdengine_completion_seconds_count"]
    assert samples['svdengine_completion_seconds_bucket{le="+Inf"}'] == count > 0
    buckets = [v for name, v in samples.items() if name.startswith("svdengine_completion_seconds_bucket")]
    assert buckets == sorted(buckets)


def test_clients_that_leave_free_what_they_held(server: LiveServer) -> None:
    body = json.dumps({"messages": HELLO, "max_tokens": 200, "ignore_eos": True, "stream": True}).encode()
    whole = body.replace(b'"stream": true', b'"stream": false')
    server.gate.hold()
    for data in (body, whole):
        with socket.create_connection(server.address) as client:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
            client.sendall(head.encode() + data)
            server.gate.allow(2)
            if data is body:
                assert b"200 OK" in client.recv(4096)
            else:
                while not server.service.loop.request_count:
                    time.sleep(0.01)
    server.gate.let_go()
    before = server.llm.stats().generated_tokens
    wait_until_idle(server)
    assert server.blocks_in_use() == 0
    assert server.llm.stats().generated_tokens - before < 400


def test_an_error_of_the_engine(server: LiveServer, client: OpenAI) -> None:
    server.gate.fail = True
    try:
        with pytest.raises(openai.InternalServerError, match="on fire"):
            client.chat.completions.create(model="tiny", messages=HELLO, **GREEDY)
        with pytest.raises(openai.APIError, match="on fire"):
            list(client.chat.completions.create(model="tiny", messages=HELLO, stream=True, **GREEDY))
        assert ask(server, "/health")[:2] == (503, {"status": "failing", "version": svdengine.__version__})
    finally:
        server.gate.fail = False
    assert client.chat.completions.create(model="tiny", messages=HELLO, **GREEDY).choices[0].message.content
    assert ask(server, "/health")[0] == 200


def test_many_at_a_time(server: LiveServer, llm: LLM) -> None:
    prompts = ["hello", "once upon a time", "what is 2 + 2?", "the"] * 4
    expected = {p: llm.generate(p, temperature=0, max_tokens=12, ignore_eos=True)[0].text for p in set(prompts)}

    def complete(prompt: str) -> str:
        return client_of(server).completions.create(model="tiny", prompt=prompt, **GREEDY).choices[0].text

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert list(pool.map(complete, prompts)) == [expected[p] for p in prompts]


def test_a_full_queue(folder: Path) -> None:
    with live_server(folder, capacity=2) as server, concurrent.futures.ThreadPoolExecutor(2) as pool:
        server.gate.hold()
        running = [
            pool.submit(client_of(server).chat.completions.create, model="tiny", messages=HELLO, **GREEDY)
            for _ in range(2)
        ]
        while server.service.loop.request_count < 2:
            time.sleep(0.01)
        with pytest.raises(openai.RateLimitError, match="try again later") as raised:
            client_of(server).chat.completions.create(model="tiny", messages=HELLO, **GREEDY)
        assert int(raised.value.response.headers["retry-after"]) >= 1
        server.gate.let_go()
        assert all(future.result().usage for future in running)


def test_api_keys(folder: Path) -> None:
    with live_server(folder, api_keys=("one", "two")) as server:
        for key in ("one", "two"):
            assert client_of(server, key).models.list().data
        with pytest.raises(openai.AuthenticationError, match="API key"):
            client_of(server, "three").models.list()
        assert ask(server, "/v1/models", x_api_key="two")[0] == 200
        for headers in (
            {"x-api-key": "three"},
            {},
            {"authorization": "Basic one"},
            {"authorization": "one"},
            {"authorization": "Bearer ö"},
        ):
            status, _, found = ask(
                server, "/v1/models", **{k: v.encode().decode("latin-1") for k, v in headers.items()}
            )
            assert status == 401 and found["www-authenticate"] == "Bearer"
        assert ask(server, "/metrics")[0] == 401
        assert ask(server, "/health")[0] == 200
        assert ask(server, "/health", host="elsewhere.example")[0] == 200


def test_web_pages_of_others_are_refused(server: LiveServer, folder: Path) -> None:
    other = "http://elsewhere.example"
    assert ask(server, "/health", host="elsewhere.example")[0] == 403
    assert ask(server, CHAT, {"messages": HELLO}, origin=other)[0] == 403
    assert ask(server, CHAT, {"messages": HELLO}, origin="null")[0] == 403
    assert ask(server, "/health", origin=server.url)[0] == 200
    with live_server(folder, cors_origins=(other,)) as open_server:
        _, _, headers = ask(open_server, "/health", origin=other)
        assert headers["access-control-allow-origin"] == other
        status, _, headers = ask(
            open_server, CHAT, method="OPTIONS", origin=other, access_control_request_method="POST"
        )
        assert status == 200 and "POST" in headers["access-control-allow-methods"]
        for names in ("x-stainless-os, x-stainless-lang, authorization, openai-beta", "anthropic-version", "x-new"):
            preflight = {"access_control_request_method": "POST", "access_control_request_headers": names}
            status, _, headers = ask(open_server, CHAT, method="OPTIONS", origin=other, **preflight)
            assert status == 200 and headers["access-control-allow-headers"] == names
            assert ask(open_server, CHAT, method="OPTIONS", origin="http://third.example", **preflight)[0] == 400
        assert ask(open_server, "/health", origin="http://third.example")[0] == 403


def test_ending_lets_answers_end_and_refuses_new_ones(folder: Path) -> None:
    with live_server(folder) as server:
        server.gate.hold()
        stream = client_of(server).chat.completions.create(model="tiny", messages=HELLO, stream=True, **GREEDY)
        server.gate.allow(3)
        next(stream)
        server.http.stop()
        while not server.service.draining:
            time.sleep(0.01)
        with pytest.raises(openai.InternalServerError, match="takes no more requests") as raised:
            client_of(server).chat.completions.create(model="tiny", messages=HELLO, **GREEDY)
        assert raised.value.status_code == 503
        assert ask(server, "/health")[1]["status"] == "shutting down"
        server.gate.let_go()
        assert list(stream)[-1].choices[0].finish_reason == "length"


def test_ending_tells_those_whose_answer_is_cut(folder: Path) -> None:
    with live_server(folder, drain_seconds=0.0) as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
        server.gate.hold()
        client = client_of(server)
        whole = pool.submit(client.chat.completions.create, model="tiny", messages=HELLO, **GREEDY)
        stream = client.chat.completions.create(model="tiny", messages=HELLO, stream=True, **GREEDY)
        next(stream)
        while server.service.loop.request_count < 2:
            time.sleep(0.01)
        server.http.stop()
        while not server.service.draining:
            time.sleep(0.01)
        server.gate.let_go()
        with pytest.raises(openai.APIError, match="cut short"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="cut short"):
            whole.result()


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_the_command_ends_on_sigterm(folder: Path, server: LiveServer) -> None:
    command = [sys.executable, "-m", "svdengine", "serve", str(folder / "tiny.svdp"), "--port", "0", "--name", "small"]
    environment = {**os.environ, "SVDENGINE_DEVICE": "reference", "SVDENGINE_API_KEY": "secret"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("small on reference at http://127.0.0.1:"), line
        client = OpenAI(base_url=line.split()[-1] + "/v1", api_key="secret", max_retries=0)
        stream = client.chat.completions.create(
            model="small", messages=HELLO, stream=True, max_tokens=100, extra_body={"ignore_eos": True}
        )
        next(stream)
        process.send_signal(signal.SIGTERM)
        assert list(stream)[-1].choices[0].finish_reason == "length"
        client.close()
        assert process.wait(30) == 0
        ending, *logged = process.stderr.read().strip().splitlines()
        assert ending == "ending; a second signal ends at once"
        assert any("POST /v1/chat/completions 200" in line for line in logged), logged


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="a signal that Windows lacks")
def test_a_terminal_that_closes_lets_the_answers_end_and_the_kv_cache_be_written(
    folder: Path, server: LiveServer, tmp_path: Path
) -> None:
    kept = tmp_path / "kept.kv"
    command = [sys.executable, "-m", "svdengine", "serve", str(folder / "tiny.svdp"), "--port", "0", "--name", "small"]
    environment = {**os.environ, "SVDENGINE_DEVICE": "cpu"}
    with subprocess.Popen([*command, "--kv-save", str(kept)], stderr=subprocess.PIPE, text=True, env=environment) as p:
        assert p.stderr is not None
        url = p.stderr.readline().split()[-1]
        empty = kept.stat().st_size
        client = OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
        more: dict[str, Any] = {"max_tokens": 60, "extra_body": {"ignore_eos": True}}
        stream = client.chat.completions.create(model="small", messages=HELLO, stream=True, **more)
        next(stream)
        p.stderr.close()  # as the terminal's end
        for _ in range(2):
            p.send_signal(signal.SIGHUP)
            time.sleep(0.05)
        assert list(stream)[-1].choices[0].finish_reason == "length"
        client.close()
        assert p.wait(60) == 0
    assert kept.stat().st_size > empty


def test_a_port_that_is_taken(server: LiveServer, folder: Path) -> None:
    from click.testing import CliRunner

    from svdengine.cli import main

    result = CliRunner().invoke(main, ["serve", str(folder / "tiny.svdp"), "--port", str(server.address[1])])
    assert result.exit_code == 1 and result.stderr.startswith("error: cannot listen on 127.0.0.1 port")


def test_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "192.0.2.1", "::", "example.org", ""]))
    assert Settings("x").loopback
    monkeypatch.delenv("SVDENGINE_API_KEY", raising=False)
    assert read_api_keys((), None) == ()
    monkeypatch.setenv("SVDENGINE_API_KEY", "c")
    file = tmp_path / "keys"
    file.write_text("# of the team\na  # ann\n\nb\n", encoding="utf-8")
    assert read_api_keys(("x",), file) == ("x", "a", "b", "c")
    file.write_text("# none\n", encoding="utf-8")
    for given, path, message in (
        ((), file, "holds no API key"),
        ((), tmp_path / "missing", "cannot read"),
        (("",), None, "not empty"),
        (("clé",), None, "ASCII"),
    ):
        with pytest.raises(svdengine.RequestError, match=message):
            read_api_keys(given, path)


def test_a_missing_ray_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "svdengine.server.ray_app", raising=False)
    with pytest.raises(svdengine.SvdEngineError, match=r'pip install "svdengine\[ray\]"'):
        importlib.import_module("svdengine.server.ray_app")


def test_what_a_template_reads_of_a_message_reaches_it() -> None:
    said = {"role": "assistant", "content": "4", "reasoning_content": "2 and 2", "name": None, "refusal": None}
    assert read_messages([{**said, "prefix": True}]) == [
        {"role": "assistant", "content": "4", "reasoning_content": "2 and 2", "prefix": True}
    ]
    newer = read_messages([{"role": "assistant", "content": "4", "reasoning": "2 and 2"}])[0]
    assert newer["reasoning_content"] == newer["reasoning"] == "2 and 2"
    for name in ("audio", "function_call"):
        with pytest.raises(ApiError, match=f"{name} is not supported"):
            read_messages([{**said, name: {"id": "x"}}])


def test_an_earlier_thought_is_in_the_prompt(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role }}{{ m.reasoning_content }}{{ m.content }}{% endfor %}"
    write_tiny_model(tmp_path / "tiny.svdp", template=template)
    messages = [*HELLO, {"role": "assistant", "content": "yes", "reasoning_content": "hm, hm"}, *HELLO]
    with live_server(tmp_path) as server:
        tokens = ask(server, "/tokenize", {"messages": messages})[1]["tokens"]
        assert "assistanthm, hmyes" in ask(server, "/detokenize", {"tokens": tokens})[1]["content"]
