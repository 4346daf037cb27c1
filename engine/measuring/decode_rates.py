"""How fast a model decodes plain text, and how sparse it is then: on several paths of the FFN, in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from svdengine.kernels.executor import NO_NEURONS, FfnMode, NeuronCounts
from svdengine.measuring.benchmark import likeliest, read_prompt, single_sequence

if TYPE_CHECKING:
    from svdengine.llm import LLM

_BEFORE, _MOST_TOKENS, _ROUNDS = 16, 32, 3

# Which neurons a token needs depends on the text. This is plain English, as answers are.
_TEXT = """\
Most rivers begin as small streams in hills or mountains. Rain and melting snow run down the slopes, and the streams
join until they form a river. On its way to the sea the water carries sand, stones and mud, which it leaves where it
becomes slow. People have always lived beside rivers, because they give water to drink, fish to eat, and a road for
boats. If you want to know how old a valley is, look at the rocks on both sides: the deeper the river has cut, the
longer it has been at work. A good way to begin is to walk along the bank for an hour and to write down what you see.
"""


@dataclass(frozen=True)
class DecodeRate:
    """Decoding of one sequence on one path.

    predicted_density, active_density: shares of FFN neurons whose gate was read, and of those that were computed; None:
    nothing ran sparse.
    """

    ffn: FfnMode
    sparsity_bias: float
    tokens_per_second: float  # the median of the rounds
    predicted_density: float | None
    active_density: float | None


def decode_rates(llm: LLM, settings: Sequence[tuple[FfnMode, float]], seconds: float = 1.0) -> list[DecodeRate] | None:
    """Decode the same text with each pair of an FFN path and a sparsity bias, in about `seconds` together.

    They take turns, since a machine's speed drifts. What the KV cache held is lost; `llm` must be idle, and its path is
    as before afterwards. None where a dense token takes too long for that.
    """
    tokens, before = _tokens(llm), llm.ffn
    try:
        llm.ffn = "dense"
        read_prompt(llm.executor, tokens[:_BEFORE], None)
        _decode(llm, tokens[: _BEFORE + 1], 0.0)  # the first step does more than the others
        token = _timed(partial(_decode, llm, tokens[: _BEFORE + 2], 0.0)) / 2
        count = min(int(seconds / ((_ROUNDS + 1) * len(settings) * token)), len(tokens) - _BEFORE)
        if count < 1:
            return None
        taken: list[list[float]] = [[] for _ in settings]
        neurons: list[NeuronCounts] = [NO_NEURONS for _ in settings]
        for number in range(_ROUNDS + 1):  # the first round does not count
            for i, (path, bias) in enumerate(settings):
                llm.ffn = path
                start = llm.executor.neuron_counts()
                spent = _timed(partial(_decode, llm, tokens[: _BEFORE + count], bias))
                if number:
                    taken[i].append(spent)
                    neurons[i] += llm.executor.neuron_counts() - start
    finally:
        llm.ffn = before
    return [
        DecodeRate(path, bias, count / statistics.median(times), counts.predicted_density, counts.active_density)
        for (path, bias), times, counts in zip(settings, taken, neurons, strict=True)
    ]


def _tokens(llm: LLM) -> np.ndarray:
    """The text's tokens, as many as are used and the context holds: (n,) int32."""
    if llm.model_file.tokenizer_info.kind == "none":
        ids = list(np.random.default_rng(0).integers(0, llm.config.vocab_size, _BEFORE + _MOST_TOKENS))
    else:
        ids = llm.tokenizer.encode(_TEXT)
    return np.array(ids[: min(_BEFORE + _MOST_TOKENS, llm.context)], np.int32)


def _decode(llm: LLM, tokens: np.ndarray, bias: float) -> None:
    """Read the tokens after the first ones singly, as decoding does: each step's logits are looked at."""
    executor, biases = llm.executor, np.array([bias], np.float32) if bias else None
    for position in range(min(_BEFORE, len(tokens) - 1), len(tokens)):
        batch = single_sequence(
            tokens[position : position + 1], position, biases, last=True, block_size=executor.block_size
        )
        likeliest(executor, batch)


def _timed(run: partial[None]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
