"""What the chat page reads besides text: neurons by layer, the path of a request, what runs, and files once."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from http_ask import ask
from live_server import LiveServer, live_server

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 6}
LAYERS: dict[str, Any] = {"stream": True, "ignore_eos": True, "stream_options": {"include_layers": True}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("layers"), sparse=True) as server:
        yield server


def pieces(server: LiveServer, path: str = CHAT, **fields: Any) -> list[dict[str, Any]]:
    status, text, _ = ask(server, path, {**BODY, **LAYERS, **fields})
    assert status == 200
    lines = [line[6:] for line in text.split("\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines[:-1]]


def layers(found: list[dict[str, Any]]) -> list[Any]:
    return [each for piece in found for each in piece.get("svdengine", {}).get("layers", [])]


def test_a_stream_tells_the_neurons_of_each_token_by_layer(server: LiveServer) -> None:
    found = layers(pieces(server))
    assert len(found) == 6
    for each in found:
        assert each.keys() == {"predicted_density", "active_density"}
        for active, predicted in zip(each["active_density"], each["predicted_density"], strict=True):
            assert 0 < active <= predicted < 1
        assert len(each["active_density"]) == server.llm.config.layer_count
    usage = ask(server, CHAT, {**BODY, "ignore_eos": True})[1]["usage"]["svdengine"]
    mean = sum(sum(each["active_density"]) / len(each["active_density"]) for each in found) / 6
    assert abs(mean - usage["active_density"]) < 0.1  # which has the prompt's tokens too


def test_it_does_so_only_where_it_is_asked_to(server: LiveServer) -> None:
    assert layers(pieces(server, stream_options={"include_usage": True})) == []
    assert layers(pieces(server, stream_options=None)) == []
    status, body, _ = ask(server, CHAT, {**BODY, "stream_options": {"include_layers": True}})
    assert status == 200 and "svdengine" not in body  # not streamed
    status, body, _ = ask(server, CHAT, {**BODY, "stream": True, "stream_options": {"include_layers": 1}})
    assert status == 400 and body["error"]["param"] == "include_layers"


def test_completions_tell_them_too(server: LiveServer) -> None:
    prompt = {"prompt": "hello", **LAYERS, "temperature": 0, "max_tokens": 4}
    text = ask(server, "/v1/completions", prompt)[1]
    lines = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]
    assert len(layers(lines)) == 4


def test_a_request_chooses_its_path(server: LiveServer) -> None:
    assert layers(pieces(server, ffn="dense")) == [None] * 6
    _, body, _ = ask(server, CHAT, {**BODY, "ffn": "dense"})
    assert body["usage"]["svdengine"]["active_density"] is None
    _, body, _ = ask(server, CHAT, BODY)
    assert body["usage"]["svdengine"]["active_density"] > 0
    lax, strict = (layers(pieces(server, ffn="sparse", sparsity_bias=bias)) for bias in (-1.0, 1.0))
    assert sum(lax[0]["predicted_density"]) > sum(strict[0]["predicted_density"])
    status, body, _ = ask(server, CHAT, {**BODY, "ffn": "fast"})
    assert (
        status == 400 and body["error"]["param"] == "ffn" and "dense, exact, sparse, auto" in body["error"]["message"]
    )


def test_a_model_without_a_predictor_refuses_the_sparse_path(tmp_path: Path) -> None:
    with live_server(tmp_path) as server:
        status, body, _ = ask(server, CHAT, {**BODY, "ffn": "sparse"})
        assert status == 400 and "has no predictor" in body["error"]["message"]
        assert ask(server, "/v1/models")[1]["data"][0]["svdengine"]["predictor"] is None


def test_what_the_server_says_of_its_model(server: LiveServer) -> None:
    (model,) = ask(server, "/v1/models")[1]["data"]
    told, config = model["svdengine"], server.llm.config
    assert (told["layers"], told["ffn_size"], told["context"]) == (config.layer_count, config.ffn_size, 256)
    assert (told["device"], told["ffn"], told["sparse"], told["formats"]) == ("reference", "sparse", True, ["f32"])
    assert told["parameters"] == server.llm.model_file.parameter_count and told["size_bytes"] > 0
    assert told["defaults"]["temperature"] == 0.7 and told["defaults"]["top_k"] == 50
    assert told["predictor"] == {"kind": "svd", "predicted_density": 0.25, "active_density": 0.15}


def test_browsers_load_a_file_once(server: LiveServer) -> None:
    status, text, headers = ask(server, "/main.js")
    assert status == 200 and "import" in text and headers["cache-control"] == "no-cache"
    assert ask(server, "/main.js", if_none_match=headers["etag"])[0] == 304
    assert ask(server, "/main.js", if_none_match='"other"')[0] == 200
    assert ask(server, "/vendor/LICENSES.txt")[1].count("\n----") >= 4
    assert ask(server, "/vendor/../app.py")[0] == 404
