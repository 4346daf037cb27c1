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


def test_kernels_are_kept_in_it_and_it_goes_with_the_process(tmp_path: Path) -> None:
    code = (
        "from svdengine.kernels.cpu.compilation import object_code\n"
        "from svdengine.kernels.cpu.isa import active_isa\n"
        "from svdengine.kernels.cpu.kernel_files import user_folder\n"
        "import os, sys\n"
        "assert object_code(['bandwidth'], active_isa()) and (user_folder(active_isa()) / 'bandwidth.o').exists()\n"
        "child = os.fork()\n"
        "if not child: sys.exit(0)\n"
        "os.waitpid(child, 0)\n"
        "print(user_folder(active_isa()).exists(), 'numba' in sys.modules)"
    )
    (tmp_path / "tmp").mkdir()
    done = in_a_process(tmp_path, code, HOME="/dev/null", TMPDIR=str(tmp_path / "tmp"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True False\n" and done.stderr.count("set XDG_CACHE_HOME") == 1
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
from svdengine.kernels.cpu.compilation import object_code
from svdengine.kernels.cpu.isa import active_isa
print(len(object_code(["bandwidth", "interleave"], active_isa())))
"""


def test_processes_that_start_together_compile_once(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", COMPILES_ONCE]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    told = []
    for process in processes:
        out, errors = process.communicate()
        assert process.returncode == 0 and out == "2\n", errors
        told.append(errors)
    assert sorted(map(bool, told)) == [False, False, True]
