"""Convert a checkpoint, tensor by tensor: memory is bounded by the largest tensor and not by the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svdengine.converters.calibration_text import split_files
from svdengine.converters.checkpoint import Checkpoint, describe_files
from svdengine.converters.default_formats import calibrated_formats
from svdengine.converters.machine_text import WINDOW, machine_windows
from svdengine.converters.weight_calibration import Observe, Quantizer, WeightCalibration
from svdengine.errors import ConversionError
from svdengine.files.model_file import ModelFile, read_model_file
from svdengine.files.model_writer import ModelWriter
from svdengine.files.models_folder import HUB
from svdengine.kernels.formats import WEIGHT_FORMATS, Parts, WeightFormat
from svdengine.models import refuse_unread_tensors
from svdengine.models.family import Source
from svdengine.models.tensors import TensorSpec, tensor_specs
from svdengine.text.chat_template import ChatTemplate
from svdengine.text.tokenizer import Tokenizer

Progress = Callable[[int, int], None]  # called with the bytes written so far, and the bytes of the whole file


def convert(
    source: Path,
    output: Path,
    dtype: WeightFormat = "q8",
    activation: str | None = None,
    progress: Progress | None = None,
    *,
    embedding_dtype: WeightFormat | None = None,
    down_dtype: WeightFormat | None = None,
    hub: Mapping[str, Any] | None = None,
    calibration: WeightCalibration | None = None,
    observe: Observe | None = None,
    look: Callable[[ModelFile], None] | None = None,
) -> None:
    """Convert a Hugging Face folder or a GGUF file into the model file `output`.

    `embedding_dtype` is that of embedding and output projection, by default `dtype`, but q8 with q6, q4 and
    ternary; `down_dtype` that of the FFNs' down projections, by default `dtype`. A calibrated q4 has q6 for both where
    that hardly makes the file larger (converters/default_formats.py).
    With `calibration`, weights of `q4` and `q6` are rounded for the inputs that they have on text, which takes minutes
    for a large model; see converters/weight_calibration.py. The checkpoint must have a tokenizer then.
    `observe` is told what rounding changed in each of these matrices.
    `activation` replaces the one that the checkpoint names, for a checkpoint that names it wrongly. `hub` says what the
    checkpoint is on a hub (engine/files/models_folder.py), and is kept in the provenance. An existing
    `output` is replaced, but only by a complete file. Raises ConversionError when the checkpoint cannot be
    converted and ModelFileError when `output` cannot be written; nothing is left behind then. `look` is shown the
    whole model before it takes the name `output`, which it does not where that raises.
    """
    source, output = Path(source), Path(output)
    for wanted in (dtype, embedding_dtype or dtype, down_dtype or dtype):
        if wanted not in WEIGHT_FORMATS:
            raise ConversionError(f"unknown dtype {wanted!r}; there are {', '.join(WEIGHT_FORMATS)}")
    checkpoint = open_for(source, output, activation)
    if "ternary" in (dtype, embedding_dtype, down_dtype) and not checkpoint.config.sub_norms:
        raise ConversionError(
            f"{source}: ternary is for models that were trained with weights of -s, 0 and s (BitNet), found a"
            f" {checkpoint.config.family} model; use q4"
        )
    tensors = Tensors.of(checkpoint)
    windows = None if calibration is None else calibration_windows(checkpoint, calibration)
    if windows is not None:
        embedding_dtype, down_dtype = calibrated_formats(checkpoint.config, dtype, embedding_dtype, down_dtype)
    dtypes = {"dtype": dtype, "embedding_dtype": embedding_dtype, "down_dtype": down_dtype, "activation": activation}
    provenance = provenance_of(checkpoint, source, {key: value for key, value in dtypes.items() if value}, hub)
    if windows is not None:
        provenance["calibrated_tokens"] = sum(map(len, windows))
    with ModelWriter(
        output,
        checkpoint.config,
        dtype,
        checkpoint.tokenizer,
        checkpoint.generation,
        provenance,
        embedding_dtype=embedding_dtype,
        down_dtype=down_dtype,
    ) as writer:
        run = _Conversion(tensors, writer, progress)
        if windows is not None:
            Quantizer(checkpoint.config, writer.formats, tensors.read, run.write, run.write_parts, observe).run(windows)
        else:
            for name, layer in tensors.origins:
                run.write(name, layer, tensors.read(name, layer))
        if look is not None:
            with read_model_file(writer.temporary) as file:
                look(file)


def open_for(source: Path, output: Path, activation: str | None = None) -> Checkpoint:
    """Open a checkpoint that is to become `output`. Raises ConversionError."""
    checkpoint = open_checkpoint(source, activation)
    if any(output.exists() and output.samefile(file) for file in checkpoint.files):
        raise ConversionError(f"{output}: the output would replace the checkpoint; choose another name")
    return checkpoint


def provenance_of(
    checkpoint: Checkpoint, source: Path, settings: Mapping[str, Any], hub: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What a model file says of how it was made."""
    provenance: dict[str, Any] = {
        "source": source.resolve().name if hub is None else str(hub["source"]),
        "files": describe_files(checkpoint.files),
        "tool": f"svdengine {metadata.version('svdengine')}",
        **settings,
    }
    if hub is not None:
        provenance[HUB] = {key: value for key, value in hub.items() if key != "source"}
    if checkpoint.notes:
        provenance["notes"] = checkpoint.notes
    return provenance


@dataclass(frozen=True)
class Tensors:
    """Tensors of a checkpoint, by canonical name and layer."""

    checkpoint: Checkpoint
    origins: Mapping[tuple[str, int], Source]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Tensors:
        """All that the model has. Raises ConversionError when one is missing, or is there without a use."""
        return cls(checkpoint, {(spec.name, layer): origin for spec, layer, origin in find_sources(checkpoint)})

    def read(self, name: str, layer: int) -> NDArray[np.float32]:
        """One of them. Raises ConversionError."""
        return build_tensor(self.checkpoint, self.origins[name, layer])

    @contextmanager
    def named(self, name: str, layer: int) -> Iterator[None]:
        """Turn a ValueError into a ConversionError that says which tensor it is about."""
        try:
            yield
        except ValueError as error:
            origin = ", ".join(self.origins[name, layer].names)
            raise ConversionError(f"{self.checkpoint.path}: tensor {origin}: {error}") from error


@dataclass(frozen=True)
class _Conversion:
    """Tensors on their way from a checkpoint into a file."""

    tensors: Tensors
    writer: ModelWriter
    progress: Progress | None

    def write(self, name: str, layer: int, array: NDArray[np.float32]) -> None:
        with self.tensors.named(name, layer):
            self.writer.write(name, array, layer)
        self._tell()

    def write_parts(self, name: str, layer: int, parts: Parts) -> None:
        with self.tensors.named(name, layer):
            self.writer.write_parts(name, parts, layer)
        self._tell()

    def _tell(self) -> None:
        if self.progress is not None:
            self.progress(self.writer.written_bytes, self.writer.size_bytes)


def calibration_windows(checkpoint: Checkpoint, calibration: WeightCalibration) -> list[list[int]]:
    """Windows of token ids to calibrate weights on. Raises ConversionError when there are none."""
    if checkpoint.tokenizer.info.kind == "none":
        raise ConversionError(
            f"{checkpoint.path}: has no tokenizer, so that weights cannot be calibrated; give --dtype with --quick"
        )
    stored, window = checkpoint.tokenizer, min(WINDOW, checkpoint.config.max_position)
    tokenizer = Tokenizer(stored.info, stored.data)
    tokens = calibration.tokens_for(checkpoint.config)
    if calibration.text:
        reader: Any = _Reader(tokenizer, stored.chat_template)
        windows = [list(ids) for ids in split_files(reader, calibration.text, tokens, window).windows]
    else:
        windows = machine_windows(tokenizer, stored.chat_template, tokens, window)
    if not windows or max(map(max, windows)) >= checkpoint.config.vocab_size:
        raise ConversionError(
            f"{checkpoint.path}: the tokenizer does not fit the model to calibrate it; give --dtype with --quick"
        )
    return windows


@dataclass(frozen=True)
class _Reader:
    """What reads text files and chats."""

    tokenizer: Tokenizer
    template: str | None

    @property
    def chat_template(self) -> ChatTemplate:
        if self.template is None:
            raise ConversionError("the checkpoint has no chat template, so that chats cannot be read; give plain text")
        return ChatTemplate(self.template, self.tokenizer)


def open_checkpoint(source: Path, activation: str | None = None) -> Checkpoint:
    """Open a checkpoint of either kind. Raises ConversionError."""
    if source.is_dir():
        from svdengine.converters.hf_checkpoint import HfCheckpoint

        return HfCheckpoint(source, activation)
    if not source.exists():
        raise ConversionError(f"{source}: no such file or folder")
    if source.suffix in (".safetensors", ".bin", ".pt", ".pth"):
        raise ConversionError(f"{source}: give the folder that holds it together with config.json and the tokenizer")
    from svdengine.converters.gguf_checkpoint import GgufCheckpoint

    return GgufCheckpoint(source, activation)


def find_sources(checkpoint: Checkpoint) -> Iterator[tuple[TensorSpec, int, Source]]:
    """Every (tensor, layer) and where it comes from, checked to be there before any work is done.

    After the last one, tensors that no part of the model comes from are refused.
    """
    names, used = frozenset(checkpoint.tensor_names), set[str]()
    for spec in tensor_specs(checkpoint.config):
        for layer in range(spec.shape[0] if spec.stacked else 1):
            try:
                origin = checkpoint.source(spec.name, layer if spec.stacked else None)
            except ValueError as error:
                raise ConversionError(f"{checkpoint.path}: {error}") from error
            for name in origin.names:
                if name not in names:
                    raise ConversionError(f"{checkpoint.path}: the checkpoint lacks the tensor {name!r}")
            used.update(origin.names)
            yield spec, layer, origin
    try:
        refuse_unread_tensors(names - used)
    except ValueError as error:
        raise ConversionError(f"{checkpoint.path}: {error}") from error


def build_tensor(checkpoint: Checkpoint, origin: Source) -> NDArray[np.float32]:
    """One canonical tensor, or one layer of it, in float32. Raises ConversionError."""
    first, *others = origin.names
    arrays = [checkpoint.read(first, origin.item), *map(checkpoint.read, others)]
    try:
        return origin.build(arrays)
    except (ValueError, IndexError) as error:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in zip(origin.names, arrays, strict=True))
        raise ConversionError(f"{checkpoint.path}: tensors of the wrong shape: {shapes} ({error})") from error
