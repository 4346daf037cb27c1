"""/v1/embeddings and /api/embed: the vectors of the library, in the shapes that clients read."""

import base64
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from http_ask import ask
from live_server import LiveServer, live_server
from numpy.typing import NDArray

PATH = "/v1/embeddings"
TEXTS = ["hello", "once upon a time", "hello world, äöü"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("embeddings"), embeddings=True, capacity=4) as server:
        yield server
        assert server.service.loop.request_count == 0 and server.blocks_in_use() == 0


def vectors(server: LiveServer, **body: Any) -> NDArray[np.float32]:
    status, found, _ = ask(server, PATH, {"model": "tiny", **body})
    assert status == 200, found
    assert found["object"] == "list" and [each["index"] for each in found["data"]] == list(range(len(found["data"])))
    return np.array([each["embedding"] for each in found["data"]], np.float32)


def test_vectors_are_those_of_the_library(server: LiveServer) -> None:
    expected = server.llm.embed(TEXTS)
    assert np.abs(vectors(server, input=TEXTS) - expected).max() < 1e-6
    assert np.abs(vectors(server, input=TEXTS[0]) - expected[:1]).max() < 1e-6
    ids = [server.llm.tokenizer.encode(text) for text in TEXTS]
    assert np.abs(vectors(server, input=ids) - expected).max() < 1e-6
    assert np.abs(vectors(server, input=ids[1]) - expected[1]).max() < 1e-6
    assert np.abs(vectors(server, input=["hello", ids[1], TEXTS[2]]) - expected).max() < 1e-6
    last = server.llm.embed(TEXTS, pooling="last")
    assert np.abs(vectors(server, input=TEXTS, pooling="last") - last).max() < 1e-6
    assert np.abs(last - expected).max() > 0.01


def test_base64_is_float32_of_little_end(server: LiveServer) -> None:
    body = {"input": TEXTS, "encoding_format": "base64", "user": "u", "dimensions": server.llm.config.hidden_size}
    _, found, _ = ask(server, PATH, body)
    read = [np.frombuffer(base64.b64decode(each["embedding"]), "<f4") for each in found["data"]]
    assert np.abs(np.stack(read) - server.llm.embed(TEXTS)).max() < 1e-6
    tokens = sum(len(server.llm.tokenizer.encode(text)) for text in TEXTS)
    assert found["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens} and found["model"] == "tiny"


def test_more_texts_than_the_queue_has_places(server: LiveServer) -> None:
    texts = [f"hello {i}" for i in range(11)]
    found: list[Any] = []
    others = [threading.Thread(target=lambda: found.append(vectors(server, input=texts))) for _ in range(2)]
    others[0].start()
    others[0].join()
    assert np.abs(found[0] - server.llm.embed(texts)).max() < 1e-6


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "input", "missing"),
        ({"input": ""}, "input", "empty"),
        ({"input": []}, "input", "empty"),
        ({"input": ["a", ""]}, "input[1]", "empty"),
        ({"input": [[]]}, "input[0]", "empty"),
        ({"input": ["a", 1]}, "input", "a list of token ids"),
        ({"input": [10**6]}, None, "token id"),
        ({"input": ["a"] * 2049}, "input", "2048"),
        ({"input": "x " * 400}, "input", "maximum context length is 256 tokens"),
        ({"input": "a", "dimensions": 64}, "dimensions", "cannot be shortened"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "float"),
        ({"input": "a", "pooling": "cls"}, "pooling", "mean"),
        ({"input": "a", "stream": True}, "stream", "not a field"),
    ],
)
def test_errors(server: LiveServer, body: Any, param: str | None, message: str) -> None:
    status, found, _ = ask(server, PATH, body)
    assert status == 400 and found["error"]["param"] == param and message in found["error"]["message"], found
    assert ask(server, PATH, {"input": "a", "model": "other"})[0] == 404


def test_an_answer_has_a_largest_size(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svdengine.server.embeddings.MAX_NUMBERS", 3 * server.llm.config.hidden_size)
    assert vectors(server, input=["a"] * 3).shape[0] == 3
    for path, said in ((PATH, lambda e: e["message"]), ("/api/embed", str)):
        status, found, _ = ask(server, path, {"input": ["a"] * 4, "model": "tiny"})
        assert status == 400 and "input may have 3 items, found 4" in said(found["error"])


def test_ollama(server: LiveServer) -> None:
    status, found, _ = ask(server, "/api/embed", {"model": "tiny:latest", "input": TEXTS, "options": {"num_ctx": 8}})
    assert status == 200 and found["model"] == "tiny" and found["prompt_eval_count"] > 3, found
    assert np.abs(np.array(found["embeddings"], np.float32) - server.llm.embed(TEXTS)).max() < 1e-6
    for empty in ("", []):
        assert ask(server, "/api/embed", {"model": "tiny", "input": empty})[1]["embeddings"] == []
    long = "once " * 400
    cut = server.llm.tokenizer.encode(long)[:256]
    found = ask(server, "/api/embed", {"model": "tiny", "input": long})[1]
    assert np.abs(np.array(found["embeddings"]) - server.llm.embed([cut])).max() < 1e-6
    status, found, _ = ask(server, "/api/embed", {"model": "tiny", "input": long, "truncate": False})
    assert status == 400 and "maximum context length" in found["error"]


def test_it_is_off_unless_it_is_asked_for(tmp_path_factory: pytest.TempPathFactory) -> None:
    with live_server(tmp_path_factory.mktemp("off")) as server:
        for path, said in ((PATH, lambda e: e["message"]), ("/api/embed", str)):
            status, found, _ = ask(server, path, {"input": "a", "model": "tiny"})
            assert status == 404 and "mean of its hidden states" in said(found["error"])
