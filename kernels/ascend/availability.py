"""Whether an Ascend NPU can be used, and what it is; one line on what is missing where it cannot."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from svdengine.errors import DeviceError
from svdengine.kernels.ascend.cann import ADVICE, NO_CANN, Cann, load_cann

SUPPORTED = "Ascend910B1 to B4 (Atlas A2) and Ascend910_93xx (Atlas A3)"
_HBM = 1  # attribute of acl.rt.get_mem_info


@dataclass(frozen=True)
class Npu:
    """An NPU as its runtime describes it."""

    soc: str  # such as Ascend910B3
    memory_bytes: int
    vector_cores: int
    cann: str  # the version


def is_supported(soc: str) -> bool:
    """Whether a device has what the backend uses. "Ascend910B" without a digit is another, older one."""
    return soc.startswith(("Ascend910B", "Ascend910_93")) and soc != "Ascend910B"


def find_npu(index: int = 0, cann: Cann | None = None) -> Npu | str:
    """The NPU, or one line on why none can be used. Nothing is loaded where the module `acl` is not there."""
    if cann is None and importlib.util.find_spec("acl") is None:
        return f"{NO_CANN}; {ADVICE}"
    try:
        cann = cann or load_cann()
        cann.start()
        if index >= cann.call("rt.get_device_count"):
            return f"CANN {cann.version} was found, but no NPU"
        cann.call("rt.set_device", index)
        try:
            soc = str(cann.acl.get_soc_name())
            if not is_supported(soc):
                return f"{soc} is not supported; supported are {SUPPORTED}"
            _, total = cann.call("rt.get_mem_info", _HBM)
            return Npu(soc, int(total), int(cann.call("get_device_capability", index, 1)), cann.version)
        finally:
            cann.call("rt.reset_device", index)
    except DeviceError as error:
        return str(error)
    except Exception as error:
        # Whatever a broken installation raises: the CPU still works.
        return f"the NPU cannot be used: {' '.join(str(error).split())}"
