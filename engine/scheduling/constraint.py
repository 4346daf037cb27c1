"""Constrained decoding: which tokens may come next, so that the text keeps to a grammar. Extra `grammar`."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from svdengine.errors import GrammarError, RequestError
from svdengine.text.grammar import Grammar
from svdengine.text.grammar_check import GrammarChecker, short
from svdengine.text.tokenizer import Tokenizer

_KEPT = 32  # grammars that are kept compiled
_LEXER_STATES = 30_000  # of one or two kilobytes each
_GRAMMAR_SIZE = 200_000  # symbols
_SLOW_SECONDS = 0.02  # for the tokens of one step, on average,
_FREE_SECONDS = 3.0  # beside this: more, and the request would hold up all that run with it


class Constraint(Protocol):
    """What the sampler asks before and tells after each token of one request."""

    def allowed(self) -> NDArray[np.int64]:
        """Ids of the tokens that may come next, ascending, at least one. Raises RequestError when there is none."""
        ...

    def accept(self, token: int) -> None:
        """Take note of the token that came, one of those allowed."""
        ...

    @property
    def complete(self) -> bool:
        """Whether the text is whole: nothing but an end token may come."""
        ...


class ConstraintMaker:
    """Makes constraints for one tokenizer. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, check: Callable[[Grammar], None] | None = None) -> None:
        """Raises RequestError with what to install, or when the model has no tokenizer or no end token.

        check: raises GrammarError when a new grammar cannot be used; None: `GrammarChecker.check`.
        """
        try:
            import llguidance
        except ImportError as error:
            raise RequestError('grammars and tools need llguidance; run: pip install "svdengine[grammar]"') from error
        ends = sorted(token for token in tokenizer.eos_token_ids if token < vocab_size)
        if not ends:
            raise RequestError("a grammar needs a model with an end token, which this one lacks")
        self._library = llguidance
        self._size = vocab_size
        words = llguidance.TokenizerWrapper(_Words(tokenizer, vocab_size, ends[0]))
        self._tokenizer = llguidance.LLTokenizer(words, n_vocab=vocab_size, eos_token=ends)
        self._limits = _limits()
        self._checker = GrammarChecker()
        self._check = check or GrammarChecker().check
        self._compiled: OrderedDict[Grammar, Any] = OrderedDict()
        self._lock = threading.Lock()

    def make(self, grammar: Grammar) -> Constraint:
        """A constraint for one request. Raises RequestError when the grammar is not valid or not supported."""
        with self._lock:
            matcher = self._compiled.get(grammar)
            if matcher is not None:
                self._compiled.move_to_end(grammar)
        if matcher is None:
            matcher = self._compile(grammar)
            with self._lock:
                self._compiled[grammar] = matcher
                if len(self._compiled) > _KEPT:
                    self._compiled.popitem(last=False)
        return _MatcherConstraint(matcher.deep_copy(), self._size)

    def _compile(self, grammar: Grammar) -> Any:
        self._check(grammar)
        self._checker.check(grammar)
        library = self._library.LLMatcher
        try:
            source = (
                library.grammar_from_json_schema(grammar.text)
                if grammar.kind == "json_schema"
                else library.grammar_from_lark(grammar.text)
            )
        except ValueError as error:
            raise GrammarError(f"the grammar cannot be used: {short(error)}") from error
        limits = self._library.LLParserLimits(max_lexer_states=_LEXER_STATES, max_grammar_size=_GRAMMAR_SIZE)
        matcher = library(self._tokenizer, source, log_level=0, limits=limits)
        if matcher.is_error():
            raise GrammarError(f"the grammar cannot be used: {short(matcher.get_error())}")
        return matcher


def _limits() -> Any:
    """What one token may cost, and how much the states of one grammar may hold, 1 to 2 KB each."""
    from llguidance._lib import LLParserLimits

    return LLParserLimits(max_lexer_states=50_000, max_grammar_size=200_000)


class _MatcherConstraint:
    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._size = vocab_size
        self._left = _FREE_SECONDS

    def allowed(self) -> NDArray[np.int64]:
        begin = time.perf_counter()
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._left += min(_SLOW_SECONDS - (time.perf_counter() - begin), _FREE_SECONDS - self._left)
        if self._left < 0:
            raise GrammarError("the grammar of this request takes too much time at each token")
        tokens = np.flatnonzero(np.unpackbits(mask, bitorder="little")[: self._size])
        if self._matcher.is_error() or not tokens.size:
            why = short(self._matcher.get_error() or "no token fits")
            raise GrammarError(f"the grammar of this request could not be followed: {why}")
        return tokens

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)

    @property
    def complete(self) -> bool:
        return bool(self._matcher.is_stopped())


class _Words:
    """The vocabulary as llguidance reads it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = end
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(token) for token in range(vocab_size)]
        self.special_token_ids = [token for token in range(vocab_size) if tokenizer.is_silent(token)]
        self._ids = {word: token for token, word in reversed(list(enumerate(self.tokens))) if word}
        for token in self.special_token_ids:
            self._ids.pop(self.tokens[token], None)
        self._longest = max(map(len, self._ids), default=1)

    def __call__(self, text: str) -> list[int]:
        """Ids of text in the middle of a text, whose bytes are exactly those of the text."""
        if not isinstance(text, str):
            raise TypeError("text, not bytes")  # llguidance asks which of them is wanted
        ids = self._tokenizer.encode(text, bos=False)
        wanted = text.encode()
        return ids if b"".join(map(self.tokens.__getitem__, ids)) == wanted else list(self._greedy(wanted))

    def _greedy(self, data: bytes) -> Iterable[int]:
        """Longest words first: for tokenizers that put a space before a text."""
        at = 0
        while at < len(data):
            size = min(self._longest, len(data) - at)
            while size > 1 and data[at : at + size] not in self._ids:
                size -= 1
            token = self._ids.get(data[at : at + size])
            if token is not None:
                yield token
            at += size
