"""Stage 1: layer by layer, each student FFN learns what brings its output to the teacher's hidden state.

The inputs are those of the student so far, so that later layers repair what earlier ones got wrong. A token's loss is
weighted by the inverse squared norm of the teacher's hidden state: a few massive activations would own it otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from svdengine.tools.relufy.decoder import Decoder, Layer, counted_zeros
from svdengine.tools.relufy.schedule import learning_rate
from svdengine.tools.relufy.settings import Settings

Progress = Callable[[float, float], None]  # share of the layer's steps that are done, relative error of the last one

_ACTIVATIONS = 6 << 30  # bytes that the hidden states of teacher and student may take
_TRIED_STEPS = 3  # to learn how long one takes


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
) -> Iterator[LayerResult]:
    """Train the layers from `first` on in order; those before are taken as they are. Ends early when `stop` says so.

    windows: token ids (n, window) on the models' device. A layer that was begun and not finished is not yielded, and
    training it again gives the same weights.
    """
    cos, sin = teacher.rope(0, windows.shape[1])
    goal = _batched(teacher.embedding, windows, settings.rows)
    state = goal.clone()
    for index, (theirs, ours) in enumerate(zip(teacher.layers, student.layers, strict=True)):
        goal = _batched(lambda x, layer=theirs: layer(x, cos, sin), goal, settings.rows)
        middle = _batched(lambda x, layer=ours: layer.attend(x, cos, sin), state, settings.rows)
        if index >= first:
            result = _train_layer(ours, index, middle.flatten(0, 1), goal.flatten(0, 1), settings, stop, progress)
            if result is None:
                return
            yield result
        state = _batched(ours.feed, middle, settings.rows)


def tokens_in_time(teacher: Decoder, student: Decoder, settings: Settings, seconds: float) -> int:
    """Tokens that stage 1 can take so that all layers together train for about `seconds`."""
    config = teacher.config
    layer: Layer = student.layers[0]
    device = teacher.embedding.weight.device
    x = torch.randn(settings.step_tokens, config.hidden_size, device=device)
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
    return max(4 * settings.step_tokens, min(int(steps * settings.step_tokens), most))


def _train_layer(
    layer: Layer,
    index: int,
    middle: Tensor,
    goal: Tensor,
    settings: Settings,
    stop: Callable[[], bool],
    progress: Progress | None,
) -> LayerResult | None:
    """Train the FFN of a layer on what enters it (n, d), towards what shall come out of the layer (n, d)."""
    size = min(settings.step_tokens, len(middle))
    per_epoch = len(middle) // size
    total = per_epoch * settings.layer_epochs
    before, _ = _evaluate(layer, middle, goal, size)
    optimizer = _optimizer(layer, settings)
    order = torch.Generator().manual_seed(settings.seed + index)
    for step in range(total):
        if step % per_epoch == 0:
            shuffled = torch.randperm(len(middle), generator=order).to(middle.device)
        rows = shuffled[step % per_epoch * size :][:size]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings.layer_rate, step, total)
        error = _step(layer, optimizer, middle[rows], goal[rows])
        if stop():
            return None
        if progress is not None:
            progress((step + 1) / total, error)
    after, zeros = _evaluate(layer, middle, goal, size)
    return LayerResult(index, before, after, zeros)


def _optimizer(layer: Layer, settings: Settings) -> torch.optim.Adam:
    trained = [*layer.ffn.parameters(), *layer.ffn_norm.parameters()]
    return torch.optim.Adam(trained, settings.layer_rate, betas=(0.9, 0.95), fused=True)


def _step(layer: Layer, optimizer: torch.optim.Adam, middle: Tensor, goal: Tensor) -> float:
    with torch.autocast(middle.device.type, torch.bfloat16):
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
    with torch.autocast(middle.device.type, torch.bfloat16), counted_zeros([layer.ffn]) as zeros:
        errors = [relative_error(layer.feed(x), y) for x, y in zip(middle.split(size), goal.split(size), strict=True)]
    return float(torch.stack(errors).mean()), float(torch.stack(zeros).mean())


@torch.no_grad()
def _batched(function: Callable[[Tensor], Tensor], x: Tensor, rows: int) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16):
        return torch.cat([function(part).float() for part in x.split(rows)])
