"""Replicas by Ray Serve: two of them behind one address. Ray is large, and not among the tests' packages."""

import json
import os
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE
from tiny_model import write_tiny_model

from svdengine.errors import RequestError
from svdengine.tools.server_process import free_port

ray = pytest.importorskip("ray", reason="ray, which runs replicas, is not installed: pip install 'svdengine[ray]'")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("ray") / "tiny.svdp")


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    from ray import serve

    from svdengine.server.ray_app import app

    port = free_port()
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}})
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(app({"model": str(model), "replicas": "2", "device": "reference", "context": "128"}))
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def ask(url: str, body: Any = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data), timeout=PATIENCE) as response:
        return str(response.read().decode())


def test_replicas_answer(url: str) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    answers = {
        json.loads(ask(url + "/v1/chat/completions", body))["choices"][0]["message"]["content"] for _ in range(6)
    }
    assert len(answers) == 1
    assert ask(url + "/v1/chat/completions", {**body, "stream": True}).endswith("data: [DONE]\n\n")
    assert "<!doctype html>" in ask(url + "/")


def test_unusable_arguments(model: Path) -> None:
    from svdengine.server.ray_app import app

    for arguments, message in (
        ({}, "give the model file"),
        ({"model": "x", "replicas": "none"}, "replicas must be a whole number"),
        ({"model": "x", "colour": "red"}, "'colour' is no argument"),
    ):
        with pytest.raises(RequestError, match=message):
            app(arguments)
