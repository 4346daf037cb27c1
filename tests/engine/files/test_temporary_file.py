"""What a killed program leaves behind goes with the next write; what another one is writing stays."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from patience import PATIENCE

from svdengine.files.temporary_file import alone_in, create_temporary, put_in_place
from svdengine.files.tensor_file import TensorFile
from svdengine.files.tensor_writer import TensorWriter

DECLARED = {"x": ((1000,), "F32")}
needs_locks = pytest.mark.skipif(os.name == "nt", reason="an open file cannot be removed there")

KILLED = """\
import os, signal, sys
from pathlib import Path
from svdengine.files.tensor_writer import TensorWriter
with TensorWriter(Path(sys.argv[1]), {"x": ((1000,), "F32")}, {}) as writer:
    print(flush=True)
    if sys.argv[2] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()
"""


def write(path: Path) -> None:
    with TensorWriter(path, DECLARED, {}) as writer:
        writer.write("x", np.zeros(1000, np.float32))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def killed(path: Path) -> str:
    """The name of what is left of a program that was killed while it wrote `path`."""
    before = names(path.parent)
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), "die"], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = names(path.parent) - before
    assert left.startswith(f".{path.name}.") and left.endswith(".tmp")
    assert (path.parent / left).stat().st_size > 4000
    return left


@needs_locks
@pytest.mark.parametrize("later", ["a.svdp", "b.svdp"])
def test_leftovers_go_with_the_next_write(tmp_path: Path, later: str) -> None:
    killed(tmp_path / "a.svdp")
    write(tmp_path / later)
    assert names(tmp_path) == {later}


@needs_locks
def test_also_when_that_write_fails(tmp_path: Path) -> None:
    killed(tmp_path / "a.svdp")
    with pytest.raises(ZeroDivisionError), TensorWriter(tmp_path / "a.svdp", DECLARED, {}):
        _ = 1 / 0
    assert names(tmp_path) == set()


@needs_locks
def test_what_another_program_writes_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.svdp"
    command = [sys.executable, "-c", KILLED, str(path), "wait"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None and other.stdout is not None and other.stdout.readline()
        (theirs,) = names(tmp_path)
        write(path)
        write(tmp_path / "b.svdp")
        assert names(tmp_path) == {"a.svdp", "b.svdp", theirs}
        other.kill()
    write(path)
    assert names(tmp_path) == {"a.svdp", "b.svdp"}


def test_what_this_program_writes_stays(tmp_path: Path) -> None:
    with TensorWriter(tmp_path / "a", DECLARED, {}) as first:
        write(tmp_path / "a")
        write(tmp_path / "b")
        first.write("x", np.ones(1000, np.float32))
    assert names(tmp_path) == {"a", "b"}
    assert TensorFile(tmp_path / "a").arrays["x"][0] == 1


@needs_locks
def test_only_what_looks_like_ours_is_removed(tmp_path: Path) -> None:
    kept = {
        ".note.0123abcd.tmp": b"of another program, to which this name means something",
        ".a.svdp.tmp": b"",
        "a.svdp.0123abcd.tmp": b"",
        ".a.svdp.0123abc.tmp": b"",
        ".a.svdp.0123abcd.tmp2": b"",
        ".a.svdp.0123ABCD.tmp": b"",
    }
    gone = {
        ".a.svdp.0123abcd.tmp": b"to become the same file",
        ".b.svdp.0123abcd.tmp": bytes(100),
        ".c d.0123abcd.tmp": bytes(8) + b'{"__metadata__":{',
    }
    for name, data in {**kept, **gone}.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / ".a.svdp.ffffffff.tmp").mkdir()
    (tmp_path / ".a.svdp.fffffff0.tmp").symlink_to(tmp_path / ".a.svdp.tmp")
    write(tmp_path / "a.svdp")
    assert names(tmp_path) == {"a.svdp", *kept, ".a.svdp.ffffffff.tmp", ".a.svdp.fffffff0.tmp"}


@needs_locks
def test_a_name_with_signs_of_patterns(tmp_path: Path) -> None:
    for name in ("a[1]*.svdp", "ä\nb", ".hidden"):
        killed(tmp_path / name)
        write(tmp_path / name)
        assert names(tmp_path) == {name}
        (tmp_path / name).unlink()


def test_where_there_are_no_locks_files_are_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("svdengine.files.temporary_file.fcntl.flock", refuse, raising=False)
    (tmp_path / ".a.0123abcd.tmp").touch()
    write(tmp_path / "a")
    assert names(tmp_path) == {"a", ".a.0123abcd.tmp"}  # somebody may still be writing that one


@needs_locks
def test_one_that_was_taken_for_a_leftover_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from svdengine.files import temporary_file

    real, taken = temporary_file._lock, []

    def lock(file: object, wait: bool = False) -> bool:
        if wait and not taken:  # another program comes between making and locking
            taken.extend(tmp_path.iterdir())
            taken[0].unlink()
        return real(file, wait)  # type: ignore[arg-type]

    monkeypatch.setattr(temporary_file, "_lock", lock)
    path, file = create_temporary(tmp_path / "a")
    assert path != taken[0] and path.exists()
    put_in_place(file, path, tmp_path / "a")
    assert names(tmp_path) == {"a"} and file.closed


@pytest.mark.skipif(os.name == "nt", reason="there is no lock of folders there")
def test_who_waits_for_a_folder_is_told(tmp_path: Path) -> None:
    told, order = threading.Event(), []

    def wait() -> None:
        with alone_in(tmp_path, told.set):
            order.append("second")

    with alone_in(tmp_path, lambda: pytest.fail("nobody is there")) as alone:
        assert alone
        thread = threading.Thread(target=wait)
        thread.start()
        assert told.wait(PATIENCE)
        order.append("first")
    thread.join(PATIENCE)
    assert order == ["first", "second"]
