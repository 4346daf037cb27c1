"""The server's log: a line for each request, and never what was asked, unless it is wanted."""

from __future__ import annotations

import json
import logging
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="the server needs uvicorn")
from live_server import live_server

from svdengine.errors import RequestError
from svdengine.server.request_log import log_request, set_up_log

SECRET = "my secret question"


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    log = logging.getLogger("svdengine.server")
    before = log.handlers[:], log.level, log.propagate
    yield
    for handler in log.handlers:
        if handler not in before[0]:
            handler.close()
    log.handlers[:], log.propagate = before[0], before[2]
    log.setLevel(before[1])


def ask(url: str, path: str, body: dict[str, object] | None = None) -> int:
    data = json.dumps(body).encode() if body is not None else None
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, data)) as answer:
            answer.read()
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.read()
        return error.code


def logged(folder: Path, **how: bool) -> list[str]:
    file = folder / "serve.log"
    prompts = how.pop("log_prompts", False)
    set_up_log(**{"verbose": False, "quiet": False, **how}, file=file)
    with live_server(folder, log_prompts=prompts) as server:
        chat = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 2}
        assert ask(server.url, "/v1/chat/completions", chat) == 200
        assert ask(server.url, "/v1/chat/completions", {"messages": SECRET}) == 400
        assert ask(server.url, "/health") == 200 and ask(server.url, "/nothing%0Ahere") == 404
    return file.read_text(encoding="utf-8").splitlines()


def test_a_line_for_each_request(tmp_path: Path) -> None:
    lines = logged(tmp_path)
    assert [" ".join(line.split()[2:7]) for line in lines] == [
        "INFO 127.0.0.1 POST /v1/chat/completions 200",
        "INFO 127.0.0.1 POST /v1/chat/completions 400",
        "INFO 127.0.0.1 GET /nothing?here 404",
    ]
    assert all(line.endswith(" s") for line in lines) and "secret" not in "".join(lines)


def test_more_and_less(tmp_path: Path) -> None:
    assert sum("/health" in line for line in logged(tmp_path, verbose=True)) == 1
    (tmp_path / "serve.log").unlink()
    assert logged(tmp_path, quiet=True) == []


def test_prompts_only_when_they_are_wanted(tmp_path: Path) -> None:
    lines = logged(tmp_path, log_prompts=True)
    assert sum(SECRET in line for line in lines) == 2 and len(lines) == 5


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot write the log"):
        set_up_log(verbose=False, quiet=False, file=tmp_path / "no" / "serve.log")


def test_faults_are_warnings_and_paths_cannot_forge_lines(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "svdengine.server"):
        logging.getLogger("svdengine.server").propagate = True
        log_request("1.2.3.4", "GET", "/a\nINFO 127.0.0.1 POST /x 200", 500, 0.1, page=False)
    assert caplog.records[0].levelname == "WARNING" and "\n" not in caplog.records[0].getMessage()
