"""What a request gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from svdengine.scheduling.sampler import TokenLogprobs

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Stats:
    """What a completion took.

    prompt_tokens: tokens of the prompt.
    cached_tokens: of these, tokens that were still in the KV cache.
    generated_tokens: tokens that were sampled.
    seconds: from the request to its end.
    time_to_first_token: seconds; 0 when no token came.
    tokens_per_second: of the tokens after the first; 0 when there are none.
    predicted_density: share of FFN neurons predicted active; None: every step was dense.
    active_density: share of FFN neurons that were computed in full, after their gates; None: every step was dense.
    """

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    seconds: float
    time_to_first_token: float
    tokens_per_second: float
    predicted_density: float | None = None
    active_density: float | None = None


@dataclass(frozen=True)
class Completion:
    """One completion of one prompt.

    text: what was generated, without stop strings and end tokens.
    token_ids: every token that was sampled, the one that ended the text included.
    finish_reason: stop: an end token or stop string came, or the text is all that its response_format allows; length:
        max_tokens or the context was reached; abort: the request was taken out before, or its stream closed.
    stats: what it cost.
    logprobs: one for each of token_ids; None when they were not asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stats: Stats
    logprobs: list[TokenLogprobs] | None = None
