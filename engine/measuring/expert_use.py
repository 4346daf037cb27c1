"""How evenly a mixture's experts are used, in one line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from svdengine.models.config import ModelConfig


@dataclass(frozen=True)
class ExpertUse:
    """Which experts some tokens had, in all layers with experts together."""

    experts: int  # that there are
    unused: int  # that no token had
    busiest: float  # share of tokens that have the expert which most have, mean over layers
    even: float  # what each expert's share would be, were all chosen alike


def expert_use(config: ModelConfig, counts: Sequence[Sequence[int]]) -> ExpertUse | None:
    """Of how many rows chose each expert, by layer; None: no mixture, or nothing ran."""
    layers = [(sum(layer) / config.active_experts, layer) for layer in counts]
    if not layers or not all(tokens for tokens, _ in layers):
        return None
    return ExpertUse(
        experts=sum(len(layer) for _, layer in layers),
        unused=sum(not count for _, layer in layers for count in layer),
        busiest=sum(max(layer) / tokens for tokens, layer in layers) / len(layers),
        even=config.active_experts / config.expert_count,
    )


def expert_line(config: ModelConfig, use: ExpertUse) -> str:
    """For people."""
    never = f"; {use.unused:,} of {use.experts:,} no token had" if use.unused else ""
    return (
        f"experts: a token has {config.active_experts} of {config.expert_count} in a layer. The busiest of a layer is"
        f" that of {100 * use.busiest:.0f} % of the tokens, where an even choice gives {100 * use.even:.0f} %{never}"
    )
