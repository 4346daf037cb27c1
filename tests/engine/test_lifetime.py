"""How long a model lives: dropped without being closed, forked, sent elsewhere, and its file changed under it."""

import gc
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_model import tiny_config, write_tiny_model
from tiny_predictor import tiny_predictor, write_sparse_model

import svdengine
from svdengine import LLM, ModelFileError, SamplingParams, SvdEngineError
from svdengine.files.file_watch import FileWatch
from svdengine.files.model_file import read_model_file
from svdengine.files.predictor_file import model_fingerprint, write_predictor

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
needs_maps = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system shows no memory maps")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny.svdp")


@pytest.fixture(params=["cpu", "reference"])
def llm(request: pytest.FixtureRequest, path: Path) -> Iterator[LLM]:
    with svdengine.load(path, device=request.param, context=64, threads=2) as llm:
        yield llm


def team() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("svdengine-")]


def is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text(encoding="utf-8")


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@needs_maps
@pytest.mark.parametrize("end", ["drop", "close", "with", "collect"])
@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_a_model_that_is_gone_holds_nothing(path: Path, device: svdengine.Device, end: str) -> None:
    """Threads, the file's map, the KV cache and the file itself, without the help of the collector."""
    gc.collect()
    gc.disable()
    try:
        files, before = open_files(), team()
        llm = svdengine.load(path, device=device, context=64, threads=3)
        list(llm.stream("hello", GREEDY))
        executor = weakref.ref(llm.executor)
        assert is_mapped(path) and len(team()) == len(before) + (2 if device == "cpu" else 0)
        if end == "drop":
            del llm
        elif end == "close":
            llm.close()
        elif end == "with":
            with llm:
                pass
        else:
            circle = [llm]
            circle.append(circle)  # type: ignore[arg-type]
            del llm, circle
            gc.collect()
        assert team() == before and open_files() == files
        assert not is_mapped(path)
        if end in ("drop", "collect"):
            assert executor() is None
    finally:
        gc.enable()


def test_a_stream_keeps_its_model(path: Path) -> None:
    stream = svdengine.load(path, device="reference", context=64).stream("hello", GREEDY)
    gc.collect()
    assert len(list(stream)) > 0 and stream.completion.finish_reason == "length"


def test_a_request_of_a_model_that_is_gone_has_an_error(path: Path) -> None:
    llm = svdengine.load(path, device="reference", context=64)
    request = llm.prepare("hello", GREEDY)
    llm.add(request)
    del llm
    gc.collect()
    assert request.done and "was closed" in str(request.error)


def in_a_fork(work: Callable[[], object], seconds: int = 60) -> str:
    """What `work` gives in a forked process, or the error that it raises. It is ended if it hangs."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(seconds)
        try:
            told = repr(work())
        except BaseException as error:
            told = f"{type(error).__name__}: {error}"
        os.write(writing, told.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = pipe.read()
    assert os.waitpid(child, 0)[1] == 0, "the process hung, or died"
    return told


@needs_fork
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_fork_says_why_it_cannot_run(llm: LLM) -> None:
    before = llm.generate("hello", GREEDY)[0].text
    stream = llm.stream("hello", GREEDY)
    request = llm.prepare("hello", GREEDY)
    tries: list[Callable[[], object]] = [
        lambda: llm.generate("hello", GREEDY),
        lambda: next(stream),
        lambda: llm.chat([{"role": "user", "content": "a"}]),
        lambda: llm.logits([1, 2]),
        lambda: llm.prepare("hello"),
        lambda: llm.add(request),
        lambda: llm.step(),
        lambda: llm.save_kv("nowhere.kv"),
        lambda: llm.load_kv("nowhere.kv"),
        lambda: setattr(llm, "ffn", "dense"),
        lambda: llm.executor,
    ]
    for work in tries:
        told = in_a_fork(work)
        assert told.startswith(f"SvdEngineError: the model was loaded in process {os.getpid()}"), told
    assert "".join(stream) == before == llm.generate("hello", GREEDY)[0].text


@needs_fork
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_fork_may_end_in_any_way(llm: LLM) -> None:
    """Closing, dropping and aborting do nothing there, while another thread of the parent holds the lock."""
    stream = llm.stream("hello", GREEDY)

    def end() -> str:
        nonlocal stream
        stream.close()
        del stream
        with llm:
            pass
        llm._release()
        return "ended"

    with llm._lock:
        assert in_a_fork(end) == "'ended'"
    assert llm.generate("hello", GREEDY)[0].text


@needs_fork
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_fork_may_load_for_itself(llm: LLM, path: Path) -> None:
    expected = llm.generate("hello", GREEDY)[0].text
    device = llm.executor.name

    def work() -> str:
        with svdengine.load(path, device=device, context=64, threads=2) as own:  # type: ignore[arg-type]
            return own.generate("hello", GREEDY)[0].text

    assert in_a_fork(work) == repr(expected)


@needs_fork
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_pool_of_forked_workers_gets_the_error(llm: LLM) -> None:
    global shared
    shared = llm
    with multiprocessing.get_context("fork").Pool(1) as pool, pytest.raises(SvdEngineError, match="was forked from it"):
        pool.apply_async(_use_shared).get(60)


def _use_shared() -> str:
    return shared.generate("hello", GREEDY)[0].text


def test_a_model_cannot_be_sent(llm: LLM) -> None:
    with pytest.raises(SvdEngineError, match="cannot be copied or sent"):
        pickle.dumps(llm.generate)


@pytest.mark.skipif(os.name == "nt", reason="a mapped file cannot be changed there")
@pytest.mark.parametrize("change", ["truncate", "empty", "grow", "overwrite", "copy over", "touch"])
def test_a_file_that_changes_is_named(llm: LLM, path: Path, change: str, tmp_path: Path) -> None:
    llm.generate("hello", GREEDY)
    stream = llm.stream("once upon", GREEDY)
    next(stream)
    size = path.stat().st_size
    if change == "truncate":
        os.truncate(path, 5000)
    elif change == "empty":
        path.write_bytes(b"")
    elif change == "grow":
        with path.open("ab") as file:
            file.write(b"more")
    elif change == "overwrite":
        with path.open("r+b") as file:
            file.seek(size // 2)
            file.write(b"\0")
    elif change == "copy over":
        other = write_tiny_model(tmp_path / "other.svdp", norm_eps=1e-3)
        shutil.copyfile(other, path)
    else:
        os.utime(path)
    with pytest.raises(ModelFileError, match="changed while it was in use") as caught:
        list(stream)
    assert str(path) in str(caught.value) and "rename it" in str(caught.value)
    if change == "truncate":
        assert f"was {size} bytes long and has 5000 now" in str(caught.value)
    for _ in range(2):  # it stays so
        with pytest.raises(ModelFileError, match="changed while it was in use"):
            llm.generate("hello", GREEDY)


@pytest.mark.skipif(os.name == "nt", reason="a mapped file cannot be replaced there")
def test_a_file_that_is_replaced_or_removed_does_no_harm(llm: LLM, path: Path, tmp_path: Path) -> None:
    before = llm.generate("hello", GREEDY)[0].text
    write_tiny_model(tmp_path / "other.svdp", norm_eps=1e-1).replace(path)
    assert llm.generate("hello", GREEDY)[0].text == before
    path.unlink()
    assert llm.generate("hello", GREEDY)[0].text == before


@pytest.mark.skipif(os.name == "nt", reason="a mapped file cannot be changed there")
def test_a_predictor_file_that_changes_is_named(tmp_path: Path) -> None:
    model, predictor = write_sparse_model(tmp_path / "sparse.svdp"), tmp_path / "predictor.safetensors"
    with read_model_file(model) as file:
        write_predictor(predictor, tiny_predictor(tiny_config(), 0.0, model_fingerprint(file)))
    with svdengine.load(model, "cpu", "sparse", 1, predictor, context=64) as llm:
        llm.generate("hello", GREEDY)
        os.truncate(predictor, 100)
        with pytest.raises(ModelFileError, match=r"predictor\.safetensors: the file was changed"):
            llm.generate("hello", GREEDY)


def test_a_watch_is_of_the_file_and_not_of_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12")
    watch = FileWatch(path)
    watch.check()
    path.rename(tmp_path / "b")
    path.write_bytes(b"another")
    watch.check()
    os.utime(tmp_path / "b", ns=(1, 1))
    with pytest.raises(ModelFileError, match="its time was set"):
        watch.check()
    watch.close()
    watch.close()


LOST = """\
import os, sys, svdengine
llm = svdengine.load(sys.argv[1], device="reference", context=64)
other = svdengine.load(sys.argv[1], device="reference", context=64)
other.close()
os.truncate(sys.argv[1], 4096)
if sys.argv[2] == "read":
    print(sum(float(array.astype("f8").sum()) for array in llm.model_file.arrays.values()))
"""


@needs_maps
@pytest.mark.parametrize("options", [[], ["-X", "faulthandler"]], ids=["plain", "with a handler of its own"])
def test_a_page_that_is_gone_is_the_last_word(path: Path, options: list[str]) -> None:
    command = [sys.executable, *options, "-c", LOST, str(path)]
    done = subprocess.run([*command, "read"], capture_output=True, text=True)
    assert done.returncode == -signal.SIGBUS
    if options:
        assert "Fatal Python error: Bus error" in done.stderr
    else:
        assert done.stderr.startswith("svdengine: a page of a mapped file is gone (SIGBUS)")
        assert done.stderr.endswith(f"Mapped: {path}\n") and done.stderr.count(str(path)) == 1
    done = subprocess.run([*command[:-1], str(write_tiny_model(path)), "leave"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
