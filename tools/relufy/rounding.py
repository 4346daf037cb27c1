"""Training with the weights that a `q4` file will hold: they are rounded for the forward and backward pass, and what
the gradient changes are the weights before rounding (straight-through, arXiv:1308.3432)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from svdengine.kernels.formats import COLUMN_MULTIPLE, GROUP
from svdengine.tools.relufy.decoder import Decoder

_CHUNK = 256  # rows that are rounded at a time: what is made of them on the way stays in the cache


@torch.no_grad()
def round_q4(weight: Tensor) -> Tensor:
    """A (rows, columns) float32 matrix as `formats.dequantize` gives it back from `q4`."""
    return torch.cat([_round_rows(part) for part in weight.split(_CHUNK)])


def _round_rows(weight: Tensor) -> Tensor:
    rows, columns = weight.shape
    groups = functional.pad(weight, (0, -columns % COLUMN_MULTIPLE)).reshape(rows, -1, GROUP)
    lowest, highest = groups.aminmax(dim=-1)
    low, high = (-lowest).clamp(min=0), highest.clamp(min=0)
    unit = (high + low).div_(15).amax(1, keepdim=True) / 255
    low_unit = low.amax(1, keepdim=True) / 255
    offset = _multiple(low, low_unit) * low_unit
    scale = _multiple((high + offset) / 15, unit).clamp(max=255) * unit
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    q = ((groups + offset[..., None]) * inverse[..., None]).round_().clamp_(0, 15)
    return q.mul_(scale[..., None]).sub_(offset[..., None]).reshape(rows, -1)[:, :columns]


def _multiple(values: Tensor, unit: Tensor) -> Tensor:
    return torch.where(unit > 0, values / unit, 0.0).round_()


class Rounding:
    """A student's matrices as a file holds them. Those that it shares with its teacher are rounded once."""

    def __init__(self, student: Decoder, embedding: bool) -> None:
        """embedding: round that of tokens and the output projection too. Nothing is changed before `rounded`."""
        layers = student if embedding else student.layers
        holders = [(name, m) for name, m in layers.named_modules() if isinstance(m, nn.Linear | nn.Embedding)]
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
