"""The sampler of one request: logits of one step to a token, with its own random generator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from svdengine.errors import RequestError, SvdEngineError
from svdengine.kernels.executor import NOT_FINITE, Choice
from svdengine.scheduling.constraint import Constraint
from svdengine.scheduling.dry import dry_penalties
from svdengine.scheduling.filters import locally_typical, within_sigmas, without_top_choices
from svdengine.scheduling.sampling import SamplingParams

_FIRST_CANDIDATES = 256  # of a top-p search; it grows eightfold until their probability suffices


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities of one step, under the model's own distribution: before penalties, bias and temperature.

    token: the id of the token that was chosen.
    logprob: its log-probability, in nats.
    top: the likeliest tokens, as many as were asked for: (id, log-probability in nats), likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Chooses the tokens of one request. Its random generator is its own, so that other requests change nothing."""

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        prompt: Sequence[int] = (),
        constraint: Constraint | None = None,
        breakers: frozenset[int] = frozenset(),
    ) -> None:
        """`breakers`: tokens that end a repetition, for DRY."""
        for token in params.logit_bias:
            if token >= vocab_size:
                raise RequestError(f"logit_bias names token {token}, but the vocabulary has {vocab_size} tokens")
        self.params = params
        self.constraint = constraint
        self._random = np.random.Generator(np.random.PCG64(params.seed))
        self._bias_ids = np.fromiter(params.logit_bias.keys(), np.int64)
        self._bias = np.fromiter(params.logit_bias.values(), np.float32)
        self._greedy = params.greedy
        self._repeats = params.repetition_penalty != 1.0 and params.repeat_last_n != 0
        self._counted = bool(params.presence_penalty or params.frequency_penalty) and params.repeat_last_n != 0
        self._dry = params.dry_multiplier > 0 and params.dry_penalty_last_n != 0
        self._breakers = breakers
        # What is looked back on; kept only while something does.
        self._penalised = self._repeats or self._counted or self._dry
        self._prompt = list(prompt) if self._repeats or self._dry else []
        self._prompt_set = np.unique(np.asarray(self._prompt, np.int64))
        self._generated: list[int] = []
        self._counts: Counter[int] = Counter()  # of the tokens generated

    def sample(self, logits: NDArray[np.float32]) -> int:
        """The next token, from logits (vocabulary,) float32, which are left as they are.

        Raises SvdEngineError when a logit is NaN or infinite, or no token fits the constraint.
        """
        if self._penalised or self._bias_ids.size:
            logits = self._adjust(logits)
        if self.constraint is None:
            token = self._choose(logits)
        else:
            tokens = self.constraint.allowed()
            token = int(tokens[self._choose(logits[tokens])])
            self.constraint.accept(token)
        if self._penalised:
            self._note(token)
        return token

    def _choose(self, logits: NDArray[np.float32]) -> int:
        """The index of the logit that is taken."""
        token = int(logits.argmax())  # NumPy's argmax stops at the first NaN, so this one look finds any
        if not np.isfinite(logits[token]):
            raise _not_finite()
        return token if self._greedy else self._draw(logits)

    def choice(self) -> Choice | None:
        """How an executor is to choose the next token itself, with a number drawn for it: to be called once a token.

        None where logits are changed or left out before a token is chosen: then `sample` is for it.
        """
        params = self.params
        if self._penalised or self._bias_ids.size or self.constraint is not None or _filters(params):
            return None
        draw = 0.0 if self._greedy else self._random.random()
        return Choice(params.temperature, params.top_k, params.top_p, params.min_p, draw)

    def _note(self, token: int) -> None:
        self._generated.append(token)
        self._counts[token] += 1
        last = self.params.repeat_last_n
        if 0 <= last < len(self._generated):
            left = self._generated[-1 - last]
            self._counts[left] -= 1
            if not self._counts[left]:
                del self._counts[left]

    def _adjust(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Penalties, then bias, on a copy."""
        logits = logits.copy()
        params = self.params
        if self._repeats:
            seen = self._seen()
            values = logits[seen]
            penalty = np.float32(params.repetition_penalty)
            logits[seen] = np.where(values > 0, values / penalty, values * penalty)
        if self._counted:
            generated = np.fromiter(self._counts.keys(), np.int64, len(self._counts))
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            logits[generated] -= np.float32(params.presence_penalty) + np.float32(params.frequency_penalty) * counts
        if self._dry:
            for token, taken in self._repetitions().items():
                logits[token] -= np.float32(taken)
        logits[self._bias_ids] += self._bias
        return logits

    def _seen(self) -> NDArray[np.int64]:
        """The tokens that the repetition penalty looks back on, each once."""
        last = self.params.repeat_last_n
        if last < 0:
            return np.union1d(self._prompt_set, np.fromiter(self._counts.keys(), np.int64, len(self._counts)))
        return np.unique(np.asarray(_last(self._prompt, self._generated, last), np.int64))

    def _repetitions(self) -> dict[int, float]:
        params = self.params
        return dry_penalties(
            _last(self._prompt, self._generated, params.dry_penalty_last_n),
            self._breakers,
            multiplier=params.dry_multiplier,
            base=params.dry_base,
            allowed_length=params.dry_allowed_length,
        )

    def _draw(self, logits: NDArray[np.float32]) -> int:
        tokens, probabilities = candidates(logits, self.params)
        params = self.params
        if params.xtc_probability > 0 and self._random.random() < params.xtc_probability:
            tokens, probabilities = without_top_choices(tokens, probabilities, params.xtc_threshold)
        cumulative = np.cumsum(probabilities)
        index = int(np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right"))
        return int(tokens[min(index, len(tokens) - 1)])


def _last(prompt: list[int], generated: list[int], count: int) -> list[int]:
    """The last `count` tokens of both; -1: all of them."""
    if count < 0:
        return prompt + generated
    missing = count - len(generated)
    return prompt[-missing:] + generated if missing > 0 else generated[len(generated) - count :]


def _filters(params: SamplingParams) -> bool:
    """Whether tokens are left out in ways that only this sampler knows."""
    return params.typical_p < 1.0 or params.top_n_sigma > 0.0 or params.xtc_probability > 0.0


def check_chosen(token: int) -> None:
    """Raise SvdEngineError where an executor found logits that are NaN or infinite, instead of a token."""
    if token == NOT_FINITE:
        raise _not_finite()


def _not_finite() -> SvdEngineError:
    return SvdEngineError(
        "the model gave logits that are not finite; its weights may be damaged, or too large for their format"
    )


def candidates(logits: NDArray[np.float32], params: SamplingParams) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Tokens that survive the filters, and their probabilities (not normalised): (n,) int64, (n,) float64.

    They come likeliest first, ties by token id, when a top-k or top-p filter ran; else in order of token id.
    """
    if params.top_n_sigma > 0.0:
        within = within_sigmas(logits, params.top_n_sigma)
        tokens, kept = candidates(logits[within], replace(params, top_n_sigma=0.0))
        return within[tokens], kept
    total = 0.0  # of the weights that top-p takes its share of
    if params.top_k and params.top_k < len(logits):
        tokens = _largest(logits, params.top_k)
        kept = _weights(logits[tokens], params.temperature)
    else:
        tokens = np.arange(len(logits))
        kept = _weights(logits, params.temperature)
        if params.top_p < 1.0 and params.typical_p == 1.0:
            total = float(kept.sum())
            tokens = _enough(kept, params.top_p * total)
            kept = kept[tokens]
    if params.typical_p < 1.0:
        tokens, kept = locally_typical(tokens, kept, params.typical_p)
        if params.top_p < 1.0:
            order = np.argsort(-kept, kind="stable")
            tokens, kept = tokens[order], kept[order]
    if params.top_p < 1.0:
        total = total or float(kept.sum())
        # The token that crosses the line is kept.
        count = int((np.cumsum(kept) < params.top_p * total).sum()) + 1
        tokens, kept = tokens[:count], kept[:count]
    if params.min_p > 0.0:
        likely = kept >= params.min_p * kept.max()
        tokens, kept = tokens[likely], kept[likely]
    return tokens, kept


def _weights(logits: NDArray[np.float32], temperature: float) -> NDArray[np.float64]:
    """Probabilities times a constant that makes the largest 1."""
    distances = logits.astype(np.float64) - float(logits.max())
    with np.errstate(over="ignore"):  # divided by a tiny temperature
        return np.exp(distances / temperature)


def token_logprobs(logits: NDArray[np.float32], token: int, top: int) -> TokenLogprobs:
    """Log-probabilities of the token chosen and of the `top` likeliest, from raw logits (vocabulary,) float32."""
    shifted = logits.astype(np.float64) - float(logits.max())
    normaliser = float(np.log(np.exp(shifted).sum()))
    likeliest = _largest(logits, min(top, len(logits))) if top else ()
    pairs = tuple((int(t), float(shifted[t]) - normaliser) for t in likeliest)
    return TokenLogprobs(token, float(shifted[token]) - normaliser, pairs)


def _largest(values: NDArray, count: int) -> NDArray[np.int64]:
    """Indices of the `count` largest, in descending order, the lower index first among equals."""
    if count >= len(values):
        return np.argsort(-values, kind="stable")
    bound = values[np.argpartition(values, len(values) - count)[len(values) - count]]
    above = np.flatnonzero(values > bound)
    level = np.flatnonzero(values == bound)[: count - len(above)]
    indices = np.concatenate([above, level])
    return indices[np.argsort(-values[indices], kind="stable")]


def _enough(weights: NDArray[np.float64], mass: float) -> NDArray[np.int64]:
    """The likeliest tokens, in descending order, that hold at least `mass` together."""
    count = _FIRST_CANDIDATES
    while True:
        tokens = _largest(weights, count)
        if count >= len(weights) or weights[tokens].sum() >= mass:
            return tokens
        count *= 8


def negative_log_likelihood(logits: NDArray[np.float32], targets: list[int]) -> float:
    """Sum over rows of -log softmax(logits)[target], in nats; logits: (n, vocabulary) float32."""
    return -sum(float(log_softmax(row)[target]) for row, target in zip(logits, targets, strict=True))


def log_softmax(row: NDArray[np.float32]) -> NDArray[np.float64]:
    """Logarithms of the probabilities that logits (vocabulary,) stand for."""
    shifted = row.astype(np.float64) - float(row.max())
    return shifted - np.log(np.exp(shifted).sum())
