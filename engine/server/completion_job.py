"""Completions of plain text: /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from svdengine.errors import ContextOverflowError, GrammarError
from svdengine.llm import LLM
from svdengine.scheduling.completion import Completion
from svdengine.scheduling.request import Generation, ScoredGeneration
from svdengine.scheduling.sampling import SamplingParams
from svdengine.server.api_error import ApiError, context_overflow, unsupported
from svdengine.server.body import Body
from svdengine.server.framing import DATA_EVENTS
from svdengine.server.job import Head, Object, StreamOptions, check_model, take_stream_options, usage
from svdengine.server.layer_shares import keep_layers, with_layers
from svdengine.server.logprobs import LogprobTrail
from svdengine.server.request_loop import Update
from svdengine.server.sampling_fields import (
    MAX_TOP_LOGPROBS,
    changed,
    choice_params,
    take_choices,
    take_length,
    take_neutral,
    take_sampling,
)
from svdengine.server.token_fields import take_special

MAX_PROMPTS = 64
_DEFAULT_LENGTH = 16  # tokens, as OpenAI documents it

_IGNORED = ("user",)
_UNSUPPORTED = ("suffix", "best_of")


class CompletionJob:
    """Completions of one prompt or several."""

    framing = DATA_EVENTS
    prompt_field = "prompt"

    def __init__(self, llm: LLM, name: str, value: Any) -> None:
        """`name`: what the model is called; `value`: the body. Raises ApiError or RequestError."""
        body = Body(value)
        check_model(body, name)
        prompts = _prompts(body)
        self.options: StreamOptions = take_stream_options(body)
        self._choices = take_choices(body)
        echo = bool(body.take("echo", bool))
        params = take_sampling(body, llm.default_params)
        length = body.take_any("max_tokens")
        generate = not (echo and type(length) is int and length == 0)  # else: only to see the prompt's logprobs
        params = take_length(params, (_DEFAULT_LENGTH if length is None else length) if generate else 1)
        params = _take_logprobs(body, params)
        params = changed(params, "response_format", body.take_any("response_format"))
        scored = echo and (params.logprobs is not None or not generate)
        if scored and self.options.stream:
            raise unsupported("stream", " together with logprobs of the prompt (echo)")
        body.only("best_of", self._choices)
        body.only("suffix", "")
        take_neutral(body)
        bos, special = take_special(body)
        shift = bool(body.take("context_shift", bool))
        body.ignore(*_IGNORED)
        body.finish(_UNSUPPORTED)
        each = [choice_params(params, i) for i in range(self._choices)]
        try:
            ids = [_tokens(llm, prompt, bos, special) for prompt in prompts]
            self.requests: list[Generation] = [
                _scored(llm, tokens, one, generate) if scored else llm.prepare(tokens, one, context_shift=shift)
                for tokens in ids
                for one in each
            ]
        except ContextOverflowError as error:
            raise context_overflow(error, "prompt") from error
        except GrammarError as error:
            raise ApiError(400, str(error), "response_format", "invalid_value") from error
        keep_layers(self.requests, self.options)
        self._head = Head("text_completion", name)
        self._echoes = [_text(llm, prompt) if echo else "" for prompt in prompts for _ in each]
        self._prompts = [request.sequence.tokens[:] for request in self.requests]
        self._trails = [
            LogprobTrail(llm.tokenizer, tokens, len(text)) if params.logprobs is not None else None
            for tokens, text in zip(self._prompts, self._echoes, strict=True)
        ]
        self._scored = scored

    def opening(self) -> list[Object]:
        """See `Job.opening`."""
        return [self._piece(i, text) for i, text in enumerate(self._echoes) if text]

    def pieces(self, index: int, update: Update) -> list[Object]:
        """See `Job.pieces`."""
        trail = self._trails[index]
        entries = trail.push(update.logprobs, update.text) if trail else []
        reason = update.completion.finish_reason if update.completion is not None else None
        if not (update.text or entries or reason or update.layers):
            return []
        piece = self._piece(index, update.text, trail.completion_shape(entries) if trail else None, reason)
        return [with_layers(piece, update.layers) if update.layers else piece]

    def closing(self, completions: Sequence[Completion]) -> list[Object]:
        """See `Job.closing`."""
        if not self.options.include_usage:
            return []
        return [{**self._head.object(), "choices": [], "usage": usage(completions, self._choices)}]

    def answer(self, completions: Sequence[Completion]) -> Object:
        """See `Job.answer`."""
        choices = []
        for index, completion in enumerate(completions):
            trail = self._trails[index]
            entries = trail.push(completion.logprobs or (), completion.text) if trail else []
            if self._scored and trail:
                entries += trail.rest()
            shape = trail.completion_shape(entries) if trail else None
            before = self._prompt_shape(index)
            if shape is not None and before is not None:
                shape = {name: before[name] + values for name, values in shape.items()}
            text = self._echoes[index] + completion.text
            choices.append(_choice(index, text, shape, completion.finish_reason))
        return {**self._head.object(), "choices": choices, "usage": usage(completions, self._choices)}

    def _prompt_shape(self, index: int) -> Object | None:
        """Log-probabilities of a prompt, where they were asked for."""
        request, trail = self.requests[index], self._trails[index]
        if trail is None or not isinstance(request, ScoredGeneration):
            return None
        return trail.prompt_shape(self._prompts[index], request.prompt_logprobs)

    def _piece(self, index: int, text: str, logprobs: Object | None = None, reason: str | None = None) -> Object:
        piece = {**self._head.object(), "choices": [_choice(index, text, logprobs, reason)]}
        return {**piece, "usage": None} if self.options.include_usage else piece


def _choice(index: int, text: str, logprobs: Object | None, reason: str | None) -> Object:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _prompts(body: Body) -> list[str | list[int]]:
    prompt = body.take_any("prompt")
    if prompt is None:
        raise ApiError(400, "prompt is missing", "prompt", "missing_required_parameter")
    if isinstance(prompt, str) or _is_tokens(prompt):
        return [prompt]
    if not isinstance(prompt, list) or not all(isinstance(p, str) or _is_tokens(p) for p in prompt):
        raise ApiError(400, "prompt must be a string, a list of token ids, or a list of these", "prompt")
    if not 1 <= len(prompt) <= MAX_PROMPTS:
        raise ApiError(400, f"1 to {MAX_PROMPTS} prompts can be given, found {len(prompt)}", "prompt")
    return prompt


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _take_logprobs(body: Body, params: SamplingParams) -> SamplingParams:
    top = body.take_any("logprobs")
    top = None if top is False else top  # as a chat says that it wants none
    if top is not None and type(top) is not int:
        raise ApiError(400, "logprobs must be a whole number", "logprobs")
    if top is not None and not 0 <= top <= MAX_TOP_LOGPROBS:
        message = f"logprobs must lie between 0 and {MAX_TOP_LOGPROBS}, found {top}"
        raise ApiError(400, message, "logprobs", "invalid_value")
    return changed(params, "logprobs", top)


def _tokens(llm: LLM, prompt: str | list[int], bos: bool | None, special: bool | None) -> list[int]:
    """A prompt's token ids. A control token that is written in a text is text, unless `special` says otherwise."""
    if not isinstance(prompt, str):
        return prompt
    if not prompt:
        raise ApiError(400, "the prompt is empty", "prompt", "invalid_value")
    return llm.tokenizer.encode(prompt, bool(special), bos=bos is not False)


def _text(llm: LLM, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else llm.tokenizer.decode(prompt)


def _scored(llm: LLM, tokens: list[int], params: SamplingParams, generate: bool) -> Generation:
    if params.logprobs is None:  # they are read, and not told
        params = changed(params, "logprobs", 0)
    return llm.prepare_scored(tokens, params, generate=generate)
