"""Makes the shared builders of this folder importable (model_zoo), and chooses how CUDA kernels run: see below."""

import ctypes
import os


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
