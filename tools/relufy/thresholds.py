"""FATReLU with a threshold for each neuron, raised until as many gates are zero as are wanted.

What a gate is worth is told by the loss: a gate g that becomes zero costs about g^2 / 2 times the mean square of the
gradient with respect to it, the diagonal of the Fisher information (as in optimal brain damage, LeCun et al. 1990).
So the importance of a neuron is the root mean square of that gradient, and its threshold is level / importance, with
one level for the whole model: layers in which gates matter less get more zeros. The level is the quantile of gate
times importance that leaves the wanted share zero. Stage 1 sees one layer at a time: each gets the share of zeros
that one level leaves to it in the original, and a gate's gradient there is how far it moves the layer's output.

A file has one threshold for all neurons, and needs no more: a gate scaled by s and its up by 1 / s are the same
neuron with the threshold scaled by s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from svdengine.tools.relufy.decoder import Ffn

_SAMPLED = 64  # tokens of a step that the level is found on
_MOST_SCORES = 1 << 19  # about, of their gates' scores
_MEMORY = 0.9  # of the level at each step
_SQUARE_MEMORY = 0.8  # of the mean squares of gradients at each measurement
_LEAST_IMPORTANCE = 0.1  # of the median of a layer: bounds what is scaled at the end
# Where ReLU alone leaves enough zeros, thresholds must still be above 0, and not so far below others that scaling them
# to one would leave the range of float16. A share of the median of what active gates matter.
_LEAST_LEVEL = 0.05
_MOST_SHARE = 0.97  # of a layer's gates


class Thresholds:
    """The thresholds of a student's FFNs, and what they are made from."""

    def __init__(self, ffns: Iterable[Ffn]) -> None:
        self._ffns = list(ffns)
        count, size = len(self._ffns), self._ffns[0].up.out_features
        device = self._ffns[0].up.weight.device
        self._squares = torch.zeros(count, size, device=device)  # of the gradient, mean
        self._measured = 0  # times
        self._level = torch.zeros((), device=device)
        self._steps = 0
        self._gates: list[Tensor] = [torch.empty(0)] * count  # of some tokens of this step, (n, f)

    @torch.no_grad()
    def measure(self, gradients: Sequence[Tensor]) -> None:
        """See, for each FFN, the gradients of tokens' losses with respect to their gates, (n, f)."""
        squares = torch.stack([gradient.float().square().mean(0) for gradient in gradients])
        memory = _SQUARE_MEMORY if self._measured else 0.0
        self._squares.mul_(memory).add_(squares, alpha=1 - memory)
        self._measured += 1

    @torch.no_grad()
    def observe(self, index: int, gate: Tensor, _active: Tensor) -> None:
        """See a step of FFN `index`: an `Observer`."""
        gate = gate.detach().flatten(0, -2)
        self._gates[index] = gate[:: max(1, len(gate) // _SAMPLED)].float().relu()

    @torch.no_grad()
    def follow(self, target: float) -> None:
        """Set the thresholds after a step that was observed, so that about the share `target` of gates is zero."""
        importance = self._importance()
        scores = torch.cat([(gates * row).flatten() for gates, row in zip(self._gates, importance, strict=True)])
        scores = scores[:: len(scores) // _MOST_SCORES | 1]  # odd, so that it meets all neurons
        level = torch.maximum(_quantile(scores, target), _LEAST_LEVEL * scores[scores > 0].median())
        self._level = _MEMORY * self._level + (1 - _MEMORY) * level if self._steps else level
        self._steps += 1
        self._set(importance)

    def state(self) -> dict[str, Tensor]:
        """What `load` needs to go on."""
        counts = {"steps": torch.tensor(self._steps), "measured": torch.tensor(self._measured)}
        state = {"squares": self._squares, "level": self._level, **counts}
        return {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        self._squares.copy_(state["squares"])
        self._level = state["level"].to(self._squares.device)
        self._steps, self._measured = int(state["steps"]), int(state["measured"])
        self._set(self._importance())

    def _set(self, importance: Tensor) -> None:
        for ffn, row in zip(self._ffns, importance, strict=True):
            ffn.threshold = self._level / row

    def _importance(self) -> Tensor:
        """Of each neuron, (layers, f)."""
        importance = self._squares.sqrt()
        return importance.clamp(min=_LEAST_IMPORTANCE * importance.median(1, keepdim=True).values + 1e-12)


@torch.no_grad()
def layer_shares(gates: Sequence[Tensor], gradients: Sequence[Tensor], target: float) -> list[float]:
    """Share of each layer's gates that one level for all makes zero where it leaves `target` of them all zero.

    gates, gradients: (n, f) of each FFN, as `measure` takes them.
    """
    scores = [gate.float().relu() * g.float().square().mean(0).sqrt() for gate, g in zip(gates, gradients, strict=True)]
    level = _quantile(torch.cat([row.flatten() for row in scores]), target)
    return [min(_MOST_SHARE, float((row <= level).float().mean())) for row in scores]


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
