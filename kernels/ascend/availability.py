"""Whether an Ascend NPU can be used, and what it is; one line on what is missing where it cannot."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from svdengine.errors import DeviceError
from svdengine.kernels.ascend.cann import ADVICE, NO_CANN, Cann, load_cann
from svdengine.kernels.ascend.soc import SUPPORTED, soc_of


@dataclass(frozen=True)
class Npu:
    """An NPU as its runtime describes it."""

    soc: str  # such as Ascend910B3
    memory_bytes: int
    vector_cores: int  # that our kernels run on: of a 310P its AI cores
    cann: str  # the version


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
            name = str(cann.acl.get_soc_name())
            soc = soc_of(name)
            if soc is None:
                return f"{name} is not supported; supported are {SUPPORTED}"
            _, total = cann.call("rt.get_mem_info", soc.memory)
            return Npu(name, int(total), int(cann.call("get_device_capability", index, soc.cores)), cann.version)
        finally:
            cann.call("rt.reset_device", index)
    except DeviceError as error:
        return str(error)
    except Exception as error:
        # Whatever a broken installation raises: the CPU still works.
        return f"the NPU cannot be used: {' '.join(str(error).split())}"
