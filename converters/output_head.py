"""From hidden states to logits in float32, where many rows are wanted at once: of a small model it is held unpacked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from svdengine.files.model_file import ModelFile
from svdengine.kernels.formats import dequantize, gather_parts

Array = NDArray[np.float32]

_MOST = 1 << 26  # elements of a matrix that is worth unpacking: 256 MiB


@dataclass(frozen=True)
class OutputHead:
    """The output projection. Steps need no logits then, only hidden states, which are few."""

    matrix: Array  # (vocabulary, d)
    scale: float

    def logits(self, hidden: Array) -> Array:
        """Logits (n, vocabulary) of hidden states (n, d), after the final norm."""
        found: Array = hidden @ self.matrix.T
        if self.scale != 1.0:
            found *= np.float32(self.scale)
        return found


def read_output_head(model_file: ModelFile) -> OutputHead | None:
    """The head of a model file; None where it is large, and so better read as it is stored."""
    config = model_file.config
    if config.vocab_size * config.hidden_size > _MOST:
        return None
    name = "embedding" if config.tied_embeddings else "lm_head"
    parts = gather_parts(model_file.arrays, name)
    return OutputHead(dequantize(parts, model_file.formats[name], config.hidden_size), config.logit_scale)
