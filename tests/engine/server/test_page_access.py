"""The chat page for everyone, in Chromium: axe finds nothing in any state, narrow screens, themes, keys, settings."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import LiveServer, live_server
from page_browser import answered, ask, fits, open_page, opened, show, violations, wait_until
from test_page_markdown import MARKDOWN

from svdengine import SamplingParams

NAME = "a-model-with-a-very-long-name-that-nobody-would-think-of-breaking-anywhere-q8-2026"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("access"), sparse=True) as server:
        server.llm.default_params = SamplingParams(temperature=0.7, top_k=50, ignore_eos=True)
        yield server


@pytest.fixture(params=["light", "dark"])
def page(browser: Any, request: pytest.FixtureRequest, server: LiveServer) -> Iterator[Any]:
    with opened(browser, color_scheme=request.param, reduced_motion="reduce") as page:
        page.add_init_script("localStorage.setItem('svdengine.settings', '{\"max_tokens\": 12}')")
        open_page(page, server)
        yield page


def test_axe_finds_nothing_while_people_talk(page: Any, server: LiveServer) -> None:
    pytest.importorskip("axe_playwright_python", reason="axe, which looks for barriers, is not installed")
    assert violations(page) == []  # welcome
    server.gate.hold()
    ask(page, "hello")
    page.wait_for_selector(".waiting")
    assert violations(page) == []  # waiting
    server.gate.allow(5)
    wait_until(page, "document.querySelector('.assistant .figures').textContent.includes('token')")
    assert violations(page) == []  # answering
    server.gate.let_go()
    page.wait_for_selector("#messages[aria-busy=false]")
    page.click('.assistant button:text-is("Again")')
    page.wait_for_selector("#messages[aria-busy=false] .versions")
    assert violations(page) == []  # answered, with versions
    page.locator(".user").hover()
    page.click(".user >> text=Edit")
    assert violations(page) == []
    page.keyboard.press("Escape")
    ask(page, "y" * 3000)
    page.wait_for_selector("[role=alert]")
    assert violations(page) == []  # an error


def test_axe_finds_nothing_in_dialogs_and_the_list(page: Any, tmp_path: Path) -> None:
    pytest.importorskip("axe_playwright_python", reason="axe, which looks for barriers, is not installed")
    show(page, [("user", "hello"), ("assistant", MARKDOWN)], tmp_path)
    assert violations(page) == []  # Markdown, and a notice
    page.hover("#conversations li[data-id]")
    page.click("#conversations .round")
    assert violations(page) == []  # a menu
    page.click("[role=menu] >> text=Rename")
    assert violations(page) == []
    page.keyboard.press("Escape")
    for opener, dialog in (("#open-settings", "#settings"), ("#open-model", "#model-info")):
        page.click(opener)
        assert violations(page) == []
        page.click(f"{dialog} [data-close]")
    page.keyboard.press("Control+/")
    assert page.is_visible("#shortcuts") and violations(page) == []
    page.click("#shortcuts [data-close]")
    (tmp_path / "a.txt").write_text("a\n" * 99)
    page.set_input_files("#file", tmp_path / "a.txt")
    page.wait_for_selector("#files .chip >> text=tokens")
    assert violations(page) == []
    page.click("#side")
    page.wait_for_selector("#verdict >> text=of the neurons")
    assert violations(page) == []


@pytest.mark.parametrize("size", ["small", "phone", "large", "landscape"])
def test_narrow_screens(browser: Any, tmp_path: Path, size: str) -> None:
    with live_server(tmp_path, sparse=True, named=NAME) as server, opened(browser, size) as page:
        server.llm.default_params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=40)
        page.add_init_script("localStorage.setItem('svdengine.settings', '{\"max_tokens\": 12}')")
        open_page(page, server)
        assert fits(page) and page.get_attribute("#list", "inert") is not None
        answered(page, "hello")
        assert fits(page)
        show(page, [("user", "w" * 120), ("assistant", MARKDOWN)], tmp_path)
        assert fits(page)
        box = page.locator("#send").bounding_box()
        assert box["x"] + box["width"] <= page.viewport_size["width"]
        assert page.locator("#side").is_visible()
        assert page.locator("#scroll").bounding_box()["height"] > 100  # there is room for the text
        page.click("#show-list")
        assert page.is_visible("#search") and fits(page)
        page.click("#hide-list")
        assert page.is_hidden("#search")
        for opener, dialog, closer in (
            ("#open-settings", "#settings", "#settings [data-close]"),
            ("#open-model", "#model-info", "#model-info [data-close]"),
            ("#side", "#compare", "#compare-close"),
        ):
            page.click(opener)
            box = page.locator(dialog).bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= page.viewport_size["width"]
            assert page.locator(dialog).evaluate("d => d.scrollWidth <= d.clientWidth")
            page.click(closer)
        assert page.problems == []


def test_settings_show_the_defaults_that_hold(page: Any) -> None:
    page.click("#open-settings")
    told = {name: page.get_attribute(f"#{name}", "placeholder") for name in ("temperature", "top-k", "top-p", "min-p")}
    assert told == {"temperature": "0.7", "top-k": "50", "top-p": "1", "min-p": "0"}
    sent: list[Any] = []
    page.on("request", lambda r: sent.append(r.post_data_json) if r.url.endswith("/completions") else None)
    page.fill("#temperature", "0")
    page.fill("#top-k", "3")
    page.fill("#seed", "5")
    page.fill("#system", "Be brief.")
    page.click("#settings >> text=Save")
    answered(page, "hello")
    assert {name: sent[0][name] for name in ("temperature", "top_k", "seed")} == {
        "temperature": 0,
        "top_k": 3,
        "seed": 5,
    }
    assert sent[0]["messages"][0] == {"role": "system", "content": "Be brief."} and "top_p" not in sent[0]
    page.click("#open-settings")
    page.click("#reset")
    page.click("#settings >> text=Save")
    answered(page, "hello")
    assert "temperature" not in sent[1] and sent[1]["messages"][0]["role"] == "user"


def test_the_theme_is_kept(page: Any, server: LiveServer) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    seen = {}
    for theme in ("light", "dark", "system"):
        page.click("#open-settings")
        page.check(f"#settings [value={theme}]")
        page.click("#settings [data-close]")
        page.reload()
        wait_until(page, "document.title === 'tiny'")
        seen[theme] = page.evaluate(colour)
    assert seen["light"] == "rgb(255, 255, 255)" and seen["dark"] == "rgb(13, 19, 18)"
    assert seen["system"] in (seen["light"], seen["dark"]) and page.problems == []


def test_keys(page: Any) -> None:
    answered(page, "hello")
    page.keyboard.press("Control+k")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.press("Control+b")
    assert page.is_hidden("#list")
    page.keyboard.press("Control+b")
    page.keyboard.press("Control+.")
    assert page.is_visible("#settings")
    page.keyboard.press("Control+Shift+o")  # not while a dialog is open
    assert page.locator(".message").count() == 2
    page.keyboard.press("Escape")
    page.keyboard.press("Control+Shift+o")
    assert page.is_visible("#welcome") and page.evaluate("document.activeElement.id") == "input"


def test_what_the_page_says_of_the_model(page: Any, server: LiveServer) -> None:
    page.click("#open-model")
    rows = page.inner_text("#model-rows")
    for text in ("tiny", "f32", "reference", "256 tokens", "svd: 25 % of neurons predicted", "relu"):
        assert text in rows, text
