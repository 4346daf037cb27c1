"""Stage 1: layer by layer, each student FFN learns what brings its output to the teacher's hidden state.

The inputs are those of the student so far, so that later layers repair what earlier ones got wrong. A token's loss is
weighted by the inverse squared norm of the teacher's hidden state: a few massive activations would own it otherwise.
With fatrelu the gates become zero here already, as many of a layer as the wanted sparsity of the model leaves to it
(`layer_shares`): what is zero from the beginning need not be unlearned.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from svdengine.tools.relufy.decoder import Decoder, Layer, counted_zeros, observed
from svdengine.tools.relufy.precision import mixed_precision
from svdengine.tools.relufy.schedule import learning_rate
from svdengine.tools.relufy.settings import Settings
from svdengine.tools.relufy.thresholds import Thresholds

Progress = Callable[[float, float], None]  # share of the layer's steps that are done, relative error of the last one

_ACTIVATIONS = 6 << 30  # bytes that the hidden states of teacher and student may take
_TRIED_STEPS = 3  # to learn how long one takes
# Tokens of a step, at most: many small steps go much further than few large ones on the same text.
_STEP_TOKENS = {"cpu": 512, "cuda": 2048}
_MEASURE_EVERY = 8  # steps: what each neuron matters
_RAMP = 0.4  # of a layer's steps, over which its share of zeros rises


@dataclass(frozen=True)
class LayerResult:
    """How a layer did: squared error over the teacher's squared norm, mean over tokens, before and after training."""

    index: int
    before: float
    after: float
    zeros: float  # share of the gates, after


def train_layers(
    teacher: Decoder,
    student: Decoder,
    windows: Tensor,
    settings: Settings,
    first: int,
    stop: Callable[[], bool],
    progress: Progress | None = None,
    shares: Sequence[float] | None = None,
) -> Iterator[LayerResult]:
    """Train the layers from `first` on in order; those before are taken as they are. Ends early when `stop` says so.

    windows: token ids (n, window) on the models' device. shares: of each layer's gates, what shall be zero; None
    leaves them alone. A layer that was begun and not finished is not yielded, and training it again gives the same
    weights.
    """
    cos, sin = teacher.rope(0, windows.shape[1])
    goal, state = (_batched(model.embedding, windows, settings.rows) for model in (teacher, student))
    for index, (theirs, ours) in enumerate(zip(teacher.layers, student.layers, strict=True)):
        goal = _batched(lambda x, layer=theirs: layer(x, cos, sin), goal, settings.rows)
        middle = _batched(lambda x, layer=ours: layer.attend(x, cos, sin), state, settings.rows)
        if index >= first:
            share = shares[index] if shares is not None else None
            result = _train_layer(
                ours, index, middle.flatten(0, 1), goal.flatten(0, 1), settings, stop, progress, share
            )
            if result is None:
                return
            yield result
        state = _batched(ours.feed, middle, settings.rows)


def tokens_in_time(teacher: Decoder, student: Decoder, settings: Settings, seconds: float) -> int:
    """Tokens that stage 1 can take so that all layers together train for about `seconds`."""
    config = teacher.config
    layer: Layer = student.layers[0]
    device = teacher.embedding.weight.device
    size = _step_tokens(settings, device)
    x = torch.randn(size, config.hidden_size, device=device)
    kept = {name: p.detach().clone() for name, p in layer.named_parameters()}
    started = [0.0] * (_TRIED_STEPS + 1)
    optimizer = _optimizer(layer, settings)
    for i in range(_TRIED_STEPS + 1):
        started[i] = time.monotonic()
        _step(layer, optimizer, x, x)
        if device.type == "cuda":
            torch.cuda.synchronize()
    step = (time.monotonic() - started[1]) / _TRIED_STEPS
    with torch.no_grad():
        for name, p in layer.named_parameters():
            p.copy_(kept[name])
    steps = seconds / (step * config.layer_count * settings.layer_epochs)
    most = _ACTIVATIONS // (3 * 4 * config.hidden_size)
    return max(4 * settings.step_tokens, min(int(steps * size), most))


def _train_layer(
    layer: Layer,
    index: int,
    middle: Tensor,
    goal: Tensor,
    settings: Settings,
    stop: Callable[[], bool],
    progress: Progress | None,
    share: float | None,
) -> LayerResult | None:
    """Train the FFN of a layer on what enters it (n, d), towards what shall come out of the layer (n, d)."""
    size = min(_step_tokens(settings, middle.device), len(middle))
    per_epoch = len(middle) // size
    total = per_epoch * settings.layer_epochs
    before, _ = _evaluate(layer, middle, goal, size)
    optimizer = _optimizer(layer, settings)
    thresholds = None if share is None else Thresholds([layer.ffn])
    order = torch.Generator().manual_seed(settings.seed + index)
    for step in range(total):
        if step % per_epoch == 0:
            shuffled = torch.randperm(len(middle), generator=order).to(middle.device)
        rows = shuffled[step % per_epoch * size :][:size]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings.layer_rate, step, total)
        if thresholds is not None and step % _MEASURE_EVERY == 0:
            thresholds.measure([_gate_weights(layer, middle[rows], goal[rows])])
        with nullcontext() if thresholds is None else observed([layer.ffn], thresholds.observe):
            error = _step(layer, optimizer, middle[rows], goal[rows])
        if thresholds is not None and share is not None:
            thresholds.follow(share * min(1.0, (step + 1) / (_RAMP * total)))
        if stop():
            return None
        if progress is not None:
            progress((step + 1) / total, error)
    after, zeros = _evaluate(layer, middle, goal, size)
    return LayerResult(index, before, after, zeros)


@torch.no_grad()
def _gate_weights(layer: Layer, middle: Tensor, goal: Tensor) -> Tensor:
    """What the gates (n, f) of a layer are worth: how far one of 1 moves the output, over the norm of the goal."""
    with mixed_precision(middle.device):
        up = layer.ffn.up(layer.ffn_norm(middle)).float()
    return up * layer.ffn.down.weight.norm(dim=0) / (goal.norm(dim=-1, keepdim=True) + 1e-3)


def _step_tokens(settings: Settings, device: torch.device) -> int:
    return min(settings.step_tokens, _STEP_TOKENS[device.type])


def _optimizer(layer: Layer, settings: Settings) -> torch.optim.Adam:
    trained = [*layer.ffn.parameters(), *layer.ffn_norm.parameters()]
    return torch.optim.Adam(trained, settings.layer_rate, betas=(0.9, 0.95), fused=True)


def _step(layer: Layer, optimizer: torch.optim.Adam, middle: Tensor, goal: Tensor) -> float:
    with mixed_precision(middle.device):
        loss = relative_error(layer.feed(middle), goal)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def relative_error(found: Tensor, goal: Tensor) -> Tensor:
    """Squared distance over squared norm of the goal, mean over tokens."""
    goal = goal.float()
    distance = (found.float() - goal).square().sum(-1)
    return (distance / (goal.square().sum(-1) + 1e-6)).mean()


@torch.no_grad()
def _evaluate(layer: Layer, middle: Tensor, goal: Tensor, size: int) -> tuple[float, float]:
    """Relative error, and share of zeros in the gates."""
    with mixed_precision(middle.device), counted_zeros([layer.ffn]) as zeros:
        errors = [relative_error(layer.feed(x), y) for x, y in zip(middle.split(size), goal.split(size), strict=True)]
    return float(torch.stack(errors).mean()), float(torch.stack(zeros).mean())


@torch.no_grad()
def _batched(function: Callable[[Tensor], Tensor], x: Tensor, rows: int) -> Tensor:
    with mixed_precision(x.device):
        return torch.cat([function(part).float() for part in x.split(rows)])
