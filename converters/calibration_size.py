"""How much work calibration does, by the size of the model: what a small one affords would take a large one hours."""

from __future__ import annotations

from dataclasses import dataclass

from svdengine.models.config import ModelConfig

LARGE = 2048  # hidden size from which a model counts as large


@dataclass(frozen=True)
class CalibrationSize:
    """What calibration takes where nothing else is asked for."""

    kind: str  # of the predictor
    rank: int | None  # of an SVD; None: several are tried in each layer
    tokens: int  # of text
    threshold_rows: int  # tokens that thresholds are fitted to, in each layer
    loss_tokens: int  # held-out tokens of about which the loss is taken at each step
    together: int  # sequences that the model writes at once
    written: bool  # whether the model writes the text itself; else it is text that every machine has
    moments: bool  # whether second moments are summed over all tokens; else they come from the sampled ones


def calibration_size(config: ModelConfig) -> CalibrationSize:
    """The amounts for a model.

    From d = 2048 on an SVD of about 2.3 % of the neurons costs 0.7 bits a gate weight, takes seconds to make where a
    low-bit copy takes a minute, and is the paper's own choice. The second moments of 32 layers of d = 4096 would fill
    4 GB, their sampled rows 1.5 GB. They may be fewer than d: the SVD is a projection, which takes no inverse.
    """
    if config.hidden_size < LARGE:
        return CalibrationSize("lowbit", None, 14_336, 8192, 3072, 16, True, True)
    rank = paper_rank(config.hidden_size, config.ffn_size)
    return CalibrationSize("svd", rank, 4096, 2048, 768, 16, False, False)


def default_tokens(config: ModelConfig, thresholds: str = "error") -> int:
    """Tokens of text where nothing is asked for. The paper factors the second moment of half of four fifths of them."""
    tokens = calibration_size(config).tokens
    return max(tokens, 3 * config.hidden_size + 256) if thresholds == "greedy" else tokens


def default_kind(config: ModelConfig, rank: int | None = None, thresholds: str = "error") -> str:
    """The predictor that is made where none is named: an SVD where a rank or the paper's thresholds are asked for.

    Experts get what reads least of them, or none where none pays (expert_choice.py).
    """
    if config.expert_count and rank is None and thresholds != "greedy":
        return "auto"
    return "svd" if rank is not None or thresholds == "greedy" else calibration_size(config).kind


def paper_rank(hidden_size: int, ffn_size: int) -> int:
    """About 2.3 % of the neurons in multiples of 64, at least 64: 256 of Llama-2-7B's 11008, as in arXiv:2603.14110."""
    return min(max(64 * round(ffn_size / 43 / 64), 64), hidden_size, ffn_size)
