"""The cache folder, and machines without one: containers with HOME=/, no home, or a home that cannot be written to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_model import write_tiny_model

from svdengine.errors import SvdEngineError
from svdengine.kernels import user_cache
from svdengine.kernels.user_cache import lasting_cache_directory, user_cache_directory

pytestmark = pytest.mark.skipif(os.name == "nt", reason="homes as on POSIX systems")


@pytest.fixture(autouse=True)
def forget() -> None:
    user_cache._passing_directory.cache_clear()


@pytest.fixture
def spoilt(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A machine without a cache folder, also for root: a word of the reason."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    (tmp_path / "file").touch()
    homes = {"a home in /proc": "/proc", "a home that is a file": str(tmp_path / "file"), "a device": "/dev/null"}
    if request.param == "no home":
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr("pwd.getpwuid", lambda _: (_ for _ in ()).throw(KeyError("uid not found")))
        return "no home folder"
    if request.param == "a cache that is a file":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    else:
        monkeypatch.setenv("HOME", homes[request.param])
    return "cannot make the cache folder"


SPOILT = ["no home", "a home in /proc", "a home that is a file", "a device", "a cache that is a file"]


@pytest.mark.parametrize("spoilt", SPOILT, indirect=True)
def test_without_one_a_folder_of_this_process_is_used(spoilt: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = user_cache_directory()
    assert folder == user_cache_directory() and folder.stat().st_mode & 0o777 == 0o700
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and spoilt in told and "set XDG_CACHE_HOME" in told
    with pytest.raises(SvdEngineError, match=f"{spoilt}.*set XDG_CACHE_HOME"):
        lasting_cache_directory()


def test_where_there_is_one_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache_directory() == lasting_cache_directory() == tmp_path / ".cache" / "svdengine"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert user_cache_directory() == tmp_path / "cache" / "svdengine" and not list(user_cache_directory().iterdir())


def test_nowhere_at_all_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    monkeypatch.setattr("tempfile.mkdtemp", lambda **_: (_ for _ in ()).throw(FileNotFoundError(2, "No such file")))
    with pytest.raises(SvdEngineError, match="set XDG_CACHE_HOME; there is no folder for temporary files"):
        user_cache_directory()


def in_a_process(tmp_path: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env={**kept, "TMPDIR": str(tmp_path), **environment}, capture_output=True, text=True, cwd=tmp_path
    )


def test_numba_caches_in_it_and_it_goes_with_the_process(tmp_path: Path) -> None:
    code = (
        "from svdengine.kernels.cpu.jit import entry, kernel_cache_directory\n"
        "@entry\n"
        "def twice(x): return 2 * x\n"
        "import os, sys\n"
        "assert twice(3) == 6 and any(kernel_cache_directory().rglob('*.nbi'))\n"
        "child = os.fork()\n"
        "if not child: sys.exit(0)\n"
        "os.waitpid(child, 0)\n"
        "print(kernel_cache_directory().exists())"
    )
    (tmp_path / "tmp").mkdir()
    (tmp_path / "twice.py").write_text(code)  # Numba caches functions of files
    done = in_a_process(tmp_path, "import twice", HOME="/dev/null", TMPDIR=str(tmp_path / "tmp"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True\n" and "set XDG_CACHE_HOME" in done.stderr and done.stderr.count("\n") == 1
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.slow
@pytest.mark.long
def test_a_model_runs_without_a_home(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny.svdp")
    arguments = ["generate", str(model), "--device", "cpu", "-p", "a", "-n", "3"]
    code = f"from svdengine.cli import main; main({arguments})"
    done = in_a_process(tmp_path, code, HOME="/dev/null")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


def test_the_demo_model_says_what_to_set(tmp_path: Path) -> None:
    done = in_a_process(tmp_path, "from svdengine.cli import main; main(['generate', '-p', 'a'])", HOME="/dev/null")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: cannot make the cache folder") and "set XDG_CACHE_HOME" in done.stderr


COMPILES_ONCE = """
import os
from pathlib import Path
from svdengine.kernels.cpu import compilation
from svdengine.kernels.cpu.jit import entry

@entry
def twice(x):
    return 2 * x

real = twice.compile
def compile(signature):
    real(signature)
    (Path(os.environ["RESULTS"]) / f"{os.getpid()}").write_text(str(sum(twice.stats.cache_hits.values())))
twice.compile = compile
compilation.compile_entry(twice, 3)
assert twice(3) == 6
"""


def test_processes_that_start_together_compile_once_wherever_the_sources_lie(tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    processes = []
    for place in ("a", "b", "c"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "once.py").write_text(COMPILES_ONCE)  # the same source, another path and time
        environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "RESULTS": str(results)}
        command = [sys.executable, "-c", "import once"]
        processes.append(subprocess.Popen(command, env=environment, cwd=tmp_path / place, stderr=subprocess.PIPE))
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert sorted(file.read_text() for file in results.iterdir()) == ["0", "1", "1"]
