"""Convert to a wanted size: each tensor is rounded in every format, each is measured, and the best choice is kept.

Text runs through the model once, as in weight_calibration.py, and all formats of a matrix are rounded for the same
inputs. They lie in files beside the output until the choice is made, which together are 2.3 times a model in 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svdengine.converters.calibration_size import LARGE
from svdengine.converters.checkpoint import Checkpoint
from svdengine.converters.conversion import Tensors, calibration_windows, open_for, provenance_of
from svdengine.converters.error_feedback import MOST_LEVEL, Feedback
from svdengine.converters.format_choice import Choice, Option, choose_formats
from svdengine.converters.format_trials import BASE, Trials, expectations
from svdengine.converters.weight_calibration import Quantizer, WeightCalibration, exact_states, round_matrix
from svdengine.errors import ConversionError
from svdengine.files.model_file import ModelFile, read_model_file
from svdengine.files.model_writer import ModelWriter
from svdengine.files.tensor_writer import PAGE
from svdengine.kernels.formats import Parts, WeightFormat, format_named, gather_parts
from svdengine.models.config import ModelConfig
from svdengine.models.tensors import ROUTER, tensor_specs

Array = NDArray[np.float32]
Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, how much there is

FORMATS: tuple[WeightFormat, ...] = (BASE, "q6", "q4")  # that tensors choose from
TRIAL_TOKENS = 2048  # that formats are compared on; a large model takes fewer
_LARGE_TRIAL_TOKENS = 768


@dataclass(frozen=True)
class Wish:
    """How large a model is to be; one of the two is given."""

    bits: float | None = None  # a weight of the matrices, on average, with their scales
    size: int | None = None  # bytes of the file
    beside: Callable[[ModelConfig], int] = lambda _: 0  # bytes, at most, that a predictor will take in that file

    @property
    def setting(self) -> dict[str, float]:
        """What a model file says of it."""
        return {"bits": self.bits} if self.bits is not None else {"size": self.size or 0}


@dataclass(frozen=True)
class SizedModel:
    """What came of a wish."""

    options: Mapping[str, Sequence[Option]]  # of each tensor
    choice: Choice
    base: float  # the loss with all in 8 bits, which the options' losses and the choice's add to
    loss: float  # measured, of the model as it is


def convert_to_size(
    source: Path,
    output: Path,
    wish: Wish,
    activation: str | None = None,
    progress: Progress | None = None,
    *,
    calibration: WeightCalibration | None = None,
    hub: Mapping[str, Any] | None = None,
    look: Callable[[ModelFile], None] | None = None,
) -> SizedModel:
    """Convert a checkpoint into the model file `output` of a wanted size, at the least loss.

    The other arguments are those of `convert`. Raises ConversionError as `convert` does, and where no choice of formats
    is small enough.
    """
    source, output = Path(source), Path(output)
    checkpoint, calibration = open_for(source, output, activation), calibration or WeightCalibration()
    tensors, sizes = Tensors.of(checkpoint), matrix_sizes(checkpoint.config)
    settings = {"dtype": "mixed", **wish.setting, **({"activation": activation} if activation else {})}
    provenance, tell = provenance_of(checkpoint, source, settings, hub), progress or _silent
    write = partial(
        ModelWriter,
        output,
        checkpoint.config,
        tokenizer=checkpoint.tokenizer,
        generation=checkpoint.generation,
        provenance=provenance,
    )
    beside = _overhead(write, sizes) + wish.beside(checkpoint.config)
    budget = byte_budget(wish, checkpoint.config, sizes, beside)
    with _candidates(write) as writers, ExitStack() as stack:
        fitted, held_out = _windows(checkpoint, calibration)
        provenance["calibrated_tokens"] = sum(map(len, fitted))
        _round_all(tensors, writers, _carried(budget, sizes), fitted, partial(tell, "rounding, MB"))
        files = {name: stack.enter_context(read_model_file(writers[name].temporary)) for name in FORMATS}
        states = exact_states(checkpoint.config, tensors.read, held_out)
        head = tensors.read("embedding" if checkpoint.config.tied_embeddings else "lm_head", 0)
        trials = Trials(files, held_out, expectations(checkpoint.config, states, head, held_out))
        result = _choose(trials, sizes, budget, partial(tell, "trying formats"))
        _compose(write, files, result.choice.formats, look)
    return result


def _silent(stage: str, done: int, total: int) -> None:
    pass


def _choose(
    trials: Trials, sizes: Mapping[str, Mapping[WeightFormat, int]], budget: int, tell: Callable[[int, int], None]
) -> SizedModel:
    """Measure each tensor in each format, choose, and measure what was chosen."""
    base, losses = trials.losses(tuple(sizes), tell)
    options = {name: [Option(one, of[one], losses[name][one]) for one in FORMATS] for name, of in sizes.items()}
    choice = choose_formats(options, budget)
    assert choice is not None  # `byte_budget` leaves room for the smallest
    return SizedModel(options, choice, base, trials.loss(choice.formats))


def matrix_sizes(config: ModelConfig) -> dict[str, dict[WeightFormat, int]]:
    """Bytes of each matrix, of all its layers, in each format that it can have."""
    sizes: dict[str, dict[WeightFormat, int]] = {}
    for spec in tensor_specs(config):
        if spec.matrix and spec.name not in ("position_embedding", ROUTER):
            count = spec.shape[0] if spec.stacked else 1
            sizes[spec.name] = {one: count * format_named(one).stored_bytes(*spec.shape[-2:]) for one in FORMATS}
    return sizes


def byte_budget(wish: Wish, config: ModelConfig, sizes: Mapping[str, Mapping[WeightFormat, int]], beside: int) -> int:
    """Bytes that all matrices may take; `beside` is what else is in the file.

    Raises ConversionError, with the smallest and the largest size of use, where that is too little for any choice.
    """
    least, most = (sum(choose(of.values()) for of in sizes.values()) for choose in (min, max))
    if wish.bits is not None:
        weights = sum(math.prod(spec.shape) for spec in tensor_specs(config) if spec.name in sizes)
        budget, unit = int(wish.bits * weights / 8), 8 / weights
        shown = f"--bits {wish.bits:g}: {least * unit:.3f} bits a weight are the fewest, {most * unit:.3f} the most"
        # What is printed as the fewest is to be taken as well.
        budget = least if least > budget >= least - 0.0005 / unit else budget
    else:
        budget, unit = (wish.size or 0) - beside, 1
        shown = (
            f"--size {wish.size}: the smallest file has {_as_option(least + beside)}, the largest of use"
            f" {_as_option(most + beside)}"
        )
    if budget < least:
        raise ConversionError(f"{shown}, of the formats {', '.join(reversed(FORMATS))}")
    return budget


def _as_option(count: int) -> str:
    """A size as --size takes it, rounded up."""
    short = f"{math.ceil(count / 2**20 * 10) / 10:.1f}M" if count > 10 << 20 else f"{math.ceil(count / 1024)}K"
    return f"{short} ({count / 1e6:.3g} MB)"


def _overhead(write: Callable[..., ModelWriter], sizes: Mapping[str, Mapping[WeightFormat, int]]) -> int:
    """Bytes of the file beside those matrices, at most: vectors, tokenizer, header."""
    writer = write(BASE)
    writer.abort()
    return writer.size_bytes - sum(size[BASE] for size in sizes.values()) + 2 * PAGE


@contextmanager
def _candidates(write: Callable[..., ModelWriter]) -> Iterator[dict[WeightFormat, ModelWriter]]:
    """A file for each format, beside the output, which is gone when the block ends."""
    with ExitStack() as stack:
        writers = {}
        for one in FORMATS:
            writers[one] = write(one, embedding_dtype=one)
            stack.callback(writers[one].abort)
        yield writers


def _windows(checkpoint: Checkpoint, calibration: WeightCalibration) -> tuple[list[list[int]], list[list[int]]]:
    """Text to round for, and text to compare formats on; the same where there is too little."""
    config = checkpoint.config
    trial = TRIAL_TOKENS if config.hidden_size < LARGE else _LARGE_TRIAL_TOKENS
    tokens = calibration.tokens_for(config)
    windows = calibration_windows(checkpoint, replace(calibration, tokens=tokens + trial))
    # An odd step, so that all kinds of text, which come in turn, are held out.
    step = max(2, round((tokens + trial) / trial)) | 1
    if len(windows) < 2 * step:
        return windows, windows
    held_out = range(step // 2, len(windows), step)
    return [window for i, window in enumerate(windows) if i not in held_out], [windows[i] for i in held_out]


def _carried(budget: int, sizes: Mapping[str, Mapping[WeightFormat, int]]) -> WeightFormat:
    """The format whose model later layers are rounded for: the one nearest to the wanted size."""
    return min(MOST_LEVEL, key=lambda one: abs(sum(of[one] for of in sizes.values()) - budget))


def _round_all(
    tensors: Tensors,
    writers: Mapping[WeightFormat, ModelWriter],
    carried: WeightFormat,
    windows: Sequence[Sequence[int]],
    tell: Callable[[int, int], None],
) -> None:
    """Write every tensor in all formats."""
    others = [one for one in MOST_LEVEL if one != carried]
    total = sum(writer.size_bytes for writer in writers.values())

    def write(name: str, layer: int, array: Array) -> None:
        with tensors.named(name, layer):
            for writer in writers.values():
                writer.write(name, array, layer)

    def write_parts(name: str, layer: int, parts: Parts) -> None:
        with tensors.named(name, layer):
            writers[carried].write_parts(name, parts, layer)

    def also(name: str, layer: int, matrix: Array, feedback: Feedback) -> None:
        with tensors.named(name, layer):
            writers[BASE].write(name, matrix, layer)
            for one in others:
                writers[one].write_parts(name, round_matrix(name, matrix, feedback, one), layer)
        tell(sum(writer.written_bytes for writer in writers.values()) // 10**6, max(1, total // 10**6))

    formats = writers[carried].formats
    Quantizer(tensors.checkpoint.config, formats, tensors.read, write, write_parts, also=also).run(windows)


def _compose(
    write: Callable[..., ModelWriter],
    files: Mapping[WeightFormat, ModelFile],
    formats: Mapping[str, WeightFormat],
    look: Callable[[ModelFile], None] | None,
) -> None:
    """Put the model file together from what is there in each format."""
    config = files[BASE].config
    with write(BASE, formats=formats) as writer:
        for spec in tensor_specs(config):
            parts = gather_parts(files[formats.get(spec.name, BASE)].arrays, spec.name)
            for layer in range(spec.shape[0] if spec.stacked else 1):
                here = {suffix: part[layer] if spec.stacked else part for suffix, part in parts.items()}
                if spec.matrix:
                    writer.write_parts(spec.name, here, layer)
                else:
                    writer.write(spec.name, here[""], layer)
        if look is not None:
            with read_model_file(writer.temporary) as file:
                look(file)
