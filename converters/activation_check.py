"""Whether the activation that a model file states is the one that its weights were trained with, by measuring.

A short text is run through the model under each activation that its FFNs could have. Trained weights predict it far
better under their own than under another: SmolLM2 has 3.4 times its perplexity under GELU, and 560 times under ReLU.
Where another one than the stated is far better, the stated one is wrong. Where none reads the text, as with random
weights or a model of proteins, nothing is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import cast

import numpy as np
from numpy.typing import NDArray

from svdengine.converters.check_text import PASSAGES
from svdengine.converters.statistics import window_batches
from svdengine.errors import DeviceError
from svdengine.executors import Device, create_executor, resolve_device
from svdengine.files.model_file import ModelFile
from svdengine.kernels.base_executor import BaseExecutor
from svdengine.kernels.batch import BLOCK_SIZE
from svdengine.kernels.formats import FORMATS, PART_SUFFIXES, Parts, WeightFormat, dequantize, gather_parts, quantize
from svdengine.models.config import ModelConfig
from svdengine.models.settings import activation_text, with_activation
from svdengine.scheduling.sampler import log_softmax
from svdengine.text.tokenizer import Tokenizer

Progress = Callable[[int, int], None]  # activations measured so far, activations in all
Losses = Sequence[NDArray[np.float64]]  # of each passage, what each token but the first costs, in nats

WINDOW = 64  # tokens of each passage
_GATED = ("silu", "gelu", "relu", "fatrelu", "drelu", "relu2")
_UNGATED = ("gelu", "relu", "relu2", "silu")
_READABLE = 2.0  # bits a byte; text that costs more, a model does not know
_FAR_BETTER = math.log(1.3)  # nats a token: that many times the perplexity
_SURE = 4.0  # standard errors that the difference of two activations lies from zero
_WORST = 50.0  # nats a token, also for logits that overflowed


@dataclass(frozen=True)
class ActivationScore:
    """What one activation makes of the text."""

    activation: str  # as --activation takes it
    perplexity: float  # of all passages
    bits_per_byte: float


@dataclass(frozen=True)
class ActivationCheck:
    """What measuring says of a model file's activation."""

    stated: str  # as --activation takes it
    scores: tuple[ActivationScore, ...]  # that of the stated one first
    passages: tuple[int, ...]  # those that the model can read, under any activation, by number
    tokens: int  # scored in them
    better: str | None  # an activation that is far better than the stated one

    @property
    def readable(self) -> bool:
        """Whether anything can be said at all."""
        return bool(self.passages)

    def verdict(self) -> str:
        """One line for people."""
        stated, *others = self.scores
        if not self.readable:
            return (
                f"cannot tell: this model reads no text of ours under any activation, {stated.activation} included"
                f" (perplexity {stated.perplexity:.4g})"
            )
        if self.better is None:
            rest = ", ".join(f"{score.activation} {score.perplexity:.4g}" for score in others)
            return f"{stated.activation} fits the weights: perplexity {stated.perplexity:.4g}, against {rest}"
        better = next(score for score in others if score.activation == self.better)
        return (
            f"the file states the activation {stated.activation}, under which a text of {self.tokens} tokens has the"
            f" perplexity {stated.perplexity:.4g}; under {better.activation} it has {better.perplexity:.4g}. The model"
            f" was most likely trained with {better.activation}: convert it with --activation {better.activation}"
        )


def check_activation(
    file: ModelFile, device: Device = "auto", threads: int | None = None, progress: Progress | None = None
) -> ActivationCheck | None:
    """Measure a model file under each activation that its weights could mean; None: there is no text for it.

    There is none without a tokenizer, and for a context of one token. The cost is that of reading some 300 tokens of
    prompt for each of four or six activations. Memory beyond that of running the model is a copy of the down
    projections. Raises DeviceError where the device cannot be used.
    """
    if file.tokenizer_info.kind == "none":
        return None
    windows = _windows(file)
    if not windows.tokens:
        return None
    configs = candidates(file.config)
    chosen = cast(Device, resolve_device(device))  # once: it may have something to say
    try:
        losses = _all_losses(file, configs, windows.tokens, chosen, threads, progress)
    except DeviceError:
        if device != "auto" or chosen == "cpu":
            raise
        losses = _all_losses(file, configs, windows.tokens, "cpu", threads, progress)
    return judge([activation_text(config) for config in configs], losses, windows.sizes)


def candidates(config: ModelConfig) -> list[ModelConfig]:
    """The config as it is, and with each other activation that its kind of FFN can have."""
    names = _GATED if config.gated else _UNGATED
    same = {"gelu_tanh": "gelu"}.get(config.activation, config.activation)  # no text tells these two apart
    others = [with_activation(config, name) for name in names if name != same]
    if config.expert_count:  # whose down projections are too large to copy
        others = [other for other in others if other.sparse_ffn == config.sparse_ffn]
    return [config, *others]


def judge(names: Sequence[str], losses: Sequence[Losses], sizes: Sequence[int]) -> ActivationCheck:
    """The verdict from the losses of each activation on each passage, in nats a token, the stated one's first.

    `sizes` are the bytes of the passages. Only those count that some activation reads. Another one is better when its
    perplexity is lower by a factor of 1.3, and the mean difference is four standard errors from zero, token by token.
    """
    least = [min(float(loss[i].sum()) for loss in losses) / math.log(2) for i in range(len(sizes))]  # bits
    readable = tuple(i for i, size in enumerate(sizes) if least[i] < _READABLE * size)
    counted = readable or range(len(sizes))
    table = np.array([np.concatenate([loss[i] for i in counted]) for loss in losses])  # (activations, tokens)
    bytes_counted = sum(sizes[i] for i in counted)
    means = table.mean(1)
    scores = tuple(
        ActivationScore(name, math.exp(mean), float(row.sum()) / math.log(2) / bytes_counted)
        for name, mean, row in zip(names, means, table, strict=True)
    )
    best = int(means.argmin())
    difference = table[0] - table[best]
    error = float(difference.std()) / math.sqrt(len(difference))
    wrong = bool(readable) and difference.mean() > max(_FAR_BETTER, _SURE * error)
    return ActivationCheck(names[0], scores, readable, table.shape[1], names[best] if wrong else None)


@dataclass(frozen=True)
class _Windows:
    tokens: list[list[int]]  # of each passage
    sizes: list[int]  # bytes of what is scored


def _windows(file: ModelFile) -> _Windows:
    tokenizer = Tokenizer(file.tokenizer_info, file.tokenizer_bytes)
    start = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    size = min(WINDOW, file.config.max_position - len(start))
    tokens, sizes = [], []
    for passage in PASSAGES:
        ids = tokenizer.encode(passage, bos=False)
        taken = ids[:size]
        if len(start) + len(taken) > 1:
            tokens.append([*start, *taken])
            scored = len(taken) - (0 if start else 1)
            sizes.append(max(1, round(len(passage.encode()) * scored / len(ids))))
    return _Windows(tokens, sizes)


def _all_losses(
    file: ModelFile,
    configs: Sequence[ModelConfig],
    windows: Sequence[Sequence[int]],
    device: Device,
    threads: int | None,
    progress: Progress | None,
) -> list[Losses]:
    """Of each config."""
    losses = []
    for variant in _variants(file, configs):
        losses.append(_losses(variant, windows, device, threads))
        if progress is not None:
            progress(len(losses), len(configs))
    return losses


def _losses(file: ModelFile, windows: Sequence[Sequence[int]], device: Device, threads: int | None) -> Losses:
    longest = max(map(len, windows))
    executor = create_executor(
        file,
        device=device,
        threads=threads,
        context=longest,
        block_count=-(-longest // BLOCK_SIZE),
        max_batch_rows=longest,
    )
    with closing(executor):
        return [_window_losses(executor, window) for window in windows]


def _window_losses(executor: BaseExecutor, window: Sequence[int]) -> NDArray[np.float64]:
    (batch,) = window_batches(window, executor, logits=True)
    logits = executor.forward(batch)
    with np.errstate(invalid="ignore", over="ignore"):
        found = [-log_softmax(row)[token] for row, token in zip(logits, window[1:], strict=False)]
    return np.nan_to_num(found, nan=_WORST, posinf=_WORST).clip(max=_WORST)


def _variants(file: ModelFile, configs: Sequence[ModelConfig]) -> Iterator[ModelFile]:
    """The file with each config. Those that want the other layout of the down projection share one copy of it."""
    turned: ModelFile | None = None
    for config in configs:
        if config.sparse_ffn == file.config.sparse_ffn:
            yield replace(file, config=config)
            continue
        turned = turned or _turned(file)
        yield replace(turned, config=config)


def _turned(file: ModelFile) -> ModelFile:
    """The file with its down projections transposed, as models of the other kind of activation store them."""
    old, new = ("down_T", "down") if file.config.sparse_ffn else ("down", "down_T")
    found, columns = file.formats[old], file.config.hidden_size if file.config.sparse_ffn else file.config.ffn_size
    # Few bits were fitted to the other direction; 8 more would lose nothing that shows.
    wanted: WeightFormat = "q8" if FORMATS[found].activation_bits < 32 else found
    stacks: Parts = {}
    for layer in range(file.config.layer_count):
        parts = {suffix: array[layer] for suffix, array in gather_parts(file.arrays, old).items()}
        for suffix, part in quantize(dequantize(parts, found, columns).T, wanted).items():
            if suffix not in stacks:
                stacks[suffix] = np.empty((file.config.layer_count, *part.shape), part.dtype)
            stacks[suffix][layer] = part
    gone = {old + suffix for suffix in PART_SUFFIXES}
    arrays = {name: array for name, array in file.arrays.items() if name not in gone}
    arrays |= {new + suffix: stack for suffix, stack in stacks.items()}
    formats = {name: kept for name, kept in file.formats.items() if name != old} | {new: wanted}
    return replace(file, arrays=MappingProxyType(arrays), formats=MappingProxyType(formats))
