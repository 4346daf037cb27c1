"""Write a `.svdp` model file, one layer of one tensor at a time (engine/files/model_file.py has the layout)."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svdengine.files.model_file import CHAT_TEMPLATE, FORMAT, FORMAT_VERSION, stored_tensors
from svdengine.files.tensor_writer import PAGE, Declared, TensorWriter, size_of
from svdengine.kernels.formats import Parts, WeightFormat, quantize, stored_parts
from svdengine.models.config import ModelConfig
from svdengine.models.tensors import ROUTER, tensor_specs
from svdengine.text.tokenizer_info import TokenizerInfo

_SMALL: tuple[WeightFormat, ...] = ("q6", "q4", "ternary")
_CHUNK = 1 << 22  # elements of float32 that are quantised at once


def format_for(
    name: str,
    dtype: WeightFormat,
    embedding_dtype: WeightFormat | None = None,
    down_dtype: WeightFormat | None = None,
) -> WeightFormat:
    """How the matrix `name` is stored in a file of `dtype`.

    Embedding and output projection suffer most from few bits: by default they have 8 then. Positions are few.
    """
    if name in ("position_embedding", ROUTER):
        return "f32"
    if name in ("embedding", "lm_head"):
        return embedding_dtype or ("q8" if dtype in _SMALL else dtype)
    if name in ("down", "down_T"):
        return down_dtype or dtype
    return dtype


def weight_bytes(
    config: ModelConfig,
    dtype: WeightFormat,
    embedding_dtype: WeightFormat | None = None,
    down_dtype: WeightFormat | None = None,
) -> int:
    """Bytes of all tensors in a file of `dtype`, without header and tokenizer."""
    formats = ((spec, format_for(spec.name, dtype, embedding_dtype, down_dtype)) for spec in tensor_specs(config))
    return sum(size_of(part) for spec, one in formats for part in stored_tensors(spec, one).values())


@dataclass(frozen=True)
class StoredTokenizer:
    """A tokenizer as the file holds it: a description, the bytes of tokenizer.json or tokenizer.model, a template."""

    info: TokenizerInfo
    data: bytes = b""
    chat_template: str | None = None

    def tensors(self) -> dict[str, bytes]:
        """Name -> content of the byte tensors. The tokenizer is compressed where that makes it smaller."""
        packed = gzip.compress(self.data, mtime=0)  # the same bytes each time
        smaller = min(self.data, packed, key=len)
        texts: dict[str, bytes] = {self.info.kind: smaller} if self.info.kind != "none" else {}
        if self.chat_template is not None:
            texts[CHAT_TEMPLATE] = self.chat_template.encode("utf-8")
        return texts


NO_TOKENIZER = StoredTokenizer(TokenizerInfo("none"))


class ModelWriter:
    """A context manager that writes one model file; see TensorWriter for what happens on an error.

        with ModelWriter(path, config, "q8") as writer:
            writer.write("gate", matrix, layer=3)

    `extra` declares tensors under `predictor.`, written with `write_raw`; `metadata` adds to __metadata__.
    """

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        dtype: WeightFormat,
        tokenizer: StoredTokenizer = NO_TOKENIZER,
        generation: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
        extra: Mapping[str, Declared] | None = None,
        metadata: Mapping[str, str] | None = None,
        embedding_dtype: WeightFormat | None = None,
        down_dtype: WeightFormat | None = None,
        formats: Mapping[str, WeightFormat] | None = None,
    ) -> None:
        """Lay the file out. `formats` has those of single matrices, whatever else is said.

        Raises ModelFileError when it cannot be made.
        """
        self._specs = {spec.name: spec for spec in tensor_specs(config)}
        matrices = [name for name, spec in self._specs.items() if spec.matrix]
        self._formats = {name: format_for(name, dtype, embedding_dtype, down_dtype) for name in matrices}
        self._formats.update(formats or {})
        tensors: dict[str, Declared] = {}
        for name, spec in self._specs.items():
            tensors.update(stored_tensors(spec, self._formats.get(name, "f32")))
        # Those of whole pages come first and begin on one: a row of a page's size then lies in one page, not in two.
        tensors = dict(sorted(tensors.items(), key=lambda item: size_of(item[1]) % PAGE != 0))
        tensors.update(extra or {})
        texts = tokenizer.tensors()
        tensors.update({name: ((len(text),), "U8") for name, text in texts.items()})
        texts_of_metadata = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "config": json.dumps(config.to_dict()),
            "formats": json.dumps(self._formats),
            "tokenizer": json.dumps(tokenizer.info.to_dict()),
            "generation": json.dumps(dict(generation or {})),
            "provenance": json.dumps(dict(provenance or {})),
        }
        self._writer = TensorWriter(path, tensors, {**texts_of_metadata, **(metadata or {})})
        try:
            for name, text in texts.items():
                self._writer.write(name, np.frombuffer(text, np.uint8))
        except BaseException:
            self._writer.abort()
            raise

    @property
    def formats(self) -> Mapping[str, WeightFormat]:
        """How each matrix is stored."""
        return self._formats

    @property
    def size_bytes(self) -> int:
        """Of the whole file."""
        return self._writer.size_bytes

    @property
    def written_bytes(self) -> int:
        """Of tensors, so far."""
        return self._writer.written_bytes

    @property
    def temporary(self) -> Path:
        """The file as long as it has not its final name. Once all is written it can be read there."""
        return self._writer.temporary

    def write(self, name: str, array: NDArray[np.float32], layer: int = 0) -> None:
        """Store a vector (size,) or a matrix (rows, columns), quantised a few rows at a time.

        Raises ValueError when the shape is not that of the config, or when a value is not finite.
        """
        spec = self._specs[name]
        shape = spec.shape[1:] if spec.stacked else spec.shape
        if array.shape != shape:
            raise ValueError(f"found the shape {array.shape}, expected {shape}")
        if not spec.matrix:
            if not np.isfinite(array).all():
                raise ValueError("the weights hold NaN or infinity")
            self._writer.write(name, np.asarray(array, "<f4"), layer * array.size)
            return
        rows, columns = shape
        step = max(1, _CHUNK // columns)
        for row in range(0, rows, step):
            parts = quantize(array[row : row + step], self._formats[name])
            self._write_rows(name, parts, layer * rows + row)

    def write_parts(self, name: str, parts: Parts, layer: int = 0) -> None:
        """Store a matrix that was quantised elsewhere, in the format that the file has for it."""
        spec = self._specs[name]
        rows, columns = spec.shape[-2:]
        expected = {suffix: shape for suffix, (shape, _) in stored_parts(self._formats[name], rows, columns).items()}
        found = {suffix: part.shape for suffix, part in parts.items()}
        if found != expected:
            raise ValueError(f"found parts of the shapes {found}, expected {expected}")
        self._write_rows(name, parts, layer * rows)

    def write_raw(self, name: str, array: NDArray[Any]) -> None:
        """Store one of the `extra` tensors, whole."""
        self._writer.write(name, array)

    def abort(self) -> None:
        """Give the file up before the block ends."""
        self._writer.abort()

    def _write_rows(self, name: str, parts: Parts, first_row: int) -> None:
        for suffix, part in parts.items():
            self._writer.write(name + suffix, part, first_row * part.shape[1])

    def __enter__(self) -> ModelWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)
