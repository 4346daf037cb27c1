"""What every step works with on a device: the model, the buffers and the KV cache."""

from __future__ import annotations

from dataclasses import dataclass

from svdengine.kernels.cuda.device import Device
from svdengine.kernels.cuda.gemm import HalfCopies
from svdengine.kernels.cuda.kv_cache import KvCache
from svdengine.kernels.cuda.model import Model
from svdengine.kernels.cuda.workspace import Workspace


@dataclass(frozen=True)
class State:
    """What a step works with."""

    device: Device
    model: Model
    work: Workspace
    cache: KvCache
    copies: HalfCopies | None  # room for the library's operands, where there is a library
