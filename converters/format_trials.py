"""What each tensor loses in each format: the model is run with that tensor alone in it, and everything else in 8 bits.

The loss is the Kullback-Leibler divergence from what the model in 8 bits expects of the next token, in nats a token.
Unlike the perplexity of so short a text it is never helped by chance, so that small losses are told apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from svdengine.converters.statistics import window_batches
from svdengine.errors import DeviceError
from svdengine.executors import Device, create_executor, resolve_device
from svdengine.files.model_file import ModelFile
from svdengine.kernels.base_executor import BaseExecutor
from svdengine.kernels.batch import BLOCK_SIZE
from svdengine.kernels.formats import PART_SUFFIXES, WeightFormat

Array = NDArray[np.float32]
Progress = Callable[[int, int], None]  # trials done, trials in all
Windows = Sequence[Sequence[int]]  # token ids

EXACT: WeightFormat = "q8"  # what the others are measured against
_MOST_LOGITS = 1 << 26  # that are kept to compare with


@dataclass(frozen=True)
class Trials:
    """One model in several formats, and text to compare them on."""

    files: Mapping[WeightFormat, ModelFile]  # with all tensors that can have a choice in one format
    windows: Windows
    device: Device = "auto"

    def losses(self, names: Sequence[str], progress: Progress | None = None) -> dict[str, dict[WeightFormat, float]]:
        """Of each tensor in each format, with all others in `EXACT`, where the loss is 0.

        Raises DeviceError where the device cannot be used.
        """
        others = [one for one in self.files if one != EXACT]
        found: dict[str, dict[WeightFormat, float]] = {name: {EXACT: 0.0} for name in names}
        device = cast(Device, resolve_device(self.device))  # once: it may have something to say
        wanted = list(self._expected(device, self.files[EXACT]))
        for number, (name, one) in enumerate([(name, one) for name in names for one in others], 1):
            found[name][one] = self._loss(device, wanted, {name: one})
            if progress is not None:
                progress(number, len(names) * len(others))
        return found

    def loss(self, formats: Mapping[str, WeightFormat]) -> float:
        """Of the model with these formats together. Raises DeviceError where the device cannot be used."""
        device = cast(Device, resolve_device(self.device))
        return self._loss(device, list(self._expected(device, self.files[EXACT])), formats)

    def _loss(self, device: Device, wanted: Sequence[Array], formats: Mapping[str, WeightFormat]) -> float:
        found = self._expected(device, mixed(self.files, formats))
        total = sum(divergence(p, q) for p, q in zip(wanted, found, strict=True))
        return total / sum(map(len, wanted))

    def _expected(self, device: Device, file: ModelFile) -> Iterator[Array]:
        """Logarithms of probabilities of the next token after every few tokens of each window, (rows, vocabulary)."""
        count, longest = sum(map(len, self.windows)), max(map(len, self.windows))
        step = -(-count * file.config.vocab_size // _MOST_LOGITS)
        with closing(_executor(file, device, self.device, longest)) as executor:
            for window in self.windows:
                (batch,) = window_batches(window, executor, logits=True)
                yield _log_softmax(executor.forward(replace(batch, logit_rows=batch.logit_rows[::step])))


def mixed(files: Mapping[WeightFormat, ModelFile], formats: Mapping[str, WeightFormat]) -> ModelFile:
    """The model in `EXACT` with some of its matrices in other formats."""
    base = files[EXACT]
    arrays, all_formats = dict(base.arrays), dict(base.formats)
    for name, one in formats.items():
        for suffix in PART_SUFFIXES:
            arrays.pop(name + suffix, None)
            if name + suffix in files[one].arrays:
                arrays[name + suffix] = files[one].arrays[name + suffix]
        all_formats[name] = one
    return replace(base, arrays=MappingProxyType(arrays), formats=MappingProxyType(all_formats))


def divergence(wanted: Array, found: Array) -> float:
    """Sum over rows of the divergence of two distributions, given by logarithms (rows, vocabulary)."""
    with np.errstate(invalid="ignore", over="ignore"):
        each = (np.exp(wanted) * (wanted - found)).sum(1, dtype=np.float64)
    return float(np.nan_to_num(each, nan=np.inf).clip(min=0).sum())


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return result


def _executor(file: ModelFile, device: Device, asked: Device, tokens: int) -> BaseExecutor:
    """Of `device`, or of the CPU where no device was asked for and that one cannot be used."""
    sizes: Any = {"context": tokens, "block_count": -(-tokens // BLOCK_SIZE), "max_batch_rows": tokens}
    try:
        return create_executor(file, device=device, **sizes)
    except DeviceError:
        if asked != "auto" or device == "cpu":
            raise
        return create_executor(file, device="cpu", **sizes)
