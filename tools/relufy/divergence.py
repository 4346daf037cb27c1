"""KL divergence of next-token distributions, from the teacher's to the student's, and its gradient.

As tensor operations this takes ten passes over numbers that no cache holds; on a CPU one kernel does a row of logits
at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.simd import (
    exp_f32,
    fma,
    load_bf16,
    load_f32,
    max_lanes,
    maximum_f32,
    splat_f32,
    store_f32,
    sum_lanes,
    zero_f32,
)

# Rows of logits that are held at once: on a CPU so few that the memory is reused and stays in the cache.
LOGIT_ROWS = {"cpu": 128, "cuda": 2048}
_LANES = 16


def divergence_gradient(found: Tensor, head: nn.Module, wanted: Tensor, their_head: nn.Module) -> tuple[float, Tensor]:
    """KL divergence, mean over tokens in nats, of hidden states (n, d), and its gradient with respect to `found`.

    Logits are made for some rows at a time: those of a whole batch would be most of the memory. The gradients of a
    trained head are added to it.
    """
    n = len(found)
    leaf = found.detach().requires_grad_()
    total = torch.zeros((), device=found.device)
    size = LOGIT_ROWS[found.device.type]
    for start in range(0, n, size):
        rows = slice(start, start + size)
        logits = head(leaf[rows])
        with torch.no_grad():
            theirs = their_head(wanted[rows])
            divergences, gradient = of_logits(theirs, logits.detach(), 1 / n)
            total += divergences.sum() / n
        logits.backward(gradient.to(logits.dtype))
    gradient_of_found = leaf.grad
    assert gradient_of_found is not None
    return float(total), gradient_of_found


@torch.no_grad()
def of_logits(theirs: Tensor, ours: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Divergence of each row of logits (rows, vocabulary), (rows,) float32; its gradient by `ours`, times `scale`."""
    kernel = _KERNELS.get(ours.dtype)
    if kernel is None or ours.device.type != "cpu" or ours.shape[1] % _LANES or theirs.dtype is not ours.dtype:
        return _by_tensors(theirs, ours, scale)
    theirs, ours = theirs.contiguous(), ours.contiguous()
    gradient = torch.empty(ours.shape)
    divergences = torch.empty(len(ours))
    addresses = theirs.data_ptr(), ours.data_ptr(), gradient.data_ptr()
    kernel(*addresses, ours.shape[1], np.float32(scale), divergences.numpy())
    return divergences, gradient


def _by_tensors(theirs: Tensor, ours: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    theirs, ours = (torch.log_softmax(logits.float(), -1) for logits in (theirs, ours))
    p, q = theirs.exp(), ours.exp()
    return theirs.sub_(ours).mul_(p).sum(-1), q.sub_(p).mul_(scale)


def _kernel(load: Any, size: int) -> Callable[..., None]:
    """All rows, where a logit has `size` bytes and `load` reads 16 of them."""

    @jit
    def highest(logits: int, columns: int) -> Any:
        found = load(logits)
        for i in range(_LANES, columns, _LANES):
            found = maximum_f32(found, load(logits + i * size))
        return splat_f32(max_lanes(found))

    @jit
    def one_row(theirs: int, ours: int, gradient: int, columns: int, scale: np.float32) -> Any:
        their_highest, our_highest = highest(theirs, columns), highest(ours, columns)
        their_sum, our_sum, product = zero_f32(), zero_f32(), zero_f32()
        for i in range(0, columns, _LANES):
            t, o = load(theirs + i * size) - their_highest, load(ours + i * size) - our_highest
            e = exp_f32(t)
            their_sum, our_sum = their_sum + e, our_sum + exp_f32(o)
            product = fma(e, t - o, product)
        their_total, our_total = sum_lanes(their_sum), sum_lanes(our_sum)
        p, q = splat_f32(scale / their_total), splat_f32(scale / our_total)
        for i in range(0, columns, _LANES):
            t, o = load(theirs + i * size) - their_highest, load(ours + i * size) - our_highest
            store_f32(gradient + i * 4, exp_f32(o) * q - exp_f32(t) * p)
        return sum_lanes(product) / their_total + math.log(our_total / their_total)

    @numba.njit(parallel=True, error_model="numpy")
    def all_rows(
        theirs: int, ours: int, gradient: int, columns: int, scale: np.float32, divergences: NDArray[np.float32]
    ) -> None:
        for row in numba.prange(len(divergences)):
            at = row * columns
            divergences[row] = one_row(theirs + at * size, ours + at * size, gradient + at * 4, columns, scale)

    return all_rows


_KERNELS = {torch.bfloat16: _kernel(load_bf16, 2), torch.float32: _kernel(load_f32, 4)}
