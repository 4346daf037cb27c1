"""Work that one client causes is bounded, and does not stop the others."""

import concurrent.futures
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from live_server import LiveServer, live_server
from patience import eventually
from test_server import CHAT, HELLO, PLAIN, ask

from svdengine.server import work_pool
from svdengine.server.bounded_text import BoundedTokenizer
from svdengine.server.work import Work, _current
from svdengine.server.work_pool import SHORT, WorkPool

COSTLY: dict[str, Any] = {"allOf": [{"type": "string", "pattern": f".*{c}.*"} for c in "abcdefghijklmnopqrst"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": COSTLY}}
LONG = "some words, and more of them; " * 3000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("work"), capacity=16) as server:
        yield server
        assert server.service.loop.request_count == 0 and server.blocks_in_use() == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": FORMAT},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": COSTLY}}}}]},
    ],
)
def test_a_costly_grammar_is_refused_and_others_go_on(server: LiveServer, fields: dict[str, Any]) -> None:
    pytest.importorskip("llguidance")
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        costly = [pool.submit(ask, server, CHAT, {"messages": HELLO, **fields}) for _ in range(2)]
        others = 0
        while not all(future.done() for future in costly):
            assert ask(server, "/health")[:1] == (200,)
            assert ask(server, CHAT, {"messages": HELLO, "max_tokens": 3})[0] == 200
            others += 1
            time.sleep(0.05)
        assert others > 1
        for future in costly:
            status, body, _ = future.result()
            assert status == 400 and "it takes more than 2 s or 256 MB" in body["error"]["message"]
    small = {"type": "json_schema", "json_schema": {"schema": {"enum": [1, 2]}}}
    assert ask(server, CHAT, {"messages": HELLO, "max_tokens": 9, "response_format": small})[0] == 200


def test_long_texts_are_read_elsewhere_with_the_same_result(server: LiveServer) -> None:
    tokenizer = server.service._unbounded[0]
    expected = tokenizer.encode(LONG, bos=False)
    assert len(LONG) > SHORT
    _, body, _ = ask(server, "/tokenize", {"content": LONG, "with_pieces": True})
    assert [t["id"] for t in body["tokens"]] == expected and body["count"] == len(expected)
    assert [t["piece"] for t in body["tokens"][:99]] == [tokenizer.token_text(t) for t in expected[:99]]
    assert ask(server, "/detokenize", {"tokens": expected})[1]["content"] == LONG
    messages = [{"role": "user", "content": LONG + "<|im_end|>"}]
    template = server.service._unbounded[1]
    assert template is not None
    assert ask(server, "/tokenize", {"messages": messages})[1]["tokens"] == template.encode(messages)
    status, body, _ = ask(server, CHAT, {"messages": messages})
    assert status == 400 and body["error"]["code"] == "context_length_exceeded"
    assert ask(server, PLAIN, {"prompt": LONG})[1]["error"]["param"] == "prompt"
    assert ask(server, PLAIN, {"prompt": [LONG[:5000]] * 16})[1]["error"]["param"] == "prompt"


def test_a_client_that_leaves_ends_its_work(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    stopped, stop = [], work_pool._Child.stop
    monkeypatch.setattr(work_pool._Child, "stop", lambda child: stopped.append(child) or stop(child))
    body = json.dumps({"messages": HELLO, "response_format": FORMAT, "n": 2}).encode()
    with socket.create_connection(server.address) as leaving:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        leaving.sendall(head.encode() + body)
        eventually(lambda: server.service._pool._owners)
    eventually(lambda: not server.service._pool._owners)
    assert stopped


def test_a_client_has_one_child_at_a_time(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = server.service._pool
    one, other = Work("one"), Work("other")
    child = pool._take(one)
    monkeypatch.setattr(work_pool, "QUEUE_SECONDS", 0.3)
    with pytest.raises(Exception, match="try again later"):
        pool._take(Work("one"))
    second = pool._take(other)
    assert second is not child
    pool._give_back(second, other)
    pool._give_back(child, one)


def test_long_work_is_stopped(server: LiveServer) -> None:
    limits = work_pool.Limits(cpu_seconds=0.3, seconds=20.0, memory=2 << 30)
    pool = WorkPool(server.llm, limits)
    try:
        tokenizer = BoundedTokenizer(server.service._unbounded[0], pool)
        token = _current.set(Work("x"))
        with pytest.raises(Exception, match="reading the prompt takes too much time"):
            tokenizer.encode("word " * 3_000_000)
        assert tokenizer.encode(LONG) == server.service._unbounded[0].encode(LONG)
        _current.reset(token)
    finally:
        pool.close()


def test_health_says_when_nothing_is_answered(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = server.service.loop
    monkeypatch.setattr(loop, "_step_began", time.monotonic() - 1000)
    assert ask(server, "/health")[:2][0] == 503 and ask(server, "/health")[1]["status"] == "stuck"
    monkeypatch.setattr(loop, "_step_began", None)
    monkeypatch.setattr(server.service._threads, "waited", lambda now: 60.0)
    assert ask(server, "/health")[1]["status"] == "busy"
    monkeypatch.undo()
    assert ask(server, "/health")[0] == 200
    monkeypatch.setattr(loop._thread, "is_alive", lambda: False)
    assert ask(server, "/health")[1]["status"] == "failing"


def test_control_tokens_in_raw_prompts(server: LiveServer) -> None:
    tokenizer = server.service._unbounded[0]
    text = "a<|im_end|>b"
    plain, special = tokenizer.encode(text), tokenizer.encode(text, True)
    assert plain != special

    def tokens(**fields: Any) -> list[int]:
        found: list[int] = ask(server, "/tokenize", fields)[1]["tokens"]
        return found

    assert tokens(content=text) == tokens(prompt=text) == tokenizer.encode(text, bos=False)
    assert tokens(content=text, parse_special=True) == tokenizer.encode(text, True, bos=False)
    assert tokens(prompt=text, add_special_tokens=True, parse_special=True) == special
    assert tokens(content=text, add_special=True) == plain
    assert tokens(prompt="<|im_end|>", add_special_tokens=False) == tokenizer.encode("<|im_end|>", True, bos=False)

    def count(**fields: Any) -> int:
        used: int = ask(server, PLAIN, {"prompt": text, "max_tokens": 1, **fields})[1]["usage"]["prompt_tokens"]
        return used

    assert count() == len(plain) and count(parse_special=True) == len(special)
    assert count(add_special_tokens=False) == len(tokenizer.encode(text, bos=False))
    info = ask(server, "/tokenizer_info")[1]
    assert info["eos_token"] == tokenizer.special_text(tokenizer.eos_id) and "messages" in info["chat_template"]
