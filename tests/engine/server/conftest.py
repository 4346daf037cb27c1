"""What tests of the server have in common: one with a tiny model for a module, its client, and a browser."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from http_ask import client_of
from live_server import LiveServer, live_server
from openai import OpenAI
from page_browser import ARGUMENTS, CHROMIUM

import svdengine
from svdengine import LLM


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[LiveServer]:
    with live_server(folder, capacity=16, max_body=20_000, body_seconds=3.0) as server:
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


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is missing")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium to show the page")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()
