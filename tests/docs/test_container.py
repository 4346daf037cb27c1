"""The Dockerfile of docs/examples, without Docker: its commands run in a folder, and then a user without a name."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_model import write_tiny_model

from svdengine.measuring.machine import describe_machine

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "docs" / "examples" / "container" / "Dockerfile"
HOME = "/opt/svdengine"  # in the image


def instructions() -> list[tuple[str, str]]:
    """Each instruction with what follows it, on one line."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(encoding="utf-8").replace("\\\n", " "), flags=re.MULTILINE)
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]  # type: ignore[misc]


def test_what_the_image_is() -> None:
    kinds = [kind for kind, _ in instructions()]
    assert kinds.count("FROM") == 2 and {"USER", "ENTRYPOINT", "EXPOSE"} <= set(kinds)
    assert all(image.startswith("python:3.") for kind, image in instructions() if kind == "FROM")


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that any user may read."""
    path = Path(tempfile.mkdtemp(prefix="svdengine-image-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def others_may_run(program: Path) -> bool:
    """Whether a user without rights gets to a program; a Python of root's own home is root's alone."""
    return all(folder.stat().st_mode & 0o001 for folder in (program, *program.parents))


@pytest.mark.long
@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() != 0, reason="becomes another user")
def test_the_commands_of_the_image(folder: Path) -> None:
    pytest.importorskip("hatchling", reason="the package is built by hatchling")
    place = folder / "svdengine"
    source = folder / "src"
    source.mkdir()
    for name in ("engine", "kernels", "models", "converters", "tools"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # What it depends on is what the tests have; an image gets it from the network.
    packages = os.pathsep.join(p for p in sys.path if "site-packages" in p)
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": packages}
    environment |= {"PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    model = write_tiny_model(folder / "tiny.svdp")
    model.chmod(0o644)
    for kind, rest in instructions():
        if kind == "RUN":
            command = rest.replace(HOME, str(place)).replace("python -m venv", f"{sys.executable} -m venv")
            if "svdengine compile" in command:  # all kernels, for all CPUs, take many minutes
                isa = describe_machine(measure=False).isa
                assert f"--isa {isa} " in command
                command = re.sub(r"compile (--isa \w+ )+", f"compile {model} --isa {isa} ", command)
            done = subprocess.run(["sh", "-ec", command], cwd=source, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr

    settings = dict(pair.split("=", 1) for kind, rest in instructions() if kind == "ENV" for pair in shlex.split(rest))
    settings = {name: value.replace(HOME, str(place)) for name, value in settings.items()}
    nobody = others_may_run(Path(sys.executable).resolve()) and all(map(others_may_run, map(Path, sys.path[1:])))
    home = "/" if nobody else "/proc"  # where not even root may write
    done = subprocess.run(
        [str(place / "bin" / "svdengine"), "generate", str(model), "-p", "hello", "-n", "2", "--device", "cpu"],
        env={"PATH": os.environ["PATH"], "HOME": home, "PYTHONPATH": packages, **settings},
        user=1234 if nobody else None,
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
