"""Stage 2: end to end, the student learns the teacher's next-token distribution while its gates are pushed to zero."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from svdengine.tools.relufy.decoder import Decoder, record_gates
from svdengine.tools.relufy.schedule import Steering, learning_rate
from svdengine.tools.relufy.settings import Settings

_LOGIT_ROWS = 2048  # rows of logits that are held at once
_CLIP = 1.0  # norm of the gradient
_TRIED_STEPS = 3  # to learn how long one takes


@dataclass(frozen=True)
class StepResult:
    """What one step of stage 2 found, before its update."""

    divergence: float  # KL from the teacher's distribution to the student's, nats a token
    zeros: float  # share of the gates
    weight: float  # of the sparsity penalty


class Distillation:
    """The student, its optimiser and the state of the schedule: all that a step changes."""

    def __init__(self, teacher: Decoder, student: Decoder, settings: Settings, windows: NDArray[np.int32]) -> None:
        self.teacher, self.student, self.settings = teacher, student, settings
        self._windows = windows
        self.trained = [p for p in student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.trained, settings.rate, betas=(0.9, 0.95), fused=True)
        self.steering = Steering()
        self.step = 0

    def run_step(self, total: int) -> StepResult:
        """Take the next of `total` steps."""
        goal = self.settings.sparsity
        weight = self.steering.weight(self.step, total, goal)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings.rate, self.step, total)
        self.optimizer.zero_grad()
        divergence, zeros = self._backward(self._batch(self.step), weight)
        nn.utils.clip_grad_norm_(self.trained, _CLIP)
        self.optimizer.step()
        self.steering = self.steering.after(zeros, self.step, total, goal)
        self.step += 1
        return StepResult(divergence, zeros, weight)

    def steps_in_time(self, seconds: float) -> int:
        """Steps that take about `seconds`. Nothing is changed."""
        device = self.teacher.embedding.weight.device
        started = 0.0
        for i in range(_TRIED_STEPS + 1):
            if i == 1:
                started = time.monotonic()
            self._backward(self._batch(i), 1.0)
            self.optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
        # The optimiser's own part is small, and it cannot be tried without a change of the weights.
        return max(1, int(seconds / ((time.monotonic() - started) / _TRIED_STEPS)))

    def _batch(self, step: int) -> Tensor:
        """The windows of a step: every window once in random order, then again in another."""
        rows, count = self.settings.rows, len(self._windows)
        numbers = range(step * rows, (step + 1) * rows)
        picked = [_order(self.settings.seed, i // count, count)[i % count] for i in numbers]
        device = self.teacher.embedding.weight.device
        return torch.from_numpy(self._windows[np.asarray(picked)].astype(np.int64)).to(device)

    def _backward(self, tokens: Tensor, weight: float) -> tuple[float, float]:
        """Add the gradients of a batch; the divergence and the share of zeros."""
        with torch.autocast(tokens.device.type, torch.bfloat16), record_gates(self.student.ffns()) as gates:
            with torch.no_grad():
                wanted = self.teacher(tokens).flatten(0, 1)
            found = self.student(tokens).flatten(0, 1)
            divergence, gradient = divergence_gradient(found, self.student.head, wanted, self.teacher.head)
        penalty = torch.stack([g.penalty for g in gates]).mean()
        torch.autograd.backward([found, penalty], [gradient, torch.full_like(penalty, weight)])
        zeros = float(torch.stack([g.zeros for g in gates]).mean())
        return divergence, zeros


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(count)


def divergence_gradient(found: Tensor, head: nn.Module, wanted: Tensor, their_head: nn.Module) -> tuple[float, Tensor]:
    """KL divergence, mean over tokens in nats, of hidden states (n, d), and its gradient with respect to `found`.

    Logits are made for some rows at a time: those of a whole batch would be most of the memory. The gradients of a
    trained head are added to it.
    """
    n = len(found)
    leaf = found.detach().requires_grad_()
    total = torch.zeros((), device=found.device)
    for start in range(0, n, _LOGIT_ROWS):
        rows = slice(start, start + _LOGIT_ROWS)
        with torch.no_grad():
            theirs = torch.log_softmax(their_head(wanted[rows]).float(), -1)
        ours = torch.log_softmax(head(leaf[rows]).float(), -1)
        loss = nn.functional.kl_div(ours, theirs, reduction="sum", log_target=True) / n
        loss.backward()
        total += loss.detach()
    gradient = leaf.grad
    assert gradient is not None
    return float(total), gradient


@torch.no_grad()
def perplexity(model: Decoder, windows: NDArray[np.int32], rows: int = 8) -> float:
    """Perplexity over all tokens of windows but the first of each."""
    device = model.embedding.weight.device
    losses, count = 0.0, 0
    for start in range(0, len(windows), rows):
        tokens = torch.from_numpy(windows[start : start + rows].astype(np.int64)).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            logits = model.head(model(tokens)[:, :-1]).float()
        losses += float(nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"))
        count += tokens[:, 1:].numel()
    return float(np.exp(losses / count))


@torch.no_grad()
def layer_zeros(model: Decoder, windows: NDArray[np.int32], rows: int = 8) -> list[float]:
    """Share of the gates that are zero, layer by layer."""
    device = model.embedding.weight.device
    found = []
    for start in range(0, len(windows), rows):
        tokens = torch.from_numpy(windows[start : start + rows].astype(np.int64)).to(device)
        with torch.autocast(device.type, torch.bfloat16), record_gates(model.ffns()) as gates:
            model(tokens)
        found.append([len(tokens) * float(g.zeros) for g in gates])
    return [float(z) / len(windows) for z in np.sum(found, axis=0)]
