"""A server as it runs: full, watched, failing, ended, with keys, and beside other web pages."""

import concurrent.futures
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from http_ask import CHAT, GREEDY, HELLO, ask, client_of
from live_server import LiveServer, live_server
from openai import OpenAI
from patience import PATIENCE, eventually
from tiny_model import write_tiny_model

import svdengine
from svdengine.server.api_error import ApiError
from svdengine.server.messages import read_messages
from svdengine.server.settings import Settings, is_loopback, read_api_keys


def wait_until_idle(server: LiveServer) -> None:
    eventually(lambda: not (server.service.loop.request_count or server.service.open_responses))


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
                eventually(lambda: server.service.loop.request_count)
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


def test_a_full_queue(folder: Path) -> None:
    with live_server(folder, capacity=2) as server, concurrent.futures.ThreadPoolExecutor(2) as pool:
        server.gate.hold()
        running = [
            pool.submit(client_of(server).chat.completions.create, model="tiny", messages=HELLO, **GREEDY)
            for _ in range(2)
        ]
        eventually(lambda: server.service.loop.request_count == 2)
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
        eventually(lambda: server.service.draining)
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
        eventually(lambda: server.service.loop.request_count == 2)
        server.http.stop()
        eventually(lambda: server.service.draining)
        server.gate.let_go()
        with pytest.raises(openai.APIError, match="cut short"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="cut short"):
            whole.result()


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[None]:
    """A process that a failed test leaves behind is not waited for."""
    try:
        yield
    finally:
        process.kill()


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_the_command_ends_on_sigterm(folder: Path, server: LiveServer) -> None:
    command = [sys.executable, "-m", "svdengine", "serve", str(folder / "tiny.svdp"), "--port", "0", "--name", "small"]
    environment = {**os.environ, "SVDENGINE_DEVICE": "reference", "SVDENGINE_API_KEY": "secret"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process, ended(process):
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
        assert process.wait(PATIENCE) == 0
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
    command += ["--kv-save", str(kept)]
    heeding = lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)  # noqa: E731  # with nohup the tests do not
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=heeding
    ) as p, ended(p):  # fmt: skip
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
        assert p.wait(PATIENCE) == 0
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
