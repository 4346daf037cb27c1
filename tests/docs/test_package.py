"""The source archive holds everything that is needed to build, test and read."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_archive_names_all_that_is_shipped_tests_and_documents(project: dict[str, Any]) -> None:
    targets = project["tool"]["hatch"]["build"]["targets"]
    named = set(targets["sdist"]["only-include"])
    assert named >= {*targets["wheel"]["only-include"], "tests", "docs"}
    assert named >= {path.name for path in ROOT.glob("*.md")}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_archive_holds_them(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="the archive is built by hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("engine", "kernels", "models", "converters", "tools", "tests", "docs")
    wanted = {str(p.relative_to(ROOT)) for f in folders for p in (ROOT / f).rglob("*") if p.suffix in (".py", ".md")}
    assert len(wanted) > 300 and wanted - held == set()
    assert {"engine/server/web/index.html", "kernels/ascend/ops/score.cpp", "tests/data/llama_cpp_smollm2.json"} <= held


def test_what_the_package_says_of_itself(project: dict[str, Any]) -> None:
    told = project["project"]
    assert told["urls"] == {"Paper": "https://arxiv.org/abs/2603.14110"}
    versions = [c.rpartition(" :: ")[2] for c in told["classifiers"] if c.startswith("Programming Language :: Python")]
    assert versions == ["3", "3.11", "3.12", "3.13"] and told["requires-python"] == ">=3.11,<3.14"
