"""What the chat page makes of a model's text: Markdown whole, and nothing that runs, loads or leads astray."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import LiveServer, live_server
from page_browser import fits, open_page, opened, show

HOSTILE = '<img src="x" onerror="document.title=\'broken\'"><script>document.title="broken"</script>'
MARKDOWN = f"""# A title
Some **bold**, *italic*, ~~gone~~ and `code()` text. {HOSTILE}

1. first
   - inner
2. second

- [x] done
- [ ] open

> quoted

| left | right |
| --- | ---: |
| a | 1 |

[site](https://example.org/a?b=c&d=e) <https://example.org> mailto:a@example.org

Euler wrote $e^{{i\\pi}} + 1 = 0$, which is \\(x\\), for $5 and $6.

$$\\int_0^1 x^2\\,dx = \\frac{{1}}{{3}}$$

```python
def f(x):  # {"wide " * 60}
    return "{HOSTILE}"
```
{"long" * 100}"""

# Each is to end as text, or as nothing. Whatever runs would set the title.
RUN = "document.title='broken'"
PAYLOADS = [
    HOSTILE,
    f"<svg onload={RUN}>",
    f"<svg><script>{RUN}</script></svg>",
    f"<details open ontoggle={RUN}>x</details>",
    f"<iframe srcdoc='<script>parent.{RUN}</script>'></iframe>",
    f'<iframe src="javascript:parent.{RUN}"></iframe>',
    f"<body onload={RUN}>",
    f"<input autofocus onfocus={RUN}>",
    f"<video><source onerror={RUN}></video>",
    f'<math><mtext><table><mglyph><style><!--</style><img title="--&gt;&lt;img src=1 onerror={RUN}&gt;">',
    f"<form><math><mtext></form><form><mglyph><style></math><img src onerror={RUN}>",
    f'<noscript><p title="</noscript><img src=x onerror={RUN}>">',
    f'<a href="javascript:{RUN}">x</a>',
    f"[x](javascript:{RUN})",
    f"[x](JaVaScRiPt:{RUN})",
    f"[x](java\tscript:{RUN})",
    f"[x](&#106;avascript:{RUN})",
    f"[x](javascript&colon;{RUN})",
    f"[x](\x01javascript:{RUN})",
    "[x](data:text/html;base64,PHNjcmlwdD4=)",
    f"[x](vbscript:{RUN})",
    "[x](//example.org) [y](/v1/models) [z](#top) [f](file:///etc/passwd) [b](blob:x)",
    f"<javascript:{RUN}>",
    f"![x](javascript:{RUN})",
    f'![x" onerror="{RUN}](x)',
    f'![x](x"onerror="{RUN})',
    f"[x]: javascript:{RUN}\n\n[x]",
    f'[x](https://example.org "a" onmouseover="{RUN}")',
    f'[x](https://example.org/"onmouseover="{RUN})',
    f'```" onmouseover="{RUN}\nx\n```',
    f"```x<img/src=x/onerror={RUN}>\nx\n```",
    f"```html\n<script>{RUN}</script>\n```",
    f"`<img src=x onerror={RUN}>`",
    f"| <img src=x onerror={RUN}> | b |\n| --- | --- |\n| <svg onload={RUN}> | x |",
    f"$\\href{{javascript:{RUN}}}{{x}}$",
    "$\\htmlData{onclick=alert(1)}{x} \\includegraphics{https://example.org/x.png}$",
    f"$\\text{{<img src=x onerror={RUN}>}}$",
    "$\\def\\a{\\a\\a}\\a$",
    "$" + "{" * 3000 + "$",
    "<style>*{display:none}</style><link rel=stylesheet href=//example.org><meta http-equiv=refresh content=0;url=//x>",
    '<div id="input" class="error" style="position:fixed;inset:0" data-copy="x" role="alert">x</div>',
    f"&lt;img src=x onerror={RUN}&gt;",
    "\u202e<b>\u2028<i>\0<u>",
]
DEEP = ["> " * 5000 + "x", "- " * 3000 + "x", "*" * 20_000 + "x", "[" * 20_000, "`" * 9001 + "x", "**x " * 9000]
DEEP += ["![" * 5000 + "](x)" * 5000, "| " * 5000 + "\n" + "|-" * 5000, "$" * 9001, "\\[" * 4000, "<" * 9000]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("markdown")) as server:
        yield server


@pytest.fixture(params=["desktop", "phone"])
def page(browser: Any, request: pytest.FixtureRequest, server: LiveServer) -> Iterator[Any]:
    with opened(browser, request.param) as page:
        open_page(page, server)
        yield page


def test_markdown_whole(page: Any, tmp_path: Path) -> None:
    show(page, [("user", HOSTILE), ("assistant", MARKDOWN)], tmp_path)
    assert page.locator("main img, main script, main iframe").count() == 0
    assert page.inner_text(".user .text") == HOSTILE
    assert page.inner_text(".assistant").count(HOSTILE) == 2
    for selector, text in (
        ("h2", "A title"),
        ("strong", "bold"),
        ("em", "italic"),
        ("del", "gone"),
        ("p code", "code()"),
        ("ol > li > ul > li", "inner"),
        ("blockquote", "quoted"),
        ("td[align=right]", "1"),
        (".hljs-keyword >> nth=0", "def"),
        (".hljs-title", "f"),
    ):
        assert page.inner_text(f".assistant .text {selector}").strip() == text, selector
    assert page.inner_text(".code .bar span") == "python"
    boxes = page.locator(".task input")
    assert [boxes.nth(i).is_checked() for i in range(2)] == [True, False] and boxes.first.is_disabled()
    links = page.locator(".assistant .text a")
    assert links.evaluate_all("all => all.map(a => a.getAttribute('href'))") == [
        "https://example.org/a?b=c&d=e",
        "https://example.org",
        "mailto:a@example.org",
    ]
    assert links.first.get_attribute("rel") == "noopener noreferrer"
    assert page.locator(".math .katex").count() == 3 and page.locator(".math.display").count() == 1
    assert "for $5 and $6" in page.inner_text(".assistant .text")
    assert fits(page) and page.problems == []


def test_nothing_of_a_model_runs_or_leads_astray(page: Any, tmp_path: Path, server: LiveServer) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    show(page, [("assistant", text) for text in PAYLOADS], tmp_path)
    found = page.evaluate("""() => [...document.querySelectorAll('#messages .text *')].flatMap(node => [
        ...(/^(script|img|iframe|object|embed|form|style|link|meta|base|video|audio|source|body|html|details|noscript)$/i
            .test(node.localName) ? [node.outerHTML] : []),
        ...[...node.attributes].filter(a => /^on/i.test(a.name) || /script:|data:/i.test(a.value)).map(a => a.name),
    ])""")
    assert found == []
    links = page.locator("#messages .text a").evaluate_all("all => all.map(a => a.href)")
    assert all(link.startswith("https://example.org") for link in links), links
    ids = page.evaluate(
        "document.querySelectorAll('#messages .text [id], #messages .text [style]:not(.katex *)').length"
    )
    assert ids == 0 and page.inner_text("#messages").count("onerror=") > 10
    page.hover("#messages .text a >> nth=0")
    page.wait_for_timeout(100)
    assert page.title() == "tiny" and page.url == server.url + "/"
    assert all(url.startswith((server.url, "data:")) for url in asked)
    assert page.problems == []


def test_payloads_in_pieces_do_nothing_either(browser: Any, server: LiveServer) -> None:
    """As they are while an answer grows: every beginning of every payload is shown once."""
    with opened(browser) as page:
        open_page(page, server)
        count = page.evaluate(
            """async (payloads) => {
                const { render } = await import('./markdown.js');
                const box = document.querySelector('#messages');
                let bad = 0;
                for (const text of payloads.filter((each) => each.length < 200)) {
                    for (let end = 1; end <= text.length; end += 2) {
                        box.replaceChildren(render(text.slice(0, end)));
                        bad += box.querySelectorAll('img, script, iframe, [onerror], [onload], [href^="j" i]').length;
                    }
                }
                return bad;
            }""",
            PAYLOADS,
        )
        page.wait_for_timeout(100)
        assert count == 0 and page.title() == "tiny" and page.problems == []


@pytest.mark.parametrize("text", DEEP, ids=[each[:4] for each in DEEP])
def test_text_that_nests_without_end_is_shown(browser: Any, server: LiveServer, text: str) -> None:
    with opened(browser) as page:
        open_page(page, server)
        shown = page.evaluate(
            "async (text) => { const m = await import('./markdown.js');"
            "const box = document.querySelector('#messages');"
            "box.replaceChildren(m.render(text)); return box.textContent.length }",
            text,
        )
        assert shown > 0 and page.problems == []
