"""Whether the arrays of a model file are those that its config and formats call for."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from svdengine.kernels.formats import WeightFormat, stored_parts
from svdengine.models import TensorSpec

# Of each kind that stored_parts names; bfloat16 is held as its bits.
STORED_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I8": np.int8, "U8": np.uint8}


def check_stored(spec: TensorSpec, arrays: Mapping[str, NDArray], formats: Mapping[str, WeightFormat]) -> None:
    """Raise ValueError unless the arrays of a tensor are there, of the shapes and types that its format has."""
    lead = spec.shape[:-2] if spec.matrix else ()
    stored = {"": (spec.shape, "F32")}
    if spec.matrix:
        parts = stored_parts(formats[spec.name], *spec.shape[-2:])
        stored = {suffix: ((*lead, *shape), dtype) for suffix, (shape, dtype) in parts.items()}
    for suffix, (shape, dtype) in stored.items():
        array = arrays.get(spec.name + suffix)
        if array is None or array.shape != shape or array.dtype != STORED_DTYPES[dtype]:
            found = "nothing" if array is None else f"{array.dtype} {array.shape}"
            raise ValueError(f"{spec.name}{suffix}: found {found}, expected {dtype} {shape}")
