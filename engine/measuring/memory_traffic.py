"""A token's memory traffic: the bytes of weights and of KV cache that decoding one token reads."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from svdengine.kernels.formats import gather_parts
from svdengine.kernels.predictor import Predictor, predictor_bytes
from svdengine.models.config import ModelConfig
from svdengine.models.tensors import FFN_MATRICES, tensor_specs

if TYPE_CHECKING:
    from svdengine.files.model_file import ModelFile

_LOOKUPS = ("embedding", "position_embedding")  # one row a token is read of them


def weight_bytes(model_file: ModelFile) -> int:
    """Bytes of weights that one decoded token reads when the FFN is dense.

    A tied embedding is the output projection too and is read whole; of experts those that a token has.
    """
    config, total = model_file.config, 0.0
    for spec in tensor_specs(config):
        size = stored_bytes(model_file, spec.name)
        if spec.name in FFN_MATRICES:
            total += size * _read_share(config)
            continue
        whole = spec.name not in _LOOKUPS or (spec.name == "embedding" and config.tied_embeddings)
        total += size if whole else size // spec.shape[0]
    return round(total)


def sparse_weight_bytes(
    model_file: ModelFile, predictor: Predictor | None, predicted_density: float, active_density: float
) -> float:
    """Bytes of weights that one decoded token reads when the FFN is sparse, for shares of neurons between 0 and 1.

    The gate's row is read of every predicted neuron, the others' only of those that prove active. Without a predictor
    `predicted_density` is 1: all gates are read.
    """
    share = _read_share(model_file.config)
    gate = share * stored_bytes(model_file, "gate" if model_file.config.gated else "up")
    rest = share * ffn_bytes(model_file) - gate
    scoring = share * predictor_bytes(predictor) if predictor is not None else 0
    return weight_bytes(model_file) - gate - rest + scoring + predicted_density * gate + active_density * rest


def _read_share(config: ModelConfig) -> float:
    """Share of all FFN neurons that a token has: with experts, those of the ones that are chosen."""
    return config.token_neurons / (config.ffn_blocks * config.ffn_size)


def ffn_bytes(model_file: ModelFile) -> int:
    """Bytes of the matrices of all FFNs."""
    return sum(stored_bytes(model_file, name) for name in ("gate", "up", "down_T", "down"))


def stored_bytes(model_file: ModelFile, name: str) -> int:
    """Bytes of a canonical tensor with its scales, in all layers."""
    return sum(part.nbytes for part in gather_parts(model_file.arrays, name).values())


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the model, as people count them."""
    return sum(math.prod(spec.shape) for spec in tensor_specs(config))
