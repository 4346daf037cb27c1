"""The chat page in a real browser: Chromium, headless, where it is installed."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import LiveServer, live_server

from svdengine import SamplingParams

playwright = pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is not installed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to show the page")

# Without these a browser that reaches no network waits for it, and root may not start one.
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
ARGUMENTS += ["--disable-component-update", "--disable-quic"]

HOSTILE = '<img src="x" onerror="document.title=\'broken\'"><script>document.title="broken"</script>'
MARKDOWN = f"""# A title
Some **bold**, *italic* and `code()` text. {HOSTILE}

1. first
   - inner
2. second

> quoted

```python
print("{"wide " * 60}")
{HOSTILE}
```
{"long" * 100}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


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
def page(browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    phone = request.param == "phone"
    size = {"width": 390, "height": 844} if phone else {"width": 1280, "height": 800}
    context = browser.new_context(viewport=size, is_mobile=phone, has_touch=phone)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.set_default_timeout(20_000)
    page.problems = problems
    yield page
    context.close()


def wait_until(page: Any, condition: str) -> None:
    """Playwright's own way is what the page's policy forbids."""
    last = time.monotonic() + 20
    while not page.evaluate(condition):
        assert time.monotonic() < last, condition
        page.wait_for_timeout(20)


def open_page(page: Any, server: LiveServer) -> None:
    page.goto(server.url)
    wait_until(page, "document.title === 'tiny'")


def ask(page: Any, text: str) -> None:
    page.fill("#input", text)
    page.click("#send")


def test_a_conversation(page: Any, server: LiveServer) -> None:
    open_page(page, server)
    assert page.is_visible("#welcome") and page.is_disabled("#send")
    server.gate.hold()
    ask(page, "hello")
    server.gate.allow(12)
    wait_until(page, "document.querySelector('.assistant .text').textContent.includes('xxxx')")
    assert page.get_attribute("#send", "aria-label") == "Stop" and not page.is_visible("#welcome")
    server.gate.let_go()
    page.wait_for_selector("#messages[aria-busy=false]")
    text = page.inner_text(".assistant .text")
    assert set(text) == {"x"} and len(text) > 100
    about = page.inner_text(".assistant .figures")
    assert "tokens/s" in about and f"{len(text)} tokens" in about and "length limit reached" in about
    page.reload()
    assert page.inner_text(".assistant .text") == text and page.inner_text(".user .text") == "hello"
    page.click("text=New chat")
    assert page.is_visible("#welcome") and page.locator(".message").count() == 0
    assert page.problems == []


def test_stopping_and_asking_again(page: Any, server: LiveServer) -> None:
    open_page(page, server)
    server.gate.hold()
    page.click("#suggestions button >> nth=0")
    server.gate.allow(80)
    wait_until(page, "document.querySelector('.assistant .text').textContent.includes('x')")
    page.click("#send")
    page.wait_for_selector("#messages[aria-busy=false]")
    assert "stopped" in page.inner_text(".assistant .figures")
    server.gate.let_go()
    last = time.monotonic() + 20
    while server.service.loop.request_count:
        assert time.monotonic() < last
        time.sleep(0.01)
    assert server.blocks_in_use() == 0
    page.click("[data-again]")
    page.wait_for_selector("#messages[aria-busy=false] .assistant .figures:has-text('tokens/s')")
    assert page.locator(".assistant").count() == 1 and page.problems == []


def test_output_is_text(page: Any, server: LiveServer) -> None:
    messages = [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": MARKDOWN}]
    page.add_init_script(f"localStorage.setItem('svdengine.conversation', {json.dumps(json.dumps(messages))})")
    open_page(page, server)
    assert page.locator("main img, main script").count() == 0
    assert page.inner_text(".user .text") == HOSTILE
    assert page.inner_text(".assistant").count(HOSTILE) == 2
    for selector, text in (
        ("h1", "A title"),
        ("strong", "bold"),
        ("em", "italic"),
        ("p code", "code()"),
        ("ol > li > ul > li", "inner"),
        ("blockquote", "quoted"),
    ):
        assert page.inner_text(f".assistant .text {selector}") == text
    assert page.inner_text(".code .bar span") == "python"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("document.getElementById('scroll').scrollWidth <= innerWidth")
    assert page.title() == "tiny" and page.problems == []


def test_errors_are_shown(page: Any, server: LiveServer) -> None:
    open_page(page, server)
    ask(page, "y" * 3000)
    assert "maximum context length is 256 tokens" in page.inner_text("[role=alert]")
    page.click("text=New chat")
    server.gate.hold()
    ask(page, "hello")
    other = page.context.new_page()
    open_page(other, server)
    other.click("text=New chat")
    while not server.service.loop.request_count:
        time.sleep(0.01)
    ask(other, "hello")
    assert "try again later" in other.inner_text("[role=alert]")
    server.gate.let_go()
    page.wait_for_selector("#messages[aria-busy=false]")
    other.click("[role=alert] button")
    other.wait_for_selector("#messages[aria-busy=false] .figures:has-text('tokens')")


def test_the_page_asks_for_a_key(page: Any, folder: Path) -> None:
    with live_server(folder, api_keys=("secret",)) as server:
        page.goto(server.url)
        page.wait_for_selector("dialog[open] >> text=asks for an API key")
        page.fill("#key", "wrong")
        page.click("text=Save")
        page.wait_for_selector("dialog[open] >> text=does not know this API key")
        page.fill("#key", "secret")
        page.click("text=Save")
        wait_until(page, "document.title === 'tiny'")
        ask(page, "hello")
        page.wait_for_selector("#messages[aria-busy=false] .assistant .figures:has-text('tokens')")


def test_nothing_comes_from_elsewhere(page: Any, server: LiveServer) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    response = page.goto(server.url)
    wait_until(page, "document.title === 'tiny'")
    assert all(url.startswith((server.url, "data:")) for url in asked)
    assert "default-src 'none'" in response.headers["content-security-policy"]
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('img'), {src: 'http://127.0.0.1:9/x.png'}))"
    )
    blocked = page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'loaded', () => 'blocked')")
    assert blocked == "blocked" and any("Content Security Policy" in text for text in page.problems)
