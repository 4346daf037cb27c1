"""The kernels of every weight format, by its name. A new format is a file beside this one, and a name in this table."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from svdengine.kernels.cuda.formats.floats import BF16_KERNELS, F16_KERNELS, F32_KERNELS
from svdengine.kernels.cuda.formats.kernels import FormatKernels
from svdengine.kernels.cuda.formats.q4 import Q4_KERNELS
from svdengine.kernels.cuda.formats.q6 import Q6_KERNELS
from svdengine.kernels.cuda.formats.q8 import Q8_KERNELS
from svdengine.kernels.cuda.formats.ternary import TERNARY_KERNELS
from svdengine.kernels.formats import WeightFormat

_ALL = (F32_KERNELS, F16_KERNELS, BF16_KERNELS, Q8_KERNELS, Q6_KERNELS, Q4_KERNELS, TERNARY_KERNELS)
KERNELS: Mapping[WeightFormat, FormatKernels] = MappingProxyType({kernels.name: kernels for kernels in _ALL})


def kernels_of(weight_format: WeightFormat) -> FormatKernels:
    """The kernels of a format. Raises ValueError when there are none."""
    if weight_format not in KERNELS:
        raise ValueError(f"found the weight format {weight_format!r}, CUDA has kernels for {', '.join(KERNELS)}")
    return KERNELS[weight_format]
