"""Sparsity on the chat page, in Chromium: the meter, the numbers, the slider, the weave, and the comparison."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import LiveServer, live_server
from page_browser import answered, ask, fits, open_page, opened, wait_for_speed, wait_until

from svdengine import SamplingParams

LIT = """canvas => {
    const [context, paint] = [canvas.getContext('2d'), getComputedStyle(canvas)];
    const data = context.getImageData(0, 0, canvas.width, canvas.height).data;
    let lit = 0;
    for (let i = 0; i < data.length; i += 4) lit += data[i + 3] > 200 && data[i + 1] - data[i] > 70;
    return lit / (data.length / 4);
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("sparsity"), sparse=True) as server:
        x = server.llm.tokenizer.encode("x")[0]
        server.llm.default_params = SamplingParams(temperature=0, logit_bias={x: 100.0}, ignore_eos=True)
        yield server


@pytest.fixture(params=["desktop", "phone"])
def page(browser: Any, request: pytest.FixtureRequest, server: LiveServer) -> Iterator[Any]:
    with opened(browser, request.param, reduced_motion="reduce") as page:
        page.add_init_script("localStorage.setItem('svdengine.settings', '{\"max_tokens\": 20}')")
        page.sent = []
        page.on("request", lambda r: page.sent.append(r.post_data_json) if r.url.endswith("/completions") else None)
        open_page(page, server)
        page.sent.clear()
        yield page
        assert fits(page) and page.problems == []


def percent(page: Any, selector: str) -> float:
    return float(page.inner_text(selector).rstrip(" %"))


def test_the_meter_shows_each_token_and_then_the_means(page: Any, server: LiveServer) -> None:
    assert page.inner_text("#share") == "\u2013" and page.locator("#meter").evaluate(LIT) < 0.01
    assert "no answer yet" in page.get_attribute("#meter", "aria-label")
    server.gate.hold()
    ask(page, "hello")
    server.gate.allow(4)
    wait_until(page, "document.getElementById('share').textContent !== '\u2013'")
    wait_for_speed(page, server, "document.getElementById('speed').textContent !== '\u2013'", tokens=12)
    during = percent(page, "#share")
    server.gate.let_go()
    page.wait_for_selector("#messages[aria-busy=false] .assistant .figures:has-text('20 tokens')")
    share = percent(page, "#share")
    assert 1 < during < 99 and f"{page.inner_text('#share')} of neurons" in page.inner_text(".assistant .figures")
    assert 0.5 * share < 100 * page.locator("#meter").evaluate(LIT) / 0.42 < 1.5 * share  # cells have gaps between them
    label = page.get_attribute("#meter", "aria-label")
    assert label.count("%") == server.llm.config.layer_count and "on average" in label
    width, height = page.locator("canvas.weave").evaluate("c => [c.width, c.height]")
    assert (width, height) == (20, server.llm.config.layer_count)
    page.reload()
    wait_until(page, "document.getElementById('share').textContent !== '\u2013'")
    assert percent(page, "#share") == share and page.locator("canvas.weave").count() == 1


def test_the_slider_goes_from_exact_to_fast(page: Any) -> None:
    texts = []
    for position, fields in ((0, {"ffn": "exact"}), (3, {}), (8, {"ffn": "sparse", "sparsity_bias": 0.6})):
        page.locator("#bias").fill(str(position))
        texts.append(page.inner_text("#bias-text"))
        assert page.get_attribute("#bias", "aria-valuetext") == texts[-1]
        answered(page, "hello")
        sent = page.sent[-1]
        assert {name: sent[name] for name in ("ffn", "sparsity_bias") if name in sent} == fields
    assert "Exact" in texts[0] and texts[1] == "As calibrated" and "+0.6" in texts[2]
    assert page.locator(".figures >> text=bias +0.6").count() == 1


def test_the_speed_against_dense_is_measured(page: Any) -> None:
    answered(page, "hello")
    assert page.is_hidden("#gain")
    page.click("#measure")
    page.wait_for_selector("#gain:has-text('\u00d7')")
    assert page.sent[-1]["ffn"] == "dense" and page.sent[-1]["max_tokens"] == 32
    assert page.is_hidden("#measure") and page.inner_text("#gain-label") == "dense speed"
    page.reload()
    page.wait_for_selector("#gain:has-text('\u00d7')")


def test_dense_and_sparse_side_by_side(page: Any, server: LiveServer) -> None:
    page.click("#side")
    page.wait_for_selector("#notice >> text=Type a question first")
    answered(page, "hello")
    page.click("#side")
    page.wait_for_selector("#verdict >> text=of the neurons")
    dense, sparse = page.sent[-2:]
    assert dense["messages"] == sparse["messages"] and dense["seed"] == sparse["seed"]
    assert dense["ffn"] == "dense" and "ffn" not in sparse
    assert page.inner_text("#dense-share") == "100 %" and 0 < percent(page, "#sparse-share") < 100
    assert page.locator("#dense-meter").evaluate(LIT) > 1.2 * page.locator("#sparse-meter").evaluate(LIT) > 0
    assert page.inner_text("#dense-text") == page.inner_text("#sparse-text") == "x" * 20
    assert "word for word the same" in page.inner_text("#verdict") and page.inner_text("#compare-question") == "hello"
    assert "\u00d7 the speed" in page.inner_text("#verdict")
    with page.expect_download() as download:
        page.click("#compare-picture")
    picture = Path(download.value.path()).read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and picture[16:24] == (1600).to_bytes(4) + (900).to_bytes(4)
    page.click("#compare-close")
    page.fill("#input", "another question")
    page.focus("#input")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#verdict >> text=of the neurons")
    assert page.sent[-1]["messages"][-1]["content"] == "another question"
    page.click("#compare-close")
    assert page.locator(".user").count() == 1 and page.input_value("#input") == "another question"


def test_closing_the_comparison_stops_it(page: Any, server: LiveServer) -> None:
    page.fill("#input", "hello")
    server.gate.hold()
    page.click("#side")
    server.gate.allow(5)
    wait_until(page, "document.getElementById('dense-text').textContent.length > 0")
    page.keyboard.press("Escape")
    server.gate.let_go()
    page.wait_for_timeout(300)
    assert len([sent for sent in page.sent if sent.get("stream")]) == 1 and not page.is_visible("#compare")


def test_a_model_without_zeros_has_no_panel(browser: Any, tmp_path: Path) -> None:
    with live_server(tmp_path) as server, opened(browser) as page:
        page.route("**/v1/models", lambda route: route.fulfill(json=dense_model(route)))
        open_page(page, server)
        assert page.is_hidden("#sparsity") and page.inner_text("#status").endswith("reference")
        page.click("#open-model")
        assert "no neuron is ever zero" in page.inner_text("#model-rows")


def test_a_model_without_a_predictor_has_no_slider(browser: Any, tmp_path: Path) -> None:
    with live_server(tmp_path) as server, opened(browser) as page:
        open_page(page, server)
        assert page.is_visible("#meter") and page.is_hidden("#dial")


def dense_model(route: Any) -> Any:
    told = route.fetch().json()
    told["data"][0]["svdengine"] |= {"sparse": False, "predictor": None, "activation": "silu"}
    return told
