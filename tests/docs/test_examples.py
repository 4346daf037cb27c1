"""The programs in docs/examples run as they are, on a tiny model."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from live_server import live_server
from tiny_model import tiny_config, write_tiny_model
from tiny_predictor import tiny_predictor, write_sparse_model

from svdengine.commands import demo_model
from svdengine.files.model_file import read_model_file
from svdengine.files.predictor_file import model_fingerprint, write_predictor

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
PROXY = EXAMPLES / "serve_behind_proxy"
TEXT = "once upon a time there was a user and a system, hello world. " * 20

Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs an example as `python docs/examples/NAME ARGUMENTS` does, on the reference device; what it printed."""

    def run(name: str, *arguments: object) -> str:
        monkeypatch.setenv("SVDENGINE_DEVICE", "reference")
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.svdp", max_position=4096)


def test_every_example_is_tested_and_short() -> None:
    programs = sorted(str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*.py"))
    tested = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in programs if f'"{name}"' not in tested] == []
    assert all(len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) <= 60 for name in programs)


def test_stream(run: Run, model: Path) -> None:
    assert re.search(r"first token after \d+\.\d\d s, then \d+ tokens/s", run("stream.py", model))


def test_without_a_model_the_demo_model_is_used(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "demo_model", lambda report: model)
    assert "first token after" in run("stream.py")


def test_async_chat(run: Run, model: Path) -> None:
    lines = run("async_chat.py", model).strip().splitlines()
    assert len(lines) == 5 and sum(" -> " in line for line in lines) == 3
    assert any(re.search(r"\d+ pieces were read$", line) for line in lines)
    assert lines[-1] == "0 KV blocks are in use"


def test_batch(run: Run, model: Path) -> None:
    lines = run("batch.py", model).strip().splitlines()
    assert len(lines) == 5 and lines[0].startswith("'The capital of France is' -> ")
    assert re.fullmatch(r"one after the other \d+\.\d\d s, together \d+\.\d\d s", lines[-1])


def test_json_output(run: Run, model: Path) -> None:
    pytest.importorskip("llguidance", reason="grammars need llguidance")
    lines = run("json_output.py", model).splitlines()
    assert [line.split(":")[0] for line in lines] == ["name", "capital", "continent", "population_millions"]
    assert lines[2].split(": ")[1] in ("Africa", "America", "Asia", "Europe", "Oceania")


def test_tools(run: Run, model: Path) -> None:
    pytest.importorskip("llguidance", reason="grammars need llguidance")
    assert re.match(r"get_temperature\(\{'city': '(Paris|Rome|Oslo)'\}\) = \d+\n", run("tools.py", model))


def test_embed_with_saved_kv(run: Run, model: Path, tmp_path: Path) -> None:
    saved, other = tmp_path / "p.kv", write_tiny_model(tmp_path / "other.svdp", max_position=4096, norm_eps=1e-3)

    def known(printed: str) -> int:
        found = re.search(r"(\d+) of (\d+) prompt tokens were known", printed)
        assert found is not None and int(found[2]) > 200
        return int(found[1])

    assert known(run("embed_with_saved_kv.py", model, saved)) == 0 and saved.exists()
    again = run("embed_with_saved_kv.py", model, saved)
    assert known(again) > 200 and "tokens came from" in again
    refused = run("embed_with_saved_kv.py", other, saved)
    assert "starting without it" in refused and known(refused) == 0


def test_compare_predictors(run: Run, tmp_path: Path) -> None:
    model, text = write_sparse_model(tmp_path / "sparse.svdp"), tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    with read_model_file(model) as file:
        fingerprint = model_fingerprint(file)
    for name, offset in (("all", 100.0), ("few", -0.5)):
        write_predictor(tmp_path / f"{name}.safetensors", tiny_predictor(tiny_config(), offset, fingerprint))
    printed = run("compare_predictors.py", model, text, tmp_path / "all.safetensors", tmp_path / "few.safetensors")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()]
    assert rows[0] == ["predictor", "perplexity", "same token", "predicted", "computed", "MB/token"]
    every, few = rows[1:]
    assert every[:4] == ["all.safetensors", "+0.00 %", "100.0 %", "100.0 %"]
    assert few[0] == "few.safetensors" and float(few[3].split()[0]) < 50 and float(few[5]) < float(every[5])
    assert "the model's own" in run("compare_predictors.py", model, text)


def test_compare_predictors_of_a_model_without_zeros(run: Run, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="ReLU-family"):
        run("compare_predictors.py", write_tiny_model(tmp_path / "silu.svdp", activation="silu"))


def test_client_of_the_proxy(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client, without a proxy between: what a proxy passes on is the same."""
    pytest.importorskip("openai", reason="the client needs openai")
    pytest.importorskip("uvicorn", reason="the server needs uvicorn")
    name = "serve_behind_proxy/client.py"
    with live_server(tmp_path, api_keys=("secret",)) as server:
        monkeypatch.setenv("SVDENGINE_API_KEY", "secret")
        assert re.search(r"\n\d+ tokens\n$", run(name, f"{server.url}/v1"))
        monkeypatch.setenv("SVDENGINE_API_KEY", "wrong")
        with pytest.raises(SystemExit, match="status 401"):
            run(name, f"{server.url}/v1")


def test_configuration_of_the_proxy() -> None:
    caddy = shutil.which("caddy")
    if caddy is None:
        pytest.skip("caddy is not installed")
    done = subprocess.run(
        [caddy, "validate", "--config", PROXY / "Caddyfile", "--adapter", "caddyfile"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
