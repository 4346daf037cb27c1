"""What a program asks for becomes a request: prompts and conversations to tokens, with limits and constraints."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from svdengine.errors import RequestError, SvdEngineError, shown
from svdengine.files.model_file import ModelFile
from svdengine.scheduling.constraint import Constraint, ConstraintMaker
from svdengine.scheduling.embedding import Embedding, Pooling
from svdengine.scheduling.request import ContextLimit, Generation, ScoredGeneration
from svdengine.scheduling.sampling import SamplingParams
from svdengine.text.stream_decoder import StreamDecoder
from svdengine.text.tokenizer import Prompt, Tokenizer, token_list

if TYPE_CHECKING:
    from svdengine.text.chat_template import ChatTemplate, Message

_MOST_BREAKERS = 64  # sets of tokens that are remembered


class RequestMaker:
    """Makes the requests of one model; several threads may use it at a time."""

    def __init__(self, model_file: ModelFile, tokenizer: Tokenizer, context: int) -> None:
        """`context`: most tokens of one sequence."""
        self._file = model_file
        self._tokenizer = tokenizer
        self._context = context
        self._template: ChatTemplate | None = None
        self._breakers: dict[tuple[str, ...], frozenset[int]] = {}
        self._constraints: ConstraintMaker | None = None  # made when a request first has a grammar
        self._constraint_maker: Callable[[Tokenizer, int], ConstraintMaker] = ConstraintMaker
        self._making = threading.Lock()

    def read_with(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        constraints: Callable[[Tokenizer, int], ConstraintMaker],
    ) -> None:
        """See `LLM.read_with`."""
        with self._making:
            self._tokenizer, self._template = tokenizer, template
            self._constraints, self._constraint_maker = None, constraints

    @property
    def chat_template(self) -> ChatTemplate:
        """The model's chat template. Raises RequestError when it has none, ModelFileError when it is damaged."""
        if self._template is None:
            source = self._file.chat_template
            if source is None:
                raise RequestError("this model has no chat template; it can only complete text (generate)")
            from svdengine.text.chat_template import ChatTemplate

            self._template = ChatTemplate(source, self._tokenizer)
        return self._template

    def complete(self, prompt: Prompt, params: SamplingParams, *, special: bool, shift: bool) -> Generation:
        """A completion of a prompt. Raises RequestError when it cannot be used."""
        tokens = self._prompt_tokens(prompt, special)
        keep = 1 if tokens[:1] == [self._tokenizer.bos_id] else 0
        return self._generation(tokens, params, shift, keep, tokens)

    def answer(
        self, messages: Sequence[Message], params: SamplingParams, variables: Mapping[str, Any], *, shift: bool
    ) -> Generation:
        """An answer to a conversation; `variables` are for the chat template. Raises RequestError."""
        extra = dict(variables)
        tokens = self.chat_template.encode(messages, **extra)
        keep = self._system_length(messages, tokens, extra) if shift else 0
        return self._generation(tokens, params, shift, keep, ())

    def score(self, prompt: Prompt, params: SamplingParams, *, generate: bool) -> ScoredGeneration:
        """A completion with the log-probabilities of the prompt's tokens. Raises RequestError."""
        tokens = self._prompt_tokens(prompt, False)
        return ScoredGeneration(tokens, params, generate=generate, **self._options(params, False, 0, tokens))

    def embed(self, text: Prompt, pooling: Pooling, *, cut: bool) -> Embedding:
        """The embedding of a text; `cut`: what exceeds the context is left out. Raises RequestError."""
        tokens = self._prompt_tokens(text, False)
        if cut:
            tokens = tokens[: self._context]
        return Embedding(
            tokens,
            pooling,
            context=self._context,
            vocab_size=self._file.config.vocab_size,
            end_tokens=frozenset(),
            decoder=None,
        )

    def _prompt_tokens(self, prompt: Prompt, special: bool) -> list[int]:
        if not isinstance(special, bool):
            raise RequestError(f"special must be true or false, found {shown(special)}")
        if not isinstance(prompt, str):
            return token_list(prompt)
        if not prompt:
            raise RequestError("the prompt is empty")
        return self._tokenizer.encode(prompt, special=special)

    def _generation(
        self, tokens: list[int], params: SamplingParams, shift: bool, keep: int, context: Sequence[int]
    ) -> Generation:
        return Generation(tokens, params, **self._options(params, shift, keep, context))

    def _options(self, params: SamplingParams, shift: bool, keep: int, context: Sequence[int]) -> dict[str, Any]:
        has_text = self._file.tokenizer_info.kind != "none"
        if params.stop and not has_text:
            raise RequestError("stop strings need a tokenizer, which this model file lacks; use stop_token_ids")
        return {
            "vocab_size": self._file.config.vocab_size,
            "end_tokens": self._tokenizer.eos_token_ids,
            "limit": ContextLimit(self._context, shift, keep),
            "decoder": StreamDecoder(self._tokenizer, context) if has_text else None,
            "constraint": self._constraint(params),
            "breakers": self._breaking(params),
        }

    def _breaking(self, params: SamplingParams) -> frozenset[int]:
        """The tokens that hold one of the texts that end a repetition, where DRY asks for them."""
        texts = params.dry_sequence_breakers
        if not params.dry_multiplier or not texts:
            return frozenset()
        with self._making:
            if texts not in self._breakers:
                if len(self._breakers) == _MOST_BREAKERS:  # texts of requests: anything may be asked for
                    self._breakers.clear()
                self._breakers[texts] = self._tokenizer.tokens_with(texts)
        return self._breakers[texts]

    def _constraint(self, params: SamplingParams) -> Constraint | None:
        if params.grammar is None:
            return None
        with self._making:
            if self._constraints is None:
                self._constraints = self._constraint_maker(self._tokenizer, self._file.config.vocab_size)
        return self._constraints.make(params.grammar)

    def _system_length(self, messages: Sequence[Message], tokens: list[int], extra: dict[str, Any]) -> int:
        """Tokens before the first turn: what the conversation shares with one of its system and last messages only."""
        from svdengine.text.chat_template import check_messages

        check_messages(messages)
        system = [m for m in messages[:-1] if m["role"] == "system"]
        try:
            short = self.chat_template.encode([*system, messages[-1]], **extra)
        except SvdEngineError:
            return 0
        same = 0
        while same < min(len(short), len(tokens)) and short[same] == tokens[same]:
            same += 1
        return same if same < len(tokens) else 0
