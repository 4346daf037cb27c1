"""Conversations of the chat page in Chromium: kept, found, renamed, deleted, saved and read, versions, files, tabs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import LiveServer, live_server
from page_browser import answered, ask, done, open_page, opened, show, wait_until, watched

from svdengine import SamplingParams

LISTED = "#conversations .open"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("conversations"), context=512) as server:
        x = server.llm.tokenizer.encode("x")[0]
        server.llm.default_params = SamplingParams(temperature=0, logit_bias={x: 100.0}, max_tokens=5, ignore_eos=True)
        # What a page asks for without a limit is as much as the context holds.
        yield server


@pytest.fixture
def page(browser: Any, server: LiveServer) -> Iterator[Any]:
    with opened(browser, accept_downloads=True) as page:
        page.add_init_script("localStorage.setItem('svdengine.settings', '{\"max_tokens\": 5}')")
        open_page(page, server)
        yield page
        server.gate.let_go()
        assert page.problems == []


def titles(page: Any) -> list[str]:
    return list(page.locator(LISTED).all_inner_texts())


def more(page: Any, title: str, item: str) -> None:
    """Choose an item of a conversation's menu."""
    page.hover(f"#conversations li:has-text('{title}')")
    page.click(f"[aria-label='More about {title}']")
    page.click(f"[role=menu] >> text={item}")


def saved(page: Any, act: Any) -> str:
    with page.expect_download() as download:
        act()
    return str(Path(download.value.path()).read_text(encoding="utf-8"))


def test_a_new_chat_deletes_nothing(page: Any) -> None:
    answered(page, "about apples")
    page.click("#new-in-list")
    assert page.is_visible("#welcome") and titles(page) == ["about apples"]
    answered(page, "about pears")
    assert titles(page) == ["about pears", "about apples"]
    page.click(f"{LISTED} >> text=about apples")
    wait_until(page, "document.querySelector('.user .text').textContent === 'about apples'")
    assert page.inner_text("#title") == "about apples"
    assert page.get_attribute("#conversations [aria-current]", "title") == "about apples"


def test_search_rename_and_delete_with_undo(page: Any) -> None:
    for text in ("apples are red", "pears are green", "plums are blue"):
        page.click("#new-in-list")
        answered(page, text)
    page.fill("#search", "are GREEN")
    wait_until(page, f"document.querySelectorAll('{LISTED}').length === 1")
    assert titles(page) == ["pears are green"]
    page.fill("#search", "nothing of that kind")
    page.wait_for_selector("text=Nothing found")
    page.fill("#search", "xxxxx")  # in the answers
    wait_until(page, f"document.querySelectorAll('{LISTED}').length === 3")
    page.fill("#search", "")
    more(page, "pears are green", "Rename")
    page.keyboard.type("Fruit")
    page.keyboard.press("Enter")
    page.wait_for_selector(f"{LISTED} >> text=Fruit")
    more(page, "plums are blue", "Delete")
    wait_until(page, f"document.querySelectorAll('{LISTED}').length === 2")
    assert page.is_visible("#welcome")  # it was the open one
    page.click("#notice >> text=Undo")
    wait_until(page, f"document.querySelectorAll('{LISTED}').length === 3")
    assert page.locator(".user .text").inner_text() == "plums are blue"
    more(page, "apples are red", "Delete")
    wait_until(page, f"document.querySelectorAll('{LISTED}').length === 2")
    page.reload()
    wait_until(page, f"document.querySelectorAll('{LISTED}').length === 2")
    assert titles(page) == ["plums are blue", "Fruit"]


def test_json_holds_all_versions_and_markdown_what_is_shown(page: Any, server: LiveServer, tmp_path: Path) -> None:
    answered(page, "first question")
    page.click('.assistant button:text-is("Again")')
    page.wait_for_selector(".assistant .versions >> text=2 / 2")
    done(page)
    text = saved(page, lambda: page.click("#export"))
    held = json.loads(text)
    assert held["format"] == "svdengine-conversations" and len(held["conversations"][0]["messages"]) == 3
    markdown = saved(page, lambda: more(page, "first question", "Save as Markdown"))
    assert markdown.startswith("# first question\n") and markdown.count("<!-- svdengine:") == 2
    more(page, "first question", "Delete")
    page.wait_for_selector("#notice >> text=was deleted")
    for name, content, versions in (("all.json", text, 2), ("one.md", markdown, 0)):
        (tmp_path / name).write_text(content, encoding="utf-8")
        page.set_input_files("#import-file", tmp_path / name)
        page.wait_for_selector("#notice >> text=1 conversation was added")
        wait_until(page, "document.querySelectorAll('.message').length === 2")
        assert page.inner_text(".user .text") == "first question" and page.inner_text(".assistant .text") == "xxxxx"
        assert page.locator(".versions").count() == (1 if versions else 0)
        more(page, "first question", "Delete")
        page.wait_for_selector("#notice >> text=was deleted")


def test_markdown_that_looks_like_our_own_marks_comes_back(page: Any, tmp_path: Path) -> None:
    tricky = "a\n<!-- svdengine: user -->\n <!-- svdengine: assistant -->\n## Question\n\n```\n# x\n```"
    show(page, [("user", tricky), ("assistant", "## Answer\n\nb")], tmp_path, "Tricky")
    markdown = saved(page, lambda: more(page, "Tricky", "Save as Markdown"))
    (tmp_path / "back.md").write_text(markdown, encoding="utf-8")
    more(page, "Tricky", "Delete")
    page.wait_for_selector("#notice >> text=was deleted")
    page.set_input_files("#import-file", tmp_path / "back.md")
    page.wait_for_selector("#notice >> text=1 conversation was added")
    wait_until(page, "document.querySelectorAll('.message').length === 2")
    assert page.evaluate("document.querySelector('.user .text').textContent") == tricky
    assert page.locator(".assistant h3").inner_text() == "Answer"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "is not an export of this page"),
        ("# a", "is not an export of this page"),
        ('{"format": "svdengine-conversations", "version": 2, "conversations": []}', "reads version 1"),
        ('{"format": "svdengine-conversations", "version": 1, "conversations": []}', "holds no conversations"),
        ('{"format": "svdengine-conversations", "version": 1, "conversations": [{"messages": [{"role": "system", '
         '"content": "x"}]}]}', "message 1: a role"),
        ('{"format": "svdengine-conversations", "version": 1, "conversations": [{"messages": [{"id": 1, "parent": 2, '
         '"role": "user", "content": "x"}]}]}', "its parent is not there"),
        ('{"format": "svdengine-conversations", "version": 1, "conversations": [{"messages": [{"id": 1, "parent": 1, '
         '"role": "user", "content": "x"}]}]}', "follow none that begins"),
        ("a\0b", "is not a text file"),
    ],
)  # fmt: skip
def test_files_that_are_no_export_are_refused(page: Any, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "bad.json").write_text(content)
    page.set_input_files("#import-file", tmp_path / "bad.json")
    page.wait_for_selector(f"#notice >> text={message}")
    assert titles(page) == []


def test_two_tabs_do_not_overwrite_each_other(page: Any, server: LiveServer) -> None:
    answered(page, "one")
    other = watched(page.context.new_page())
    open_page(other, server)
    other.click(f"{LISTED} >> text=one")
    wait_until(other, "document.querySelectorAll('.message').length === 2")
    answered(other, "two, in the other tab")
    wait_until(page, "document.querySelectorAll('.message').length === 4")  # it follows
    deaf = watched(page.context.new_page())  # which does not hear of the others, as two that ask at once do not
    deaf.add_init_script("delete window.BroadcastChannel")
    open_page(deaf, server)
    deaf.click(f"{LISTED} >> text=one")
    wait_until(deaf, "document.querySelectorAll('.message').length === 4")
    answered(page, "three, here")
    answered(deaf, "three, there")
    assert deaf.locator(".message").count() == 6 and deaf.problems == []
    page.reload()
    wait_until(page, "document.querySelectorAll('.message').length === 6")
    last = page.locator(".user .text").last.inner_text()
    page.locator(".user").last.hover()
    page.locator(".user .versions button:not([disabled])").last.click()
    other_one = {"three, here": "three, there", "three, there": "three, here"}[last]
    page.wait_for_selector(f".user .text >> text={other_one}")
    assert page.locator(".assistant .text").last.inner_text() == "xxxxx"
    # A rename in one is a rename in both.
    more(page, "one", "Rename")
    page.keyboard.type("renamed")
    page.keyboard.press("Enter")
    other.wait_for_selector(f"{LISTED} >> text=renamed")
    assert other.problems == []


def test_what_another_tab_deleted_comes_back_when_it_goes_on_here(page: Any, server: LiveServer) -> None:
    answered(page, "kept")
    other = watched(page.context.new_page())
    open_page(other, server)
    other.wait_for_selector(f"{LISTED} >> text=kept")
    more(other, "kept", "Delete")
    wait_until(page, f"document.querySelectorAll('{LISTED}').length === 0")
    answered(page, "and more")
    wait_until(other, f"document.querySelectorAll('{LISTED}').length === 1")
    assert page.locator(".message").count() == 4


def test_edited_questions_and_other_answers_are_versions(page: Any) -> None:
    answered(page, "first wording")
    answered(page, "a later question")
    page.locator(".user").first.hover()
    page.locator(".user").first.locator("text=Edit").click()
    page.fill(".edit textarea", "second wording")
    page.keyboard.press("Enter")
    page.wait_for_selector(".user .versions >> text=2 / 2")
    done(page)
    assert page.locator(".user .text").all_inner_texts() == ["second wording"]
    page.click("[aria-label='Earlier version']")
    wait_until(page, "document.querySelectorAll('.user').length === 2")
    assert page.locator(".user .text").all_inner_texts() == ["first wording", "a later question"]
    page.locator(".assistant").first.locator('button:text-is("Again")').click()  # not only the last answer
    page.wait_for_selector(".assistant .versions >> text=2 / 2")
    done(page)
    assert page.locator(".message").count() == 2
    page.reload()
    page.wait_for_selector(".assistant .versions >> text=2 / 2")
    page.fill("#input", "")
    page.focus("#input")
    page.keyboard.press("ArrowUp")
    assert page.input_value(".edit textarea") == "first wording"
    page.keyboard.press("Escape")
    assert page.locator(".edit").count() == 0


def test_text_files_go_with_a_question(page: Any, server: LiveServer, tmp_path: Path) -> None:
    sent: list[Any] = []
    page.on("request", lambda r: sent.append(r.post_data_json) if r.url.endswith("/chat/completions") else None)
    (tmp_path / "notes.txt").write_text("apples\n```\npears\n", encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x00\xff")
    (tmp_path / "large.txt").write_text("a" * (1 << 21))
    page.set_input_files("#file", tmp_path / "notes.txt")
    page.wait_for_selector("#files .chip >> text=tokens")
    for name, message in (("picture.png", "is not a text file"), ("large.txt", "at most 1 MB")):
        page.set_input_files("#file", tmp_path / name)
        page.wait_for_selector(f"#notice >> text={message}")
    assert page.locator("#files .chip").count() == 1
    answered(page, "which fruit?")
    assert sent[0]["messages"][-1]["content"] == "notes.txt:\n````\napples\n```\npears\n````\n\nwhich fruit?"
    assert page.inner_text(".user .text") == "which fruit?" and page.locator("#files .chip").count() == 0
    page.click(".user .chip")
    assert page.inner_text("#file-text") == "apples\n```\npears"
    page.click("#file-view >> text=Close")
    page.reload()
    page.wait_for_selector(".user .chip >> text=notes.txt")


def test_a_browser_that_keeps_nothing_still_talks(browser: Any, server: LiveServer) -> None:
    with opened(browser) as page:
        page.add_init_script("Object.defineProperty(window, 'indexedDB', {value: undefined})")
        open_page(page, server)
        assert "keeps nothing" in page.inner_text("#nothing")
        ask(page, "hello")
        page.wait_for_selector("#messages[aria-busy=false] .assistant .figures:has-text('token')")
        assert titles(page) == ["hello"] and page.problems == []


def test_what_an_earlier_page_kept_is_taken_over(browser: Any, server: LiveServer) -> None:
    with opened(browser) as page:
        old = json.dumps([{"role": "user", "content": "an old question"}, {"role": "assistant", "content": "yes"}])
        once = "if (!localStorage.x)"
        page.add_init_script(f"{once} localStorage['svdengine.conversation'] = {json.dumps(old)}; localStorage.x = 1")
        open_page(page, server)
        page.click(f"{LISTED} >> text=an old question")
        page.wait_for_selector(".assistant >> text=yes")
        page.reload()
        page.wait_for_selector(".assistant >> text=yes")
        assert len(titles(page)) == 1
