"""Prompts as programs give them: a text, or token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from svdengine.errors import RequestError

Prompt = str | Sequence[int]


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several as a list. Raises RequestError."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise RequestError(f"prompts must be texts or lists of token ids, found {type(prompts).__name__}")
    batch = list(prompts)
    if not batch:
        raise RequestError("there is no prompt")
    if all(isinstance(p, int | np.integer) and not isinstance(p, bool) for p in batch):
        return [[int(p) for p in batch]]  # type: ignore[arg-type]
    return batch  # type: ignore[return-value]


def token_list(tokens: Any) -> list[int]:
    """Token ids as a list of int. Raises RequestError on anything else."""
    if isinstance(tokens, np.ndarray):
        tokens = tokens.tolist()
    if isinstance(tokens, str | bytes) or not isinstance(tokens, Iterable):
        raise RequestError(f"token ids must be a list of whole numbers, found {type(tokens).__name__}")
    ids = list(tokens)
    if any(isinstance(t, bool) or not isinstance(t, int | np.integer) for t in ids):
        raise RequestError("token ids must be whole numbers")
    return [int(t) for t in ids]
