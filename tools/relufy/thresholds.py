"""FATReLU with a threshold for each neuron, raised until as many gates are zero as are wanted.

What a neuron adds to the residual stream is gate * up * its column of down. Of the three the gate alone decides, so
the threshold of neuron i is level / (root mean square of its up * norm of its column): what falls below it is expected
to add less than the level of the layer. A level is the quantile of those products that leaves the wanted share zero.

A file has one threshold for all neurons, and needs no more: a gate scaled by s and its up by 1 / s are the same
neuron with the threshold scaled by s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from svdengine.tools.relufy.decoder import Ffn

_SAMPLED = 128  # tokens of a step that the levels are found on
_MEMORY = 0.9  # of a level at each step
_UP_MEMORY = 0.99  # of the mean square of up
_LEAST_IMPORTANCE = 0.1  # of the median of a layer: bounds what is scaled at the end
# Where ReLU alone leaves enough zeros, thresholds must still be above 0, and not so far below others that scaling them
# to one would leave the range of float16. A share of the root mean square of what neurons add: its square is lost.
_LEAST_LEVEL = 0.05


class Thresholds:
    """The thresholds of a student's FFNs, and what they are made from."""

    def __init__(self, ffns: Iterable[Ffn]) -> None:
        self._ffns = list(ffns)
        count, size = len(self._ffns), self._ffns[0].up.out_features
        device = self._ffns[0].up.weight.device
        self._up = torch.zeros(count, size, device=device)  # mean square
        self._levels = torch.zeros(count, device=device)
        self._steps = 0
        self._gates: list[Tensor] = [torch.empty(0)] * count  # of some tokens of this step, (n, f)

    @torch.no_grad()
    def observe(self, index: int, gate: Tensor, _active: Tensor, up: Tensor) -> None:
        """See a step of FFN `index`: an `Observer`."""
        gate, up = (x.detach().flatten(0, -2) for x in (gate, up))
        stride = max(1, len(gate) // _SAMPLED)
        self._gates[index] = gate[::stride].float().relu()
        square = up[::stride].float().square().mean(0)
        self._up[index] = square if self._steps == 0 else _UP_MEMORY * self._up[index] + (1 - _UP_MEMORY) * square

    @torch.no_grad()
    def follow(self, target: float) -> None:
        """Set the thresholds after a step that was observed, so that about the share `target` of gates is zero."""
        for index, ffn in enumerate(self._ffns):
            importance = self._importance(index)
            scores = (self._gates[index] * importance).flatten()
            level = torch.maximum(_quantile(scores, target), _LEAST_LEVEL * scores.square().mean().sqrt() + 1e-12)
            if self._steps:
                level = _MEMORY * self._levels[index] + (1 - _MEMORY) * level
            self._levels[index] = level
            ffn.threshold = level / importance
        self._steps += 1

    def state(self) -> dict[str, Tensor]:
        """What `load` needs to go on, but for the FFNs' weights."""
        state = {"up": self._up, "levels": self._levels, "steps": torch.tensor(self._steps)}
        return {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state, with the weights of that time."""
        self._up.copy_(state["up"])
        self._levels.copy_(state["levels"])
        self._steps = int(state["steps"])
        for index, ffn in enumerate(self._ffns):
            ffn.threshold = self._levels[index] / self._importance(index)

    def _importance(self, index: int) -> Tensor:
        """What each neuron of an FFN adds to the residual stream for a gate of 1, (f,)."""
        importance = self._up[index].sqrt() * self._ffns[index].down.weight.float().norm(dim=0)
        return importance.clamp(min=_LEAST_IMPORTANCE * float(importance.median()) + 1e-12)


def _quantile(values: Tensor, share: float) -> Tensor:
    """The value that about `share` of the values (n,) do not exceed."""
    return values.kthvalue(min(len(values), max(1, round(share * len(values))))).values


def _threshold(ffn: Ffn) -> Tensor:
    assert ffn.threshold is not None
    return ffn.threshold


@torch.no_grad()
def fold_thresholds(ffns: Iterable[Ffn]) -> float:
    """Scale gates and ups so that all thresholds are one, which is returned; the FFNs compute what they did before.

    It is the geometric mean of the thresholds, or 0 where some are 0: then nothing is changed.
    """
    changed = list(ffns)
    thresholds = torch.stack([_threshold(ffn) for ffn in changed])
    if not bool((thresholds > 0).all()):
        return 0.0
    one = float(thresholds.log().mean().exp())
    for ffn, threshold in zip(changed, thresholds, strict=True):
        _scale_gates(ffn, one / threshold)
    set_thresholds(changed, one)
    return one


@torch.no_grad()
def balance(ffns: Iterable[Ffn]) -> None:
    """Scale gates, ups and thresholds so that both rows of a neuron have one norm; the FFNs compute what they did.

    Adam moves all weights alike, and folding left neurons with small gates and large ups, or the other way round.
    """
    for ffn in ffns:
        gate, up = (part.weight.norm(dim=1).clamp(min=1e-12) for part in (ffn.gate, ffn.up))
        scale = (up / gate).sqrt()
        _scale_gates(ffn, scale)
        ffn.threshold = _threshold(ffn) * scale


def _scale_gates(ffn: Ffn, scale: Tensor) -> None:
    """Multiply the gate of each neuron by its scale (f,), and divide its up by it."""
    for part, factor in ((ffn.gate, scale), (ffn.up, 1 / scale)):
        part.weight.mul_(factor[:, None])
        if part.bias is not None:
            part.bias.mul_(factor)


def set_thresholds(ffns: Iterable[Ffn], threshold: float) -> None:
    """Give all neurons one threshold."""
    for ffn in ffns:
        ffn.threshold = torch.full_like(_threshold(ffn), threshold)
