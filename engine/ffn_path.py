"""Which path the FFN takes: every neuron (dense), or those that a predictor calls active (sparse)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from svdengine.errors import ModelFileError, RequestError
from svdengine.kernels.batch import FfnMode
from svdengine.kernels.predictor import PREFIX, Predictor, predictor_from_arrays
from svdengine.models.config import RELU_FAMILY, ModelConfig
from svdengine.predictor_file import check_fingerprint, check_finite, read_predictor

if TYPE_CHECKING:
    from svdengine.model_file import ModelFile

FFN_CHOICES: tuple[str, ...] = ("auto", "dense", "sparse")


def check_ffn(ffn: Any) -> FfnMode:
    """`ffn` itself. Raises RequestError unless it names a path."""
    if ffn not in FFN_CHOICES:
        raise RequestError(f"ffn must be one of {', '.join(FFN_CHOICES)}, found {ffn!r}")
    return cast(FfnMode, ffn)


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
        predictor = predictor_from_arrays(arrays, description, config.layer_count, config.ffn_size, config.hidden_size)
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
            f"{model_file.path} has no predictor, which ffn='sparse' needs;"
            f" run: svdengine calibrate {model_file.path}, or use ffn='dense'"
        )


def require_relu_family(model_file: ModelFile) -> None:
    """Raise RequestError when no neuron of the model is ever exactly zero."""
    if not model_file.config.sparse_ffn:
        raise RequestError(f"{model_file.path}: {why_not_sparse(model_file.config)}; use ffn='dense'")


def why_not_sparse(config: ModelConfig) -> str:
    """One line on why a model outside the ReLU family runs dense."""
    family = ", ".join(sorted(RELU_FAMILY))
    return f"sparse execution needs a ReLU-family activation ({family}), and this model has {config.activation}"
