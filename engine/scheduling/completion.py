"""What a request gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from svdengine.scheduling.sampler import TokenLogprobs

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Stats:
    """What a completion took."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt, tokens that were still in the KV cache
    generated_tokens: int
    seconds: float  # from the request to its end
    time_to_first_token: float  # seconds; 0 when no token came
    tokens_per_second: float  # of the tokens after the first; 0 when there are none
    predicted_density: float | None = None  # share of FFN neurons predicted active; None: every step was dense
    active_density: float | None = None  # share of FFN neurons that were computed in full, after their gates


@dataclass(frozen=True)
class Completion:
    """One completion of one prompt."""

    text: str
    token_ids: list[int]  # every token that was sampled, the one that ended the text included
    finish_reason: FinishReason  # stop: an end token or stop string; length: max_tokens or the context; abort
    stats: Stats
    logprobs: list[TokenLogprobs] | None = None  # one for each of token_ids, when they were asked for
