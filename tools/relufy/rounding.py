"""Training with the weights that a `q4` file will hold: they are rounded for the forward and backward pass, and what
the gradient changes are the weights before rounding (straight-through, arXiv:1308.3432)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from svdengine.kernels.formats import COLUMN_MULTIPLE, GROUP
from svdengine.tools.relufy.decoder import Decoder

_DAMPING = 0.1  # of the mean of a moment's diagonal, added to it


@torch.no_grad()
def round_q4(weight: Tensor) -> Tensor:
    """A (rows, columns) float32 matrix as `formats.dequantize` gives it back from `q4`."""
    if weight.device.type != "cpu":
        return _round_rows(weight)
    rounded = torch.empty(weight.shape)
    _round_q4_on_cpu(weight.contiguous().numpy(), rounded.numpy())
    return rounded


@numba.njit(parallel=True, error_model="numpy")
def _round_q4_on_cpu(weight: NDArray[np.float32], rounded: NDArray[np.float32]) -> None:
    """`_round_rows` in one pass over the memory: as tensor operations it takes longer than half a training step."""
    rows, columns = weight.shape
    groups = -(-columns // GROUP)
    zero, levels, units = np.float32(0), np.float32(15), np.float32(255)
    for row in numba.prange(rows):
        low, high = np.zeros(groups, np.float32), np.zeros(groups, np.float32)
        for g in range(groups):
            least, most = zero, zero
            for w in weight[row, g * GROUP : (g + 1) * GROUP]:
                least, most = min(least, w), max(most, w)
            low[g], high[g] = -least, most
        unit, low_unit = ((high + low) / levels).max() / units, low.max() / units
        for g in range(groups):
            offset = np.rint(low[g] / low_unit) * low_unit if low_unit > zero else zero
            scale = min(np.rint((high[g] + offset) / levels / unit), units) * unit if unit > zero else zero
            inverse = np.float32(1) / scale if scale > zero else zero
            for column in range(g * GROUP, min(columns, (g + 1) * GROUP)):
                q = np.rint((weight[row, column] + offset) * inverse)
                rounded[row, column] = max(zero, min(levels, q)) * scale - offset


@torch.no_grad()
def round_q4_with_feedback(weight: Tensor, moment: Tensor) -> Tensor:
    """Like `round_q4`, but so that products with x change little, where moment (columns, columns) is E[x x^T].

    Columns are rounded in order, and what one got wrong is made up for by those after it, as far as their inputs go
    together (GPTQ, arXiv:2210.17323). The extremes of each group stay, so that `round_q4` of the result, and with it
    a conversion to `q4`, changes nothing.
    """
    rows, columns = weight.shape
    extra = -columns % COLUMN_MULTIPLE
    w = functional.pad(weight, (0, extra)).clone()
    groups = w.reshape(rows, -1, GROUP)
    scale, offset = _grid(groups)
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    nothing = torch.zeros_like(groups, dtype=torch.bool)
    lowest, highest = (
        nothing.scatter(-1, index, True).reshape(rows, -1)
        for index in (groups.argmin(-1, keepdim=True), groups.argmax(-1, keepdim=True))
    )
    lowest, highest = lowest & (w < 0), highest & (w > 0)
    damped = functional.pad(moment.double(), (0, extra, 0, extra))
    damped.diagonal().add_(_DAMPING * float(moment.diagonal().mean()) + 1e-12)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True).float()
    for start in range(0, w.shape[1], GROUP):
        end, group = start + GROUP, start // GROUP
        errors = torch.empty(rows, GROUP, device=w.device)
        for column in range(start, end):
            q = ((w[:, column] + offset[:, group]) * inverse[:, group]).round_().clamp_(0, 15)
            q[lowest[:, column]], q[highest[:, column]] = 0.0, 15.0
            value = q * scale[:, group] - offset[:, group]
            error = (w[:, column] - value) / factor[column, column]
            errors[:, column - start] = error
            w[:, column] = value
            w[:, column + 1 : end] -= error[:, None] * factor[column, column + 1 : end]
        w[:, end:] -= errors @ factor[start:end, end:]
    return w[:, :columns].contiguous()


def _round_rows(weight: Tensor) -> Tensor:
    rows, columns = weight.shape
    groups = functional.pad(weight, (0, -columns % COLUMN_MULTIPLE)).reshape(rows, -1, GROUP)
    scale, offset = _grid(groups)
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    q = ((groups + offset[..., None]) * inverse[..., None]).round_().clamp_(0, 15)
    return q.mul_(scale[..., None]).sub_(offset[..., None]).reshape(rows, -1)[:, :columns]


def _grid(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset (rows, n) of groups (rows, n, GROUP): a weight becomes scale * q - offset, q in 0..15."""
    lowest, highest = groups.aminmax(dim=-1)
    low, high = (-lowest).clamp(min=0), highest.clamp(min=0)
    unit = (high + low).div_(15).amax(1, keepdim=True) / 255
    low_unit = low.amax(1, keepdim=True) / 255
    offset = _multiple(low, low_unit) * low_unit
    return _multiple((high + offset) / 15, unit).clamp(max=255) * unit, offset


def _multiple(values: Tensor, unit: Tensor) -> Tensor:
    return torch.where(unit > 0, values / unit, 0.0).round_()


def round_embedding(student: Decoder, moment: Tensor) -> None:
    """Give the student a rounded embedding and output projection of its own, where it does not train them.

    moment: E[h h^T] of the hidden states h (d) that the projection reads.
    """
    head, embedding = student.head, student.embedding
    if head.weight.requires_grad:
        return
    tied = head.weight is embedding.weight
    head.weight = nn.Parameter(round_q4_with_feedback(head.weight, moment), requires_grad=False)
    embedding.weight = head.weight if tied else nn.Parameter(round_q4(embedding.weight), requires_grad=False)


class Rounding:
    """A student's matrices as a file holds them. Those that it shares with its teacher are rounded once."""

    def __init__(self, student: Decoder, embedding: bool, down: bool = True) -> None:
        """embedding: round that of tokens and the output projection too; down: the FFNs' down projections.

        Nothing is changed before `rounded`.
        """
        layers = student if embedding else student.layers
        holders = [(name, m) for name, m in layers.named_modules() if isinstance(m, nn.Linear | nn.Embedding)]
        if not down:
            holders = [(name, m) for name, m in holders if not name.endswith(".down")]
        trained = {id(m.weight): (name, m.weight) for name, m in holders if m.weight.requires_grad}
        self._trained = list(trained.values())
        frozen = {id(m.weight): m.weight for _, m in holders if not m.weight.requires_grad}
        stored = {key: nn.Parameter(_stored("", p), requires_grad=False) for key, p in frozen.items()}
        self._frozen = [(m, m.weight, stored[id(m.weight)]) for _, m in holders if id(m.weight) in stored]

    @contextmanager
    def rounded(self) -> Iterator[None]:
        """While it lasts, the student computes with rounded weights."""
        kept = [p.data for _, p in self._trained]
        for module, _, stored in self._frozen:
            module.weight = stored
        try:
            for name, p in self._trained:
                p.data = _stored(name, p.data)
            yield
        finally:
            for (_, p), data in zip(self._trained, kept, strict=True):
                p.data = data
            for module, weight, _ in self._frozen:
                module.weight = weight


def _stored(name: str, weight: Tensor) -> Tensor:
    """A weight as the file gives it back. `down` lies there with a row for each neuron."""
    return round_q4(weight.T.contiguous()).T.contiguous() if name.endswith(".down") else round_q4(weight)
