"""Ascend from the outside: finding a device, building kernels, and running models through library and commands."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from fake_cann import Npu
from model_zoo import random_tokens, relative_error, zoo
from random_predictors import make_predictor

import svdengine
from svdengine.cli import main
from svdengine.errors import DeviceError
from svdengine.executors import ascend_ops_folder
from svdengine.files.model_file import read_model_file
from svdengine.files.predictor_file import model_fingerprint, write_model_with_predictor
from svdengine.kernels.ascend import cann, custom_ops
from svdengine.kernels.ascend.availability import Npu as FoundNpu
from svdengine.kernels.ascend.availability import find_npu
from svdengine.kernels.ascend.custom_ops import build_custom_ops, find_kernels, library_path
from svdengine.kernels.ascend.self_test import failing_kernel, proven_custom_ops
from svdengine.measuring.machine import describe_machine
from svdengine.tools.random_model import write_svdp

MakeNpu = Callable[..., Npu]
Launches = dict[str, Callable[..., None]]
RELU = zoo()["llama_relu_tied"]


def plug_in(monkeypatch: pytest.MonkeyPatch, npu: Npu, cache: Path) -> None:
    """Let the process find an emulated NPU, and look for built kernels in `cache`."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "acl" else found(name))
    for module in ("availability", "cann"):
        monkeypatch.setattr(sys.modules[f"svdengine.kernels.ascend.{module}"], "load_cann", lambda: npu.cann)
    monkeypatch.setattr("svdengine.executors.user_cache_directory", lambda: cache)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, [*arguments])


@pytest.fixture
def sparse_model(tmp_path: Path) -> Path:
    """A file of random weights with a predictor in it."""
    path = tmp_path / "relu.svdp"
    write_svdp(path, RELU, "f16")
    predictor = make_predictor(RELU, 8, 0, -1e4)
    with read_model_file(path) as file:
        about = {"kind": "svd", "calibrator": "uniform", "fingerprint": model_fingerprint(file)}
        write_model_with_predictor(path, file, svdengine.kernels.predictor.Predictor(predictor.layers, about))
    return path


def fake_toolkit(monkeypatch: pytest.MonkeyPatch, folder: Path, cmake: str) -> None:
    """A CANN installation without anything, and a CMake that runs the shell script."""
    (folder / "cann-8.1.0").mkdir(parents=True)
    (folder / "bin").mkdir()
    program = folder / "bin" / "cmake"
    program.write_text(f"#!/bin/sh\n{cmake}\n")
    program.chmod(0o755)
    monkeypatch.setenv("ASCEND_HOME_PATH", str(folder / "cann-8.1.0"))
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")


def test_a_device_is_found_and_described(make_npu: MakeNpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    npu = make_npu()
    assert find_npu(cann=npu.cann) == FoundNpu("Ascend910B3", 4 << 30, 3, "8.1.emulated")
    plug_in(monkeypatch, npu, tmp_path)
    described = describe_machine(measure=False).accelerators[1]
    assert described.available and described.reason == "Ascend910B3, 4.0 GiB, 3 vector cores, CANN 8.1.emulated"


def test_what_is_missing_is_named_in_one_line(make_npu: MakeNpu, monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(find_npu()).startswith("no Ascend runtime (CANN) was found; install Huawei's CANN 8")
    with pytest.raises(DeviceError, match="no module acl"):
        cann.load_cann.__wrapped__()
    for soc in ("Ascend310B1", "Ascend910B", "Ascend910A"):
        assert str(find_npu(cann=make_npu(soc=soc).cann)).startswith(
            f"{soc} is not supported; supported are Ascend910B1"
        )
    assert find_npu(1, make_npu().cann) == "CANN 8.1.emulated was found, but no NPU"
    assert str(find_npu(cann=make_npu(fail_at=0).cann)).startswith(
        "acl.init failed with 507899: EZ9999: the emulator says"
    )
    broken: Any = SimpleNamespace(init=lambda: 1 // 0)
    assert (
        find_npu(cann=cann.Cann(broken, make_npu(), "8.0"))
        == "the NPU cannot be used: integer division or modulo by zero"
    )
    # With the module but without the libraries, or with an old toolkit.
    monkeypatch.setitem(sys.modules, "acl", SimpleNamespace())
    with pytest.raises(DeviceError, match=r"CANN unknown was found, but libnnopbase\.so cannot be loaded"):
        cann.load_cann.__wrapped__()
    monkeypatch.setattr(cann, "installed_version", lambda: "7.0.1")
    with pytest.raises(DeviceError, match=r"CANN 7\.0\.1 was found, and 8\.0 or newer is needed"):
        cann.load_cann.__wrapped__()


@pytest.mark.parametrize(
    ("folder", "text", "version"),
    [
        ("latest", "runtime_running_version=[7.7.0.1.238:8.1.RC1]\nversion_dir=8.1", "8.1.RC1"),
        ("cann-8.5.0", None, "8.5.0"),
        ("toolkit", None, "unknown"),
    ],
)
def test_the_version_is_that_of_the_toolkit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: str, text: str | None, version: str
) -> None:
    (tmp_path / folder).mkdir()
    if text is not None:
        (tmp_path / folder / "version.cfg").write_text(text)
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path / folder))
    assert cann.installed_version() == version


def test_the_device_that_was_asked_for_is_missed(tmp_path: Path) -> None:
    write_svdp(tmp_path / "model.svdp", RELU, "f16")
    result = run("bench", str(tmp_path / "model.svdp"), "--device", "ascend", "-p", "4", "-n", "4")
    assert result.exit_code == 1 and "Ascend cannot be used: no Ascend runtime (CANN) was found" in result.stderr


def test_a_model_runs_from_library_and_command(
    make_npu: MakeNpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sparse_model: Path, capsys: Any
) -> None:
    plug_in(monkeypatch, make_npu(), tmp_path)
    tokens = random_tokens(RELU, 9)
    with svdengine.load(sparse_model, device="reference") as reference:
        expected = reference.logits(tokens)
    with svdengine.load(sparse_model, device="ascend") as llm:
        assert llm.executor.name == "ascend"
        assert relative_error(llm.logits(tokens), expected) < 4e-3
    assert capsys.readouterr().err == (
        "all FFNs run dense: the sparse FFN's kernels are not built; run: svdengine build-ascend-ops\n"
    )
    result = run("bench", str(sparse_model), "--device", "ascend", "--ffn", "dense", "-p", "4", "-n", "2", "-r", "1")
    assert result.exit_code == 0 and "| ascend" in result.stdout, result.output


def test_kernels_are_built_once_and_found(
    make_npu: MakeNpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kernel_library: Path, sparse_model: Path
) -> None:
    """The build that CMake would make is the library for the host: it is put in place, found and loaded."""
    npu = make_npu()
    plug_in(monkeypatch, npu, tmp_path)
    build = f'mkdir "$2/lib"; cp {kernel_library} "$2/lib/libsvdengine_ops.so"'
    fake_toolkit(monkeypatch, tmp_path / "ascend", f'case "$1" in -S) test -f "$2/CMakeLists.txt";; *) {build};; esac')
    result = run("build-ascend-ops")
    path = library_path(ascend_ops_folder(), "Ascend910B3", "8.1.0")
    assert result.exit_code == 0, result.output
    assert (
        result.stdout.strip() == str(path) and "building the kernels of the sparse FFN for Ascend910B3" in result.stderr
    )
    assert [p.name for p in path.parent.iterdir()] == ["libsvdengine_ops.so"]
    # Another device, CANN or source is another library.
    assert library_path(ascend_ops_folder(), "Ascend910B4", "8.1.0") != path
    assert library_path(ascend_ops_folder(), "Ascend910B3", "8.2.0") != path
    monkeypatch.setattr(npu.cann, "version", "8.1.0")
    assert custom_ops.load_custom_ops(npu.cann, "Ascend910B3", ascend_ops_folder()).score is not None


@pytest.mark.parametrize(
    ("soc", "cmake", "reason"),
    [
        ("Ascend310B1", "exit 0", "found the device 'Ascend310B1'; supported are Ascend910B1 to B4"),
        ("Ascend910B3", "echo 'CMake Error: no compiler'; exit 1", r"failed \(1\): CMake Error: no compiler"),
        ("Ascend910B3", "exit 0", r"made no libsvdengine_ops\.so"),
    ],
)
def test_a_build_that_fails_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, soc: str, cmake: str, reason: str
) -> None:
    fake_toolkit(monkeypatch, tmp_path / "ascend", cmake)
    with pytest.raises(DeviceError, match=reason):
        build_custom_ops(soc, tmp_path, lambda line: None)
    assert not list(tmp_path.rglob("*.so"))


def test_what_a_build_needs_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    monkeypatch.delenv("ASCEND_TOOLKIT_HOME", raising=False)
    result = run("build-ascend-ops")
    assert result.exit_code == 1 and "no Ascend runtime (CANN) was found" in result.stderr and "--soc" in result.stderr
    result = run("build-ascend-ops", "--soc", "Ascend910B3")
    assert result.exit_code == 1 and "no CANN toolkit was found" in result.stderr
    fake_toolkit(monkeypatch, tmp_path, "")
    monkeypatch.setenv("PATH", str(tmp_path))
    result = run("build-ascend-ops", "--soc", "Ascend910B3")
    assert result.exit_code == 1 and "cmake was not found" in result.stderr


def test_the_kernels_pass_their_self_test(make_npu: MakeNpu, launches: Launches, tmp_path: Path) -> None:
    npu = make_npu(launches=launches)
    assert failing_kernel(npu.cann, find_kernels(npu)) is None
    assert proven_custom_ops(npu.cann, npu.soc, tmp_path) == (
        "the sparse FFN's kernels are not built; run: svdengine build-ascend-ops"
    )


@pytest.mark.parametrize(
    ("kernel", "output", "columns"),
    [
        *(("svd_score", 7, 0), ("svd_gate", 6, 0), ("svd_gate", 7, 0), ("svd_up_down", 7, 0), ("svd_sum", 2, 0)),
        # Only for the long rows of large models: the argument of that place is 4096 columns.
        *(("svd_gate", 7, 9), ("svd_up_down", 7, 9)),
    ],
)
def test_a_kernel_that_is_wrong_on_a_device_is_noticed(
    make_npu: MakeNpu, launches: Launches, monkeypatch: pytest.MonkeyPatch, kernel: str, output: int, columns: int
) -> None:
    """A result is changed after the right one was computed: its fifth element or, of a list, another neuron."""
    symbol = f"aclrtlaunch_{kernel}"

    def changed(memory: Any, blocks: int, *arguments: Any) -> None:
        launches[symbol](memory, blocks, *arguments)
        if columns and arguments[columns] != 4096:
            return
        data = memory.find(arguments[output], 32)
        data[11 if kernel == "svd_sum" else 19] ^= 0x7C if kernel == "svd_sum" else 0x41

    npu = make_npu(launches={**launches, symbol: changed})
    ops = find_kernels(npu)
    assert failing_kernel(npu.cann, ops) == kernel
    monkeypatch.setattr(sys.modules["svdengine.kernels.ascend.self_test"], "load_custom_ops", lambda *_: ops)
    assert proven_custom_ops(npu.cann, npu.soc, Path()) == f"the kernel {kernel} gives wrong results on this device"


def test_logits_are_those_of_every_weight_format(
    make_npu: MakeNpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tokens = random_tokens(zoo()["llama"], 5)
    for dtype in ("q8", "q6", "q4"):
        path = tmp_path / f"{dtype}.svdp"
        write_svdp(path, zoo()["llama"], dtype)  # type: ignore[arg-type]
        plug_in(monkeypatch, make_npu(), tmp_path)
        logits = []
        for device in ("ascend", "reference"):
            with svdengine.load(path, device=device) as llm:
                logits.append(llm.logits(tokens))
        assert relative_error(*logits) < 4e-3
        assert np.isfinite(logits[0]).all()
