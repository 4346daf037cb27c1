"""Kernels run in the simulator, or on the GPU where there is one. Without numba-cuda these tests are skipped."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from shared_once import made_once

NEEDED = {"numba_cuda": "test", "greenlet": "test"}  # package -> extra
if os.environ.get("NUMBA_ENABLE_CUDASIM") != "1":  # there is a GPU
    NEEDED["cupy"] = "cuda"
MISSING = {name: extra for name, extra in NEEDED.items() if importlib.util.find_spec(name) is None}


class SkippedModule(pytest.Module):
    """A test file that cannot even be imported."""

    def collect(self) -> Any:
        extras = ",".join(sorted(set(MISSING.values())))
        pytest.skip(f"needs {' and '.join(MISSING)}: pip install 'svdengine[{extras}]'", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return SkippedModule.from_parent(parent, path=module_path) if MISSING else None


@pytest.fixture
def device() -> Iterator[Any]:
    """A Device (kernels/cuda/device.py): the GPU, or else the simulator."""
    import simulator

    from svdengine.kernels.cuda import cupy_device
    from svdengine.kernels.cuda import device as devices
    from svdengine.kernels.cuda.intrinsics import SIMULATED

    if SIMULATED:
        simulator.install()
    found = devices.SimulatedDevice() if SIMULATED else cupy_device.CupyDevice()
    try:
        yield found
    finally:
        found.close()


@pytest.fixture(scope="session")
def machine_code_report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """{kernel: {target: figures}}, or {kernel: {"error": text}}: what all kernels are compiled to (offline.py)."""
    import compiled

    def make(path: Path) -> None:
        path.write_text(json.dumps(compiled.compile_everything()))

    report: dict[str, dict[str, Any]] = json.loads(made_once(tmp_path_factory, "machine_code.json", make).read_text())
    return report
