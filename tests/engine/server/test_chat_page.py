"""The chat page in Chromium, where it is installed: asking, stopping, errors, keys, a full context."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import LiveServer, live_server
from page_browser import (
    answered,
    ask,
    done,
    fits,
    open_page,
    opened,
    show,
    violations,
    wait_for_speed,
    wait_until,
    watched,
)
from patience import eventually

from svdengine import SamplingParams
from svdengine.server.web_files import WEB_FILES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[LiveServer]:
    """Its answer is a row of the letter x."""
    with live_server(folder, capacity=1) as server:
        x = server.llm.tokenizer.encode("x")[0]
        server.llm.default_params = SamplingParams(temperature=0, logit_bias={x: 100.0}, ignore_eos=True)
        yield server


@pytest.fixture(params=["desktop", "phone"])
def page(browser: Any, request: pytest.FixtureRequest, server: LiveServer) -> Iterator[Any]:
    with opened(browser, request.param) as page:
        yield page
    server.gate.let_go()
    wait_until_idle(server)


def wait_until_idle(server: LiveServer) -> None:
    eventually(lambda: not server.service.loop.request_count)


def short(page: Any, tokens: int) -> None:
    """Have answers end after so many tokens."""
    page.click("#open-settings")
    page.fill("#max-tokens", str(tokens))
    page.click("#settings >> text=Save")


def test_a_conversation(page: Any, server: LiveServer) -> None:
    open_page(page, server)
    assert page.is_visible("#welcome") and page.is_disabled("#send")
    server.gate.hold()
    ask(page, "hello")
    server.gate.allow(12)
    wait_until(page, "document.querySelector('.assistant .text')?.textContent.includes('xxxx')")
    assert page.get_attribute("#send", "aria-label") == "Stop" and not page.is_visible("#welcome")
    server.gate.let_go()
    done(page)
    text = page.inner_text(".assistant .text")
    assert set(text) == {"x"} and len(text) > 100
    about = page.inner_text(".assistant .figures")
    assert "tokens/s" in about and f"{len(text)} tokens" in about and "length limit reached" in about
    assert page.inner_text("#gauge-text") == "256 of 256 tokens"
    page.reload()
    page.wait_for_selector(".assistant .text")
    assert page.inner_text(".assistant .text") == text and page.inner_text(".user .text") == "hello"
    assert fits(page) and page.problems == []


def test_stopping_keeps_what_was_counted(page: Any, server: LiveServer) -> None:
    open_page(page, server)
    server.gate.hold()
    page.click("#suggestions button >> nth=0")
    server.gate.allow(20)
    wait_for_speed(page, server, "document.querySelector('.assistant .figures')?.textContent.includes('tokens/s')")
    page.click("#send")
    done(page)
    figures = page.inner_text(".assistant .figures")
    assert "stopped" in figures and "tokens/s" in figures
    assert f"{len(page.inner_text('.assistant .text'))} tokens" in figures
    server.gate.let_go()
    wait_until_idle(server)
    assert server.blocks_in_use() == 0
    stopped = page.inner_text(".assistant .text")
    page.click("text=Go on")
    page.wait_for_selector(".assistant .versions >> text=2 / 2")
    done(page)
    assert page.inner_text(".assistant .text").startswith(stopped)
    assert page.locator(".assistant").count() == 1 and page.problems == []


def test_an_answer_without_a_word_says_so(page: Any, server: LiveServer, tmp_path: Path) -> None:
    open_page(page, server)
    show(page, [("user", "hello"), ("assistant", ""), ("user", "and now?"), ("assistant", "yes")], tmp_path)
    assert page.locator(".silent").all_inner_texts() == ["The model ended its answer at once."]
    assert page.inner_text(".message.assistant .actions") == "Again"
    assert violations(page) == []


def test_the_settings_end_with_what_saves_them(page: Any, server: LiveServer) -> None:
    """In view on a phone too, with two numbers a line."""
    open_page(page, server)
    page.click("#open-settings")
    save = page.locator("#settings >> text=Save").bounding_box()
    assert save["y"] + save["height"] <= page.viewport_size["height"]
    first, second = (page.locator(f"#{name}").bounding_box() for name in ("temperature", "top-k"))
    assert first["y"] == second["y"] and first["x"] + first["width"] < second["x"]
    assert violations(page) == []


def test_escape_stops(page: Any, server: LiveServer) -> None:
    open_page(page, server)
    server.gate.hold()
    ask(page, "hello")
    server.gate.allow(20)
    wait_until(page, "document.querySelector('.assistant .text')?.textContent.includes('x')")
    page.keyboard.press("Escape")
    done(page)
    server.gate.let_go()
    assert "stopped" in page.inner_text(".assistant .figures") and page.problems == []


def test_errors_are_shown(page: Any, server: LiveServer) -> None:
    open_page(page, server)
    server.gate.hold()
    ask(page, "hello")
    other = watched(page.context.new_page())
    open_page(other, server)
    eventually(lambda: server.service.loop.request_count)
    ask(other, "hello")
    assert "try again later" in other.inner_text("[role=alert]")
    server.gate.let_go()
    done(page)
    other.click("[role=alert] button")
    other.wait_for_selector("#messages[aria-busy=false] .figures:has-text('tokens')")


def test_a_server_that_went_is_named(browser: Any, folder: Path) -> None:
    with opened(browser) as page:
        with live_server(folder) as server:
            open_page(page, server)
        ask(page, "hello")
        assert page.inner_text("[role=alert] span") == "The server cannot be reached."


def test_the_page_asks_for_a_key(page: Any, folder: Path) -> None:
    with live_server(folder, api_keys=("secret",)) as server:
        page.goto(server.url)
        page.wait_for_selector("dialog[open] >> text=asks for an API key")
        page.fill("#key", "wrong")
        page.click("#settings >> text=Save")
        page.wait_for_selector("dialog[open] >> text=does not know this API key")
        page.fill("#key", "secret")
        page.click("#settings >> text=Save")
        wait_until(page, "document.title === 'tiny'")
        answered(page, "hello")


def test_a_full_context_goes_on_without_the_oldest_turns(page: Any, server: LiveServer) -> None:
    open_page(page, server)
    short(page, 60)
    for question in ("first", "second", "third"):
        answered(page, question)
    assert int(page.inner_text("#gauge-text").split()[0]) > 200
    assert page.get_attribute("#gauge", "role") == "meter" and "nearly" in page.get_attribute("#gauge", "class")
    ask(page, "fourth " * 12)
    page.wait_for_selector("[role=alert] >> text=maximum context length is 256 tokens")
    page.click("text=Go on without the oldest turns")
    page.wait_for_selector("#messages[aria-busy=false] .message.assistant:last-of-type .figures:has-text('60 tokens')")
    assert page.locator(".divider").count() == 1
    below = page.evaluate("document.querySelector('.divider').nextElementSibling.textContent")
    assert "third" in below or "fourth" in below
    answered(page, "fifth")
    assert page.locator("[role=alert]").count() == 0 and page.locator(".user").count() == 5
    used = int(page.inner_text("#gauge-text").split()[0])
    assert used <= 256 and page.problems.count("") == 0
    page.reload()
    page.wait_for_selector(".divider")


def test_an_answer_that_fills_the_context_can_go_on(page: Any, server: LiveServer) -> None:
    open_page(page, server)
    short(page, 90)
    answered(page, "first")
    short(page, 1000)
    ask(page, "second")
    page.wait_for_selector("[role=alert] >> text=The context is full")
    text = page.locator(".assistant .text").last.inner_text()
    page.click("text=Go on without the oldest turns")
    page.wait_for_selector(".message.assistant:last-of-type .versions >> text=2 / 2")
    done(page)
    assert len(page.locator(".assistant .text").last.inner_text()) > len(text)


def test_nothing_comes_from_elsewhere(page: Any, server: LiveServer) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    response = page.goto(server.url)
    wait_until(page, "document.title === 'tiny'")
    assert all(url.startswith((server.url, "data:")) for url in asked)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('img'), {src: 'http://127.0.0.1:9/x.png'}))"
    )
    blocked = page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'loaded', () => 'blocked')")
    assert blocked == "blocked" and any("Content Security Policy" in text for text in page.problems)


def test_the_page_is_small() -> None:
    sizes = {path: len(file.read_bytes()) for path, file in WEB_FILES.items()}
    assert {"/", "/main.js", "/vendor/libraries.js", "/vendor/LICENSES.txt"} <= sizes.keys()
    assert sum(sizes.values()) < 700_000
