"""Predictors in files: a safetensors file of their own, or inside a copy of the model file.

A predictor file's `__metadata__` holds format, format_version and, as JSON, predictor: how it was made, and the
fingerprint of the model that it was made for. Its tensors are those of kernels/predictor.py; version 1 had thresholds
with the other sign, as predictor.N.bias.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svdengine.errors import ModelFileError, RequestError
from svdengine.files.model_file import ModelFile
from svdengine.files.tensor_file import TensorFile
from svdengine.files.tensor_writer import PAD_PREFIX, Declared, TensorWriter
from svdengine.kernels.predictor import PREFIX, Predictor, describe, layer_arrays, predictor_from_arrays
from svdengine.models.config import RELU_FAMILY, ModelConfig

PREDICTOR_FORMAT = "svdp-predictor"
PREDICTOR_VERSION = "2"
_READ_VERSIONS = ("1", PREDICTOR_VERSION)
_DTYPE_NAMES = {"int8": "I8", "uint8": "U8", "float16": "F16", "float32": "F32"}
_EDGE = 4096  # bytes at each end of an array that the fingerprint covers
_CHUNK = 1 << 24  # elements copied at once


def model_fingerprint(model_file: ModelFile) -> str:
    """A hash of the config and of both ends of every stored matrix, which tells models and dtypes apart quickly."""
    digest = hashlib.sha256(json.dumps(model_file.config.to_dict(), sort_keys=True).encode())
    for name in sorted(model_file.arrays):
        if name.startswith(PREFIX):
            continue
        digest.update(_ends(name, model_file.arrays[name]))
    return digest.hexdigest()


def predictor_fingerprint(predictor: Predictor) -> str:
    """The same of a predictor, and of how it was made."""
    digest = hashlib.sha256(describe(predictor).encode())
    for name, array in _predictor_arrays(predictor).items():
        digest.update(_ends(name, array))
    return digest.hexdigest()


def check_fingerprint(predictor: Predictor, model_file: ModelFile, origin: Path) -> None:
    """Raise ModelFileError when the predictor in the file `origin` was made for another model."""
    if predictor.about.get("fingerprint") != model_fingerprint(model_file):
        raise ModelFileError(
            f"{origin}: the predictor was made for another model than {model_file.path};"
            f" run: svdengine calibrate {model_file.path}"
        )


def write_predictor(path: Path | str, predictor: Predictor) -> None:
    """Write a predictor into a file of its own. Raises ModelFileError; then no file is left behind."""
    arrays = _predictor_arrays(predictor)
    metadata = {"format": PREDICTOR_FORMAT, "format_version": PREDICTOR_VERSION, "predictor": describe(predictor)}
    with TensorWriter(Path(path), _declare(arrays), metadata) as writer:
        for name, array in arrays.items():
            writer.write(name, array)


def read_predictor(path: Path | str, model_file: ModelFile) -> Predictor:
    """Read and check a predictor file. Raises ModelFileError when it is damaged or was made for another model.

    The arrays are views of a memory map, which lives as long as they do.
    """
    path = Path(path)
    file = TensorFile(path)
    metadata = file.header.metadata
    if metadata.get("format") != PREDICTOR_FORMAT:
        raise ModelFileError(f"{path}: is not a predictor file; svdengine calibrate makes one")
    if metadata.get("format_version") not in _READ_VERSIONS:
        raise ModelFileError(
            f"{path}: has format version {metadata.get('format_version')!r}, this svdengine reads"
            f" {' and '.join(_READ_VERSIONS)}; run svdengine calibrate again, or update svdengine"
        )
    arrays = {name: array for name, array in file.arrays.items() if not name.startswith(PAD_PREFIX)}
    stray = next((name for name in arrays if not name.startswith(PREFIX)), None)
    if stray is not None or "predictor" not in metadata:
        raise ModelFileError(f"{path}: damaged: {'lacks its description' if stray is None else f'holds {stray!r}'}")
    config = model_file.config
    try:
        predictor = predictor_from_arrays(
            arrays, metadata["predictor"], config.ffn_blocks, config.ffn_size, config.hidden_size
        )
        check_finite(arrays)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: {error}") from error
    check_fingerprint(predictor, model_file, path)
    return predictor


def write_model_with_predictor(path: Path | str, model_file: ModelFile, predictor: Predictor) -> None:
    """Copy a model file with `predictor` in place of its own, if it has one. `path` may be the model file itself.

    Raises ModelFileError when the predictor was made for another model or the file cannot be written; an existing
    file is replaced only by a complete one.
    """
    path = Path(path)
    check_fingerprint(predictor, model_file, path)
    source = TensorFile(model_file.path)
    try:
        declared: dict[str, Declared] = {
            name: (entry.shape, entry.dtype)
            for name, entry in source.header.entries.items()
            if not name.startswith((PREFIX, PAD_PREFIX))
        }
        arrays = _predictor_arrays(predictor)
        metadata = {**source.header.metadata, "predictor": describe(predictor)}
        with TensorWriter(path, {**declared, **_declare(arrays)}, metadata) as writer:
            for name in declared:
                flat = source.arrays[name].reshape(-1)
                for start in range(0, flat.size, _CHUNK):
                    writer.write(name, flat[start : start + _CHUNK], start)
            for name, array in arrays.items():
                writer.write(name, array)
    finally:
        source.close()


def _predictor_arrays(predictor: Predictor) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {}
    for index, layer in enumerate(predictor.layers):
        arrays |= layer_arrays(index, layer)
    return arrays


def _ends(name: str, array: NDArray[Any]) -> bytes:
    """An array's name, size and both ends."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return f"{name} {flat.size}\n".encode() + flat[:_EDGE].tobytes() + flat[-_EDGE:].tobytes()


def _declare(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Declared]:
    return {name: (array.shape, _DTYPE_NAMES[array.dtype.name]) for name, array in arrays.items()}


def check_finite(arrays: Mapping[str, NDArray[Any]]) -> None:
    """Raise ValueError on scales or thresholds that are not finite: they would make every score NaN."""
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{name} holds NaN or infinity")


def find_predictor(model_file: ModelFile, path: str | Path | None = None) -> Predictor | None:
    """The predictor in the file `path`, or else the model file's own, or None.

    Raises ModelFileError when it is damaged or was made for another model, RequestError when the model has no use
    for one.
    """
    if path is not None:
        require_relu_family(model_file)
        return read_predictor(Path(path), model_file)
    arrays = {name: array for name, array in model_file.arrays.items() if name.startswith(PREFIX)}
    if not arrays and "predictor" not in model_file.metadata:
        return None
    config = model_file.config
    try:
        description = model_file.metadata["predictor"]
        predictor = predictor_from_arrays(arrays, description, config.ffn_blocks, config.ffn_size, config.hidden_size)
        check_finite(arrays)
    except KeyError:
        raise ModelFileError(f"{model_file.path}: holds predictor tensors, but does not describe them") from None
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{model_file.path}: the predictor is damaged: {error}") from error
    check_fingerprint(predictor, model_file, model_file.path)
    return predictor


def require_predictor(model_file: ModelFile, predictor: Predictor | None) -> None:
    """Raise RequestError, with what to do, when the FFN of this model cannot run sparse."""
    require_relu_family(model_file)
    if predictor is None:
        raise RequestError(
            f"{model_file.path} has no predictor, which the sparse path needs;"
            f" run: svdengine calibrate {model_file.path}, or run it dense"
        )


def require_relu_family(model_file: ModelFile) -> None:
    """Raise RequestError when no neuron of the model is ever exactly zero."""
    if not model_file.config.sparse_ffn:
        raise RequestError(f"{model_file.path}: {why_not_sparse(model_file.config)}; run it dense")


def why_not_sparse(config: ModelConfig) -> str:
    """One line on why a model outside the ReLU family runs dense."""
    family = ", ".join(sorted(RELU_FAMILY))
    return f"sparse execution needs a ReLU-family activation ({family}), and this model has {config.activation}"
