"""Requests: a sequence, and what is done with the logits of each step."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from svdengine.errors import ContextOverflowError, RequestError, shown
from svdengine.kernels.executor import NO_NEURONS, Choice, LayerCounts, Logits, NeuronCounts
from svdengine.scheduling.completion import Completion, FinishReason, Stats
from svdengine.scheduling.constraint import Constraint
from svdengine.scheduling.sampler import Sampler, TokenLogprobs, check_chosen, token_logprobs
from svdengine.scheduling.sampling import SamplingParams
from svdengine.scheduling.sequence import Sequence
from svdengine.text.stream_decoder import StopStrings, StreamDecoder


@dataclass(frozen=True)
class ContextLimit:
    """How long a sequence may become, and what happens then."""

    tokens: int
    shift: bool = False  # forget the older half, instead of ending
    keep: int = 0  # leading tokens that a shift does not forget


class Request(Protocol):
    """What the engine needs to know of a request."""

    sequence: Sequence
    error: Exception | None
    by_layer: bool  # whether it wants its neurons by layer

    @property
    def done(self) -> bool:
        """Whether it needs no further step."""
        ...

    def choice(self) -> Choice | None:
        """How an executor may choose the next token itself; None where its logits are wanted. Asked once a token."""
        ...

    def accept(self, logits: Logits) -> bool:
        """Take the logits of the step just computed (rows, vocabulary); true when the context must be shifted.

        Where the sequence wants hidden states they are these, (rows, hidden).
        """
        ...

    def accept_token(self, token: int) -> bool:
        """Take the token that the executor chose, or NOT_FINITE; true when the context must be shifted."""
        ...

    def note_neurons(self, counts: NeuronCounts, layers: LayerCounts | None) -> None:
        """Take the FFN neurons of a sparse step that the request was part of; `layers`: where a request wants them."""
        ...

    @property
    def keep(self) -> int:
        """Tokens that a shift keeps."""
        ...


class Generation:
    """A completion in the making: samples a token from the last row, and turns tokens into text.

    params: how tokens are chosen and when generation ends.
    pieces: text that nobody has fetched yet, to be taken from the left.
    token_ids: every token that was sampled so far.
    logprobs: one for each of token_ids, where they were asked for.
    by_layer: whether `layers` are kept; to be set before it runs.
    layers: the FFN neurons of the step that gave each token, to be taken from the left; None of a dense step.
    finish_reason: why it ended; None: it has not, or with an error.
    error: what a step raised, in place of further tokens.
    """

    def __init__(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        vocab_size: int,
        end_tokens: frozenset[int],
        limit: ContextLimit,
        decoder: StreamDecoder | None,
        constraint: Constraint | None = None,
        breakers: frozenset[int] = frozenset(),
    ) -> None:
        """`breakers`: tokens that end a repetition, for DRY."""
        _check_tokens(prompt, vocab_size)
        fitted = _fit(prompt, limit)
        self.sequence = Sequence(
            fitted,
            sparsity_bias=params.sparsity_bias,
            ffn=params.ffn,
            priority=params.priority,
            most_tokens=_most_tokens(len(fitted), params.max_tokens, limit),
        )
        self.params = params
        self.pieces: deque[str] = deque()
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.by_layer = False
        self.layers: deque[LayerCounts | None] = deque()
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None
        self._limit = limit
        self._prompt_tokens = len(prompt)
        self._sampler = Sampler(params, vocab_size, prompt, constraint, breakers)
        self._end_tokens = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else end_tokens)
        self._decoder = decoder
        self._stops = StopStrings(params.stop)
        self._text: list[str] = []
        self._cached_tokens: int | None = None
        self._neurons = NO_NEURONS
        self._step_layers: LayerCounts | None = None  # of the step at hand
        self._started = time.perf_counter()
        self._first = self._ended = self._started

    @property
    def done(self) -> bool:
        """Whether no further token comes."""
        return self.finish_reason is not None or self.error is not None

    @property
    def keep(self) -> int:
        """Tokens that a shift keeps."""
        return self._limit.keep

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._stops.found

    @property
    def _whole(self) -> bool:
        """Whether the text is all that its grammar allows."""
        return self._sampler.constraint is not None and self._sampler.constraint.complete

    def choice(self) -> Choice | None:
        """How an executor may choose the next token; None where logits are changed first, or logprobs are wanted."""
        return None if self.params.logprobs is not None else self._sampler.choice()

    def accept(self, logits: Logits) -> bool:
        """Sample the next token, and those after it while they are as drafted, each from its row of the logits.

        True when the context is full and has to be shifted.
        """
        full = False
        for row, drafted in zip(logits, [*self.sequence.draft, None], strict=True):
            token = self._sampler.sample(row)
            if self.params.logprobs is not None:
                self.logprobs.append(token_logprobs(row, token, self.params.logprobs))
            full = self._take(token)
            if full or self.done or token != drafted:
                break
        self._step_layers = None
        return full

    def accept_token(self, token: int) -> bool:
        """Take the token that an executor chose, as `choice` said. Raises SvdEngineError where it found none."""
        check_chosen(token)
        full = self._take(token)
        self._step_layers = None
        return full

    def _take(self, token: int) -> bool:
        """Add a token to the completion; true when the context is full and has to be shifted."""
        self._note_time()
        self.token_ids.append(token)
        if self.by_layer:
            self.layers.append(self._step_layers)
        self.sequence.append(token)
        if token in self._end_tokens:
            self.finish("stop")
            return False
        self._show(self._stops.push(self._decoder.push(token)) if self._decoder else "")
        full = len(self.sequence) >= self._limit.tokens
        if self._stops.found is not None or self._whole:
            self.finish("stop")
        elif len(self.token_ids) == self.params.max_tokens or (full and not self._limit.shift):
            self.finish("length")
        return full and not self.done

    def note_neurons(self, counts: NeuronCounts, layers: LayerCounts | None) -> None:
        """Add the FFN neurons of a step."""
        self._neurons = self._neurons + counts
        self._step_layers = layers

    def finish(self, reason: FinishReason) -> None:
        """End generation; text that was held back is released."""
        if self.done:
            return
        if self._decoder is not None and self._stops.found is None:
            self._show(self._stops.push(self._decoder.flush()))
            self._show(self._stops.flush())
        self.finish_reason = reason
        self._ended = time.perf_counter()

    def completion(self) -> Completion:
        """All of it, once it is done."""
        count = len(self.token_ids)
        later = self._ended - self._first
        stats = Stats(
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens or 0,
            generated_tokens=count,
            seconds=self._ended - self._started,
            time_to_first_token=self._first - self._started if count else 0.0,
            tokens_per_second=(count - 1) / later if count > 1 and later > 0 else 0.0,
            predicted_density=self._neurons.predicted_density,
            active_density=self._neurons.active_density,
        )
        logprobs = self.logprobs if self.params.logprobs is not None else None
        return Completion("".join(self._text), self.token_ids, self.finish_reason or "abort", stats, logprobs)

    def _show(self, piece: str) -> None:
        if piece:
            self._text.append(piece)
            self.pieces.append(piece)

    def _note_time(self) -> None:
        if self._cached_tokens is None:
            self._cached_tokens = self.sequence.reused
            self._first = time.perf_counter()


class ScoredGeneration(Generation):
    """A completion that also tells the log-probabilities of its prompt's tokens, teacher-forced.

    prompt_logprobs: one for each token of the prompt, once it was read; None for the first, which follows nothing.
    """

    def __init__(self, prompt: list[int], params: SamplingParams, *, generate: bool, **options: Any) -> None:
        """`generate`: false: it ends with the prompt. `params` must ask for logprobs."""
        if params.logprobs is None:
            raise RequestError("log-probabilities of a prompt are for requests with logprobs")
        super().__init__(prompt, params, **options)
        self.sequence.all_logits = True
        self.prompt_logprobs: list[TokenLogprobs | None] = [None] * len(self.sequence)
        self._generate = generate

    def accept(self, logits: Logits) -> bool:
        """Take the rows of tokens that were cached last, and sample from the last one when no token is pending."""
        sequence, top = self.sequence, self.params.logprobs or 0
        for position, row in enumerate(logits, sequence.cached - len(logits) + 1):
            if position < len(self.prompt_logprobs):
                self.prompt_logprobs[position] = token_logprobs(row, sequence.tokens[position], top)
        if sequence.pending:
            return False
        if self._generate:
            return super().accept(logits[-1:])
        self._note_time()
        self.finish("length")
        return False


class Scoring:
    """The logits of every token of a text, teacher-forced."""

    keep = 0  # a context that is full is an error here
    by_layer = False

    def __init__(self, tokens: list[int], vocab_size: int, limit: int, sparsity_bias: float = 0.0) -> None:
        _check_tokens(tokens, vocab_size)
        if len(tokens) > limit:
            raise ContextOverflowError(f"{len(tokens)} tokens do not fit the context of {limit}; score them in parts")
        self.sequence = Sequence(tokens, all_logits=True, sparsity_bias=sparsity_bias)
        self.logits = np.empty((len(tokens), vocab_size), np.float32)
        self.error: Exception | None = None
        self.done = False

    def choice(self) -> None:
        """All logits are wanted."""

    def accept_token(self, token: int) -> bool:
        """Never called: no choice is given."""
        raise NotImplementedError

    def accept(self, logits: Logits) -> bool:
        """Keep the rows, which are those of the tokens cached last."""
        end = self.sequence.cached
        self.logits[end - len(logits) : end] = logits
        self.done = self.sequence.pending == 0
        return False

    def note_neurons(self, counts: NeuronCounts, layers: LayerCounts | None) -> None:
        """Scoring does not report them."""


def _check_tokens(tokens: list[int], vocab_size: int) -> None:
    if not tokens:
        raise RequestError("the prompt is empty; it must hold at least one token")
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise RequestError(f"found the token id {shown(token)}; ids of this model lie in 0..{vocab_size - 1}")


def _fit(prompt: list[int], limit: ContextLimit) -> list[int]:
    """The prompt, which must leave room for one token; with a shift, less the middle that does not fit."""
    if len(prompt) < limit.tokens:
        return prompt
    if not limit.shift or limit.keep >= limit.tokens // 2:
        hint = "" if limit.shift else ", or allow the oldest tokens to be dropped (context_shift)"
        raise ContextOverflowError(
            f"the prompt has {len(prompt)} tokens and this model's maximum context length is {limit.tokens} tokens, "
            f"one of them for the answer; shorten the prompt, use a larger context{hint}"
        )
    tail = (limit.tokens - limit.keep) // 2
    return prompt[: limit.keep] + prompt[-tail:]


def _most_tokens(prompt_tokens: int, max_tokens: int | None, limit: ContextLimit) -> int:
    """The length of a sequence beyond which no token is wanted, or a shift comes first."""
    return limit.tokens if max_tokens is None else min(limit.tokens, prompt_tokens + max_tokens)
