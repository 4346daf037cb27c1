"""Makes the shared builders of this folder importable (model_zoo), and chooses how CUDA kernels run: see below.

With `pytest -n auto` (pytest-xdist) tests run in several processes. Each takes whole files, so that what the tests of a
file share is made once.
"""

import ctypes
import os
from typing import Any

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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files are handed out whole."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)
