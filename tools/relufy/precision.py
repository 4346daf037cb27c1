"""The number format that training computes in. Weights and optimiser are float32 in any case."""

from __future__ import annotations

import time
from functools import cache

import torch

_SHAPE = (512, 512, 1024)  # of the tried product, rows, inner and columns
_TRIES = 5  # of which the fastest counts
_GAIN = 1.2  # that bfloat16 must bring: it is less exact


def mixed_precision(device: torch.device) -> torch.autocast:
    """While it lasts, matrices are multiplied in `compute_dtype`."""
    dtype = compute_dtype(device.type)
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16)


@cache
def compute_dtype(device: str) -> torch.dtype:
    """bfloat16 where the device, cpu or cuda, multiplies it clearly faster than float32, else float32.

    PyTorch says of GPUs whether they can. On CPUs it is measured, in some milliseconds: without instructions for it a
    product takes several times as long (7 times with AVX2), and what instructions there are does not tell how fast.
    """
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    faster = _product_seconds(torch.bfloat16) * _GAIN < _product_seconds(torch.float32)
    return torch.bfloat16 if faster else torch.float32


def _product_seconds(dtype: torch.dtype) -> float:
    rows, inner, columns = _SHAPE
    a, b = torch.ones(rows, inner, dtype=dtype), torch.ones(columns, inner, dtype=dtype)
    times = []
    for _ in range(_TRIES + 1):
        started = time.perf_counter()
        torch.nn.functional.linear(a, b)
        times.append(time.perf_counter() - started)
    return min(times[1:])
