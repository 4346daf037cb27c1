"""What each tensor loses in each format: the model is run with that tensor in it, and everything else in 8 bits.

The loss is the Kullback-Leibler divergence from what the checkpoint's own weights expect of the next token, in nats a
token. Unlike the perplexity of so short a text it is never helped by chance, so that small losses are told apart. Eight
bits lose something too, since they are rounded to nearest: a tensor in six, rounded for what it reads, can lose less.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svdengine.converters.statistics import window_batches
from svdengine.errors import DeviceError
from svdengine.executors import Device, create_executor
from svdengine.files.model_file import ModelFile
from svdengine.kernels.base_executor import BaseExecutor
from svdengine.kernels.batch import BLOCK_SIZE
from svdengine.kernels.formats import PART_SUFFIXES, WeightFormat
from svdengine.models.config import ModelConfig

Array = NDArray[np.float32]
Progress = Callable[[int, int], None]  # trials done, trials in all
Windows = Sequence[Sequence[int]]  # token ids

BASE: WeightFormat = "q8"  # that of all tensors but the one that is tried
_MOST_LOGITS = 1 << 26  # that are kept to compare with


@dataclass(frozen=True)
class Trials:
    """A model in several formats, and what is expected of it on some text."""

    files: Mapping[WeightFormat, ModelFile]  # with all tensors that can have a choice in one format
    windows: Windows
    wanted: Sequence[Array]  # of each window, logarithms of the probabilities after every `row_step`-th token
    device: Device = "auto"

    def losses(
        self, names: Sequence[str], progress: Progress | None = None
    ) -> tuple[float, dict[str, dict[WeightFormat, float]]]:
        """The loss with all in `BASE`, and what each tensor in each format adds to it, which can be below 0.

        Raises DeviceError where the device cannot be used.
        """
        others = [one for one in self.files if one != BASE]
        total, base = len(names) * len(others), self.loss({})
        found: dict[str, dict[WeightFormat, float]] = {name: {BASE: 0.0} for name in names}
        for number, (name, one) in enumerate([(name, one) for name in names for one in others], 1):
            found[name][one] = self.loss({name: one}) - base
            if progress is not None:
                progress(number, total)
        return base, found

    def loss(self, formats: Mapping[str, WeightFormat]) -> float:
        """Of the model with these formats together. Raises DeviceError where the device cannot be used."""
        file, longest = mixed(self.files, formats), max(map(len, self.windows))
        step, total = row_step(self.windows, file.config), 0.0
        with closing(_executor(file, self.device, longest)) as executor:
            for window, wanted in zip(self.windows, self.wanted, strict=True):
                (batch,) = window_batches(window, executor, logits=True)
                logits = executor.forward(replace(batch, logit_rows=batch.logit_rows[::step]))
                total += divergence(wanted, log_probabilities(logits))
        return total / sum(map(len, self.wanted))


def expectations(config: ModelConfig, states: Array, head: Array, windows: Windows) -> list[Array]:
    """`wanted` of Trials, from what the output projection `head` (vocabulary, d) reads (n, d) with exact weights."""
    step, ends = row_step(windows, config), np.cumsum([len(window) for window in windows])
    scale = np.float32(config.logit_scale)
    rows = [states[end - len(window) : end : step] for window, end in zip(windows, ends, strict=True)]
    return [log_probabilities(x @ head.T * scale) for x in rows]


def row_step(windows: Windows, config: ModelConfig) -> int:
    """Of how many tokens one is compared, so that memory is bounded."""
    return -(-sum(map(len, windows)) * config.vocab_size // _MOST_LOGITS)


def mixed(files: Mapping[WeightFormat, ModelFile], formats: Mapping[str, WeightFormat]) -> ModelFile:
    """The model in `BASE` with some of its matrices in other formats."""
    base = files[BASE]
    arrays, all_formats = dict(base.arrays), dict(base.formats)
    for name, one in formats.items():
        for suffix in PART_SUFFIXES:
            arrays.pop(name + suffix, None)
            if name + suffix in files[one].arrays:
                arrays[name + suffix] = files[one].arrays[name + suffix]
        all_formats[name] = files[one].formats[name]
    return replace(base, arrays=MappingProxyType(arrays), formats=MappingProxyType(all_formats))


def divergence(wanted: Array, found: Array) -> float:
    """Sum over rows of the divergence of two distributions, given by logarithms (rows, vocabulary)."""
    with np.errstate(invalid="ignore", over="ignore"):
        each = (np.exp(wanted) * (wanted - found)).sum(1, dtype=np.float64)
    return float(np.nan_to_num(each, nan=np.inf).clip(min=0).sum())


def log_probabilities(logits: Array) -> Array:
    """Log-softmax of rows (n, vocabulary)."""
    shifted = logits - logits.max(1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return result


def _executor(file: ModelFile, device: Device, tokens: int) -> BaseExecutor:
    """Of `device`; of the CPU where that is "auto" and what it stands for cannot be used."""
    sizes: Any = {"context": tokens, "block_count": -(-tokens // BLOCK_SIZE), "max_batch_rows": tokens}
    try:
        return create_executor(file, device=device, **sizes)
    except DeviceError:
        if device != "auto":
            raise
        return create_executor(file, device="cpu", **sizes)
