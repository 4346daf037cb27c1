"""Makes the shared builders of this folder importable (model_zoo), and chooses how CUDA kernels run: see below.

With `pytest -n auto` (pytest-xdist) tests run in several processes. Each takes whole files, so that what the tests of a
file share is made once.
"""

import ctypes
import os
from typing import Any

import hypothesis
import pytest


def gpu_is_there() -> bool:
    """Whether the NVIDIA driver finds a GPU. Asked without CUDA libraries, which read their settings when imported."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


# Without a GPU kernels run in Python. Numba reads this when it is first imported; it changes nothing on the CPU.
if not gpu_is_there():
    os.environ.setdefault("NUMBA_ENABLE_CUDASIM", "1")

# Threads of BLAS and of PyTorch wait by spinning: with several processes, or on a busy machine, most of the time would
# go there. Products of tests are small. Read when the libraries are loaded.
for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

# A test must not fail by chance: no example is new, and none is timed, since the machine may be busy.
UNTIMED = hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.register_profile("explore", UNTIMED)  # pytest --hypothesis-profile explore: new ones each time
hypothesis.settings.register_profile("tests", UNTIMED, derandomize=True)
hypothesis.settings.load_profile("tests")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """As many processes as cores, but four at most: each may need a gigabyte, and the engine itself uses all cores."""
    from svdengine.kernels.cores import default_threads

    return min(4, default_threads())


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files are handed out whole, in order."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where processes share the tests, files with slow ones come first: one at the end would be waited for."""
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)
