"""The load and soak tools, on a server with a tiny model: they measure, and they notice what is wrong."""

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import LiveServer, live_server
from tiny_model import write_tiny_model

from svdengine.errors import SvdEngineError
from svdengine.tools import bench_server, soak_server
from svdengine.tools.bench_server import Load, markdown, row_of, run_load
from svdengine.tools.http_client import Address, request
from svdengine.tools.server_process import free_port, llama_cpp_command, running, svdengine_command
from svdengine.tools.soak_server import Report, soak, summary


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LiveServer]:
    write_tiny_model(tmp_path / "tiny.svdp", max_position=2048)
    with live_server(tmp_path, context=1024, capacity=6, max_body=1 << 20) as server:
        yield server


def address_of(server: LiveServer) -> Address:
    return Address(server.address[1])


def test_a_soak_of_a_sound_server(server: LiveServer) -> None:
    report = Report()
    asyncio.run(soak(address_of(server), 1.0, 8, 1, report))
    assert report.problems == [] and report.counts["answered"] > 0
    assert "answered" in summary(report) and report.memory


def test_a_soak_notices_errors_and_what_is_kept(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report()
    server.gate.fail = True
    asyncio.run(soak(address_of(server), 0.5, 4, 1, report))
    assert any("status 500" in text for text in report.problems) and "problem: " in summary(report)
    server.gate.fail = False
    server.llm._engine.pool.allocate(1)
    monkeypatch.setattr(soak_server, "_IDLE_SECONDS", 0.5)
    report = Report()
    asyncio.run(soak(address_of(server), 0.0, 1, 1, report))
    assert "still has" in report.problems[0]


def test_a_soak_notices_memory_that_grows() -> None:
    for memory, grows in (([100 << 20] * 30, False), ([(100 + 5 * i) << 20 for i in range(30)], True)):
        report = Report(memory=memory)
        soak_server._check_memory(report)
        assert bool(report.problems) == grows


def test_a_load_is_measured(server: LiveServer) -> None:
    load = asyncio.run(run_load(address_of(server), 3, 6, 12))
    assert len(load.first) == 6 and 6 < load.tokens <= 6 * 12 and len(load.gaps) == load.tokens - 6
    row = row_of("svdengine", 3, load)
    assert row.tokens_per_second == pytest.approx(load.tokens / load.seconds)
    assert row.first_p50 <= row.first_p99 and row.gap_p50 <= row.gap_p99
    lines = markdown([row], ["a note"]).splitlines()
    assert len({line.count("|") for line in lines[:3]}) == 1 and lines[-1] == "a note"
    with pytest.raises(SvdEngineError, match="no text"):
        row_of("x", 1, Load())


def test_a_load_that_is_refused_is_an_error(server: LiveServer) -> None:
    with pytest.raises(SvdEngineError, match="answered 400"):
        asyncio.run(run_load(address_of(server), 1, 1, 0))


def test_servers_in_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDENGINE_DEVICE", "reference")
    model, port = write_tiny_model(tmp_path / "tiny.svdp"), free_port()

    async def status(address: Address) -> Any:
        async with request(address, "/health") as response:
            return response.status, await response.body()

    with running(svdengine_command(model, port, "--context", "64"), port) as address:
        assert asyncio.run(status(address))[0] == 200
    with pytest.raises(SvdEngineError, match="ended at its start"), running([sys.executable, "-c", "1/0"], port):
        pass
    command = llama_cpp_command(model, port, 2, 512)
    assert "llama_cpp.server" in command and f"--port={port}" in command


def test_wrong_usage() -> None:
    for main, arguments in (
        (bench_server.main, ["--rounds", "0"]),
        (soak_server.main, ["x.svdp", "--clients", "0"]),
    ):
        with pytest.raises(SystemExit) as raised:
            main(arguments)
        assert raised.value.code == 2
