"""What the engine did since the model was loaded, and where it stands: for /metrics and for the curious."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from svdengine.kernels.batch import FfnPath


@dataclass(frozen=True)
class EngineStats:
    """Counts since the model was loaded, and the state of the queue and of the KV block pool."""

    steps: Mapping[FfnPath, int]  # forward passes but those that only drafted, by how their FFNs ran
    rows: Mapping[FfnPath, int]  # of these, rows: a token each
    prompt_tokens: int  # tokens read in prompts, with those that were read again after a preemption
    prefix_hit_tokens: int  # tokens that were not read, because the KV cache had them
    generated_tokens: int
    drafted_tokens: int  # rows of tokens that might come next, with speculative decoding
    accepted_tokens: int  # of them, those that came
    preemptions: int  # sequences sent back to the queue because KV blocks ran out, or the FFN's path changed
    waiting: int  # sequences in the queue
    running: int  # sequences that have KV blocks
    blocks_used: int  # KV blocks of running sequences
    blocks_cached: int  # of sequences that ended; given out again when no free ones are left
    blocks_free: int
