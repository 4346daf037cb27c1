"""Which formats embedding and down projections get in a calibrated `q4` model, when nobody says.

They lose most by four bits (BENCHMARKS.md, "Quality of the formats"). Embedding and output projection in 8 bits spend
on few weights what both have in 6. A model whose embedding is small for its size would grow by that: it keeps 8 and 4.
"""

from __future__ import annotations

from svdengine.files.model_writer import weight_bytes
from svdengine.kernels.formats import WeightFormat
from svdengine.models.config import ModelConfig

MOST_GROWTH = 1.02  # of the weights' bytes, for the loss that it takes away

_Format = WeightFormat | None


def calibrated_formats(
    config: ModelConfig, dtype: WeightFormat, embedding_dtype: _Format, down_dtype: _Format
) -> tuple[_Format, _Format]:
    """The formats of embedding and down of a model that is rounded for what it reads; None: as ModelWriter has it.

    What was said of either stands, and the other is as it is without calibration then.
    """
    if dtype != "q4" or embedding_dtype or down_dtype:
        return embedding_dtype, down_dtype
    pays = weight_bytes(config, "q4", "q6", "q6") <= MOST_GROWTH * weight_bytes(config, "q4")
    return ("q6", "q6") if pays else (None, None)
