"""The chat page in Chromium: how tests open it, wait, and look for what is wrong."""

import functools
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from live_server import LiveServer
from patience import PATIENCE

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# Without these a browser that reaches no network waits for it, and root may not start one.
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
ARGUMENTS += ["--disable-component-update", "--disable-quic"]

SIZES = {"desktop": (1280, 800), "phone": (390, 844), "small": (320, 568), "large": (430, 932), "landscape": (740, 360)}


@contextmanager
def opened(browser: Any, size: str = "desktop", **options: Any) -> Iterator[Any]:
    """A page of a browser of its own, which notes what goes wrong in `problems`."""
    width, height = SIZES[size]
    phone = size != "desktop"
    viewport = {"width": width, "height": height}
    context = browser.new_context(viewport=viewport, is_mobile=phone, has_touch=phone, **options)
    context.set_default_timeout(1000 * PATIENCE)
    try:
        yield watched(context.new_page())
    finally:
        context.close()


def watched(page: Any) -> Any:
    """The page, with a list of its errors."""
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda message: page.problems.append(message.text) if message.type == "error" else None)
    return page


def wait_until(page: Any, condition: str) -> None:
    """Playwright's own way is what the page's policy forbids."""
    last = time.monotonic() + PATIENCE
    while not page.evaluate(condition):
        assert time.monotonic() < last, condition
        page.wait_for_timeout(20)


def wait_for_speed(page: Any, server: LiveServer, shown: str, tokens: int = 60) -> None:
    """Wait until an answer's speed is shown, which tokens that all come at once do not have: they come one by one."""
    for _ in range(tokens):
        if page.evaluate(shown):
            return
        server.gate.allow(1)
        page.wait_for_timeout(100)
    wait_until(page, shown)


def open_page(page: Any, server: LiveServer) -> None:
    page.goto(server.url)
    wait_until(page, f"document.title === '{server.settings.name}'")


def ask(page: Any, text: str) -> None:
    """Ask, and have the answer begun."""
    page.fill("#input", text)
    page.click("#send")


def answered(page: Any, text: str) -> str:
    """Ask, and wait for the whole answer."""
    before = page.locator(".message.user").count()
    ask(page, text)
    wait_until(page, f"document.querySelectorAll('.message.user').length === {before + 1}")
    page.wait_for_selector("#messages[aria-busy=false] .message.assistant:last-of-type .figures:has-text('token')")
    return str(page.locator(".message.assistant .text").last.inner_text())


def done(page: Any) -> None:
    page.wait_for_selector("#messages[aria-busy=false]")


def show(page: Any, messages: list[tuple[str, str]], folder: Path, title: str = "Shown") -> None:
    """Have the page show messages of a role and a text, by a file that it reads."""
    listed = [
        {"id": str(i), "parent": str(i - 1) if i else None, "role": role, "content": text}
        for i, (role, text) in enumerate(messages)
    ]
    file = folder / "shown.json"
    conversations = [{"title": title, "messages": listed}]
    file.write_text(json.dumps({"format": "svdengine-conversations", "version": 1, "conversations": conversations}))
    page.set_input_files("#import-file", file)
    wait_until(page, f"document.querySelectorAll('.message').length === {len(messages)}")


def fits(page: Any) -> bool:
    """Whether nothing makes the page wider than the screen."""
    wide = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    inner = "document.getElementById('scroll').scrollWidth <= document.getElementById('scroll').clientWidth"
    return bool(page.evaluate(f"{wide} && {inner} && innerWidth <= outerWidth"))


@functools.cache
def _axe() -> str:
    import axe_playwright_python

    return (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")


def violations(page: Any) -> list[str]:
    """What axe finds wrong with the page as it is."""
    page.evaluate(_axe())
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [f"{each['id']}: {[node['html'][:160] for node in each['nodes']]}" for each in found]
