"""Stage 2: end to end, the student learns the teacher's next-token distribution with most of its gates zero.

With fatrelu thresholds (`thresholds.py`) hold the sparsity that stage 1 reached, or raise that of an earlier student;
with relu a penalty on active gates pushes, which is slower and costs more, but leaves a model that other programs
know."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from svdengine.tools.relufy.decoder import Decoder, counted_zeros, observed, zero_share
from svdengine.tools.relufy.divergence import LOGIT_ROWS, divergence_gradient
from svdengine.tools.relufy.precision import compute_dtype, mixed_precision
from svdengine.tools.relufy.schedule import Steering, is_rounded, learning_rate
from svdengine.tools.relufy.settings import Settings
from svdengine.tools.relufy.text import Windows
from svdengine.tools.relufy.thresholds import Thresholds

_KEPT_BYTES = 4 << 30  # that hidden states of the teacher may take
_CLIP = 1.0  # norm of the gradient
_MOMENT_WINDOWS = 64  # of text, for the moment of hidden states
_MEASURE_EVERY = 32  # steps: what each neuron's gate matters changes slowly
_TRIED_STEPS = 3  # to learn how long one takes


@dataclass(frozen=True)
class StepResult:
    """What one step of stage 2 found, before its update."""

    divergence: float  # KL from the teacher's distribution to the student's, nats a token
    zeros: float  # share of the gates
    target: float | None  # for the share of zeros; None while it is left alone
    weight: float  # of the sparsity penalty; 0 with thresholds


class Distillation:
    """The student, its optimiser and the state of the schedule: all that a step changes."""

    def __init__(
        self,
        teacher: Decoder,
        student: Decoder,
        settings: Settings,
        windows: Windows,
        floor: float | None = None,
        stored_weights: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """windows: to train on, where a model has to foretell the next token. floor: the share of zeros that the
        student has. stored_weights: in which later steps give it its weights."""
        self.teacher, self.student, self.settings, self._stored_weights = teacher, student, settings, stored_weights
        self._windows = windows
        self._known: dict[int, Tensor] = {}  # the teacher's hidden states (window, d) of windows, by number
        self.trained = [p for p in student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.trained, settings.rate, betas=(0.9, 0.95), fused=True)
        self.optimizer.zero_grad()  # stage 1 left its last ones
        self.steering = Steering(settings.activation, floor)
        self.thresholds = Thresholds(student.ffns()) if settings.activation == "fatrelu" else None
        self.step = 0

    def run_step(self, total: int) -> StepResult:
        """Take the next of `total` steps."""
        goal = self.settings.sparsity
        target = self.steering.target(self.step, total, goal)
        weight = 0.0 if self.thresholds else self.steering.weight(self.step, total, goal)
        rounds = is_rounded(self.step, total, goes_on=self.settings.student is not None)
        with self._stored_weights() if rounds else nullcontext():
            if self.thresholds and self.step % _MEASURE_EVERY == 0:
                tokens = self._tokens(self._picked(self.step))
                _, gradients = gate_gradients(self.student, tokens, self.settings.seed + self.step)
                self.thresholds.measure(gradients)
            divergence, zeros = self._backward(self._picked(self.step), weight)
        self._update(learning_rate(self.settings.rate, self.step, total))
        if self.thresholds:
            self.thresholds.follow(target or 0.0)
        self.steering = self.steering.after(zeros, self.step, total, goal)
        self.step += 1
        return StepResult(divergence, zeros, target, weight)

    def state(self) -> dict[str, Any]:
        """What `load` needs to go on, but for the weights."""
        state = {"steps_done": self.step, "steering": asdict(self.steering), "optimizer": self.optimizer.state_dict()}
        return state | ({"thresholds": self.thresholds.state()} if self.thresholds else {})

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.step, self.steering = state["steps_done"], Steering(**state["steering"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.thresholds:
            self.thresholds.load(state["thresholds"])

    def steps_in_time(self, seconds: float) -> int:
        """Steps that take about `seconds`. Nothing is changed, and nothing may have been trained before."""
        device = self.teacher.embedding.weight.device
        started = 0.0
        for i in range(_TRIED_STEPS + 1):
            if i == 1:
                started = time.monotonic()
            with self._stored_weights():
                self._backward(self._picked(i), 0.0 if self.thresholds else 1.0)
            self._update(0.0)
            if device.type == "cuda":
                torch.cuda.synchronize()
        self.optimizer.state.clear()
        self._known.clear()
        return max(1, int(seconds / ((time.monotonic() - started) / _TRIED_STEPS)))

    def _update(self, rate: float) -> None:
        """Change the weights by their gradients, which are gone then."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        nn.utils.clip_grad_norm_(self.trained, _CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _picked(self, step: int) -> list[int]:
        """The numbers of a step's windows: every window once in random order, then again in another."""
        rows, count = self.settings.rows, len(self._windows)
        numbers = range(step * rows, (step + 1) * rows)
        return [int(_order(self.settings.seed, i // count, count)[i % count]) for i in numbers]

    def _tokens(self, picked: Sequence[int]) -> Tensor:
        """Windows (rows, window) of token ids."""
        device = self.teacher.embedding.weight.device
        return torch.from_numpy(self._windows.tokens[np.asarray(picked)].astype(np.int64)).to(device)

    def _wanted(self, picked: Sequence[int], tokens: Tensor) -> Tensor:
        """The teacher's hidden states (rows, window, d). They are kept for later epochs where memory allows it."""
        if all(number in self._known for number in picked):
            return torch.stack([self._known[number] for number in picked])
        found: Tensor = self.teacher(tokens).to(compute_dtype(tokens.device.type))
        if found[0].nbytes * len(self._windows) <= _KEPT_BYTES:
            self._known.update(zip(picked, found, strict=True))
        return found

    def _backward(self, picked: Sequence[int], weight: float) -> tuple[float, float]:
        """Add the gradients of a batch; the divergence and the share of zeros."""
        tokens = self._tokens(picked)
        counted = torch.from_numpy(self._windows[np.asarray(picked)].foretold).to(tokens.device)
        penalties: list[Tensor] = []
        zeros: list[Tensor] = []

        def observe(index: int, gate: Tensor, active: Tensor) -> None:
            zeros.append(zero_share(active))
            if weight:
                penalties.append(sparsity_penalty(active))
            if self.thresholds:
                self.thresholds.observe(index, gate, active)

        with mixed_precision(tokens.device):
            with torch.no_grad():
                wanted = self._wanted(picked, tokens)
            with observed(self.student.ffns(), observe):
                found = self.student(tokens)[counted]
            divergence, gradient = divergence_gradient(found, self.student.head, wanted[counted], self.teacher.head)
        roots, gradients = [found], [gradient]
        if penalties:
            roots.append(torch.stack(penalties).mean())
            gradients.append(torch.full_like(roots[1], weight))
        torch.autograd.backward(roots, gradients)
        return divergence, float(torch.stack(zeros).mean())


def gate_gradients(model: Decoder, tokens: Tensor, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Of each FFN, gates (n, f) of tokens after the activation, and the gradients of the tokens' losses by them.

    The losses are those of tokens that the model itself draws: the gradients' squares give the Fisher information.
    """
    gates: list[Tensor] = []
    generator = torch.Generator(tokens.device).manual_seed(seed)
    with mixed_precision(tokens.device):
        with observed(model.ffns(), lambda _index, _gate, active: gates.append(active)):
            found = model(tokens).flatten(0, 1)
        gradient = drawn_gradient(found, model.head, generator)
    gradients = torch.autograd.grad(found, gates, gradient)
    return [g.detach().flatten(0, -2) for g in gates], [g.flatten(0, -2) for g in gradients]


def sparsity_penalty(active: Tensor) -> Tensor:
    """Mean over root mean square of gates after ReLU: no scale changes it, and it falls as fewer hold the energy."""
    g = active.float()
    return g.mean() / (g.square().mean() + 1e-12).sqrt()


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(count)


def drawn_gradient(found: Tensor, head: nn.Module, generator: torch.Generator) -> Tensor:
    """Gradient, with respect to hidden states (n, d), of each token's loss where the next one is drawn by the model."""
    leaf = found.detach().requires_grad_()
    parts = []
    for rows in leaf.split(LOGIT_ROWS[found.device.type]):
        logits = head(rows).float()
        with torch.no_grad():
            drawn = torch.multinomial(torch.softmax(logits, -1), 1, generator=generator)[:, 0]
        loss = nn.functional.cross_entropy(logits, drawn, reduction="sum")
        parts += torch.autograd.grad(loss, rows)
    return torch.cat(parts)


@torch.no_grad()
def perplexity(model: Decoder, windows: Windows, rows: int = 8) -> float:
    """Perplexity over the tokens of windows, but for the first of each and those that are given."""
    device = model.embedding.weight.device
    losses, count = 0.0, 0
    for start in range(0, len(windows), rows):
        some = windows[start : start + rows]
        tokens = torch.from_numpy(some.tokens.astype(np.int64)).to(device)
        counted = torch.from_numpy(some.foretold[:, :-1]).to(device)
        with mixed_precision(device):
            logits = model.head(model(tokens)[:, :-1][counted]).float()
        losses += float(nn.functional.cross_entropy(logits, tokens[:, 1:][counted], reduction="sum"))
        count += int(counted.sum())
    return float(np.exp(losses / count))


@torch.no_grad()
def hidden_moment(model: Decoder, windows: NDArray[np.int32], rows: int = 8) -> Tensor:
    """E[h h^T] (d, d) of the hidden states h that the output projection reads, on some of the windows."""
    device = model.embedding.weight.device
    some = windows[:: -(-len(windows) // _MOMENT_WINDOWS)]
    total = torch.zeros(model.config.hidden_size, model.config.hidden_size, device=device)
    for start in range(0, len(some), rows):
        tokens = torch.from_numpy(some[start : start + rows].astype(np.int64)).to(device)
        with mixed_precision(device):
            h = model(tokens).flatten(0, 1)
        total += h.float().T @ h.float()
    return total / some.size


@torch.no_grad()
def layer_zeros(model: Decoder, windows: NDArray[np.int32], rows: int = 8) -> list[float]:
    """Share of the gates that are zero, layer by layer."""
    device = model.embedding.weight.device
    found = []
    for start in range(0, len(windows), rows):
        tokens = torch.from_numpy(windows[start : start + rows].astype(np.int64)).to(device)
        with mixed_precision(device), counted_zeros(model.ffns()) as zeros:
            model(tokens)
        found.append([len(tokens) * float(z) for z in zeros])
    return [float(z) / len(windows) for z in np.sum(found, axis=0)]
