"""The text to train on, as windows of token ids of one length: the user's files, and what the teacher writes."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from svdengine.converters.calibration_text import OPENINGS, read_chats, read_text
from svdengine.converters.checkpoint import Checkpoint
from svdengine.errors import ConversionError, RequestError, SvdEngineError
from svdengine.text.chat_template import ChatTemplate
from svdengine.text.tokenizer import Tokenizer
from svdengine.tools.relufy.decoder import Decoder, KvCache
from svdengine.tools.relufy.precision import compute_dtype, mixed_precision
from svdengine.tools.relufy.questions import questions

Tokens = NDArray[np.int32]  # (windows, window)
Progress = Callable[[int, int], None]  # tokens sampled so far, tokens wanted

_HELD_OUT = 20  # one window in so many, at the end of each file
_MOST_HELD_OUT = 64  # windows, of all text
_SENTINEL = "\u2042"  # no template has it
_ANSWER_TEMPERATURE = 0.7  # of answers to questions: at 1 a small model says too much that is not so
_LEAST_ANSWER = 16  # tokens that a window must have left for the answer to another prompt
_TOGETHER = {"cpu": 128, "cuda": 1024}  # windows sampled at once


@dataclass(frozen=True)
class Windows:
    """Text in pieces of one length."""

    tokens: Tokens
    given: NDArray[np.bool_]  # (windows, window): tokens of prompts and templates, which nobody has to foretell

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> Windows:
        return Windows(self.tokens[rows], self.given[rows])

    @property
    def foretold(self) -> NDArray[np.bool_]:
        """(windows, window): after which tokens a model has to foretell the next one, though a window may end there."""
        return ~np.concatenate([self.given[:, 1:], self.given[:, -1:]], axis=1)


@dataclass(frozen=True)
class Text:
    """Windows to train on, and windows that no stage sees."""

    train: Windows
    held_out: Windows


@dataclass(frozen=True)
class Prompt:
    """The beginning of a text that a model goes on with."""

    tokens: list[int]
    temperature: float = 1.0
    then: Prompt | None = None  # where the text ends; None: the next text begins
    turn: list[int] | None = None  # instead of `tokens` after another text: the next turn of a conversation


class Writer:
    """Tokenizer and, where there is one, chat template of a checkpoint. Raises SvdEngineError where it has neither."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        stored = checkpoint.tokenizer
        if stored.info.kind == "none":
            raise SvdEngineError(f"{checkpoint.path}: has no tokenizer, so no text can be used")
        self.tokenizer = Tokenizer(stored.info, stored.data)
        self.template = ChatTemplate(stored.chat_template, self.tokenizer) if stored.chat_template else None
        self.start = [stored.info.bos_id] if stored.info.add_bos and stored.info.bos_id is not None else []

    def tokens(self, path: Path) -> list[int]:
        """All tokens of a UTF-8 text file, or of the chats in a .jsonl file. Raises ConversionError."""
        if path.suffix != ".jsonl":
            return self.tokenizer.encode(read_text(path), bos=False)
        if self.template is None:
            raise ConversionError(f"{path}: the model has no chat template to write chats with; give plain text")
        ids: list[int] = []
        for number, messages in read_chats(path):
            try:
                ids += self.template.encode(messages, add_generation_prompt=False)
            except RequestError as error:
                raise ConversionError(f"{path}, line {number}: {error}") from error
        return ids

    def prompts(self, seed: int, *, held_out: bool = False) -> list[Prompt]:
        """Beginnings of texts of many kinds: of chats where the model has a template, else of documents.

        Half of the chats begin with a question (`questions.py`), of which a twentieth is kept for held-out text. The
        others leave it to the model to ask one (as in Magpie, arXiv:2406.08464): the prompt is what the template
        writes before a user's first word. After an answer a conversation goes on with the next question.
        """
        if self.template is None:
            return [Prompt(self.tokenizer.encode(text)) for text in OPENINGS]
        chats = [
            Prompt(
                self.template.encode([{"role": "user", "content": text}]),
                _ANSWER_TEMPERATURE,
                turn=self._turn(self.template, text),
            )
            for number, text in enumerate(questions(seed))
            if (number % _HELD_OUT == 0) == held_out
        ]
        asked = self._asked(self.template)
        return chats if asked is None else [prompt for chat in chats for prompt in (chat, asked)]

    def _asked(self, template: ChatTemplate) -> Prompt | None:
        """A chat of which the model writes both the question and the answer; None where a template has nothing around
        a message that would lead it to do so."""
        before, _, after = template.render([{"role": "user", "content": _SENTINEL}]).plain.partition(_SENTINEL)
        begin, rest = self.tokenizer.encode(before, special=True, bos=False), self._after_end(after)
        if not begin or not rest:
            return None
        return Prompt(begin, then=Prompt(rest, _ANSWER_TEMPERATURE), turn=self._turn(template, _SENTINEL))

    def _turn(self, template: ChatTemplate, question: str) -> list[int] | None:
        """What the template writes between the end of an answer and the answer to the next question, or, for
        _SENTINEL, that question; None where it does not go on so."""
        messages = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": _SENTINEL},
            {"role": "user", "content": question},
        ]
        try:
            _, *parts = template.render(messages).plain.split(_SENTINEL)
        except RequestError:
            return None
        return self._after_end(parts[0]) or None if parts else None

    def _after_end(self, text: str) -> list[int]:
        """Tokens of what a template writes after a message, without the message's end: the model has written it."""
        ids = self.tokenizer.encode(text, special=True, bos=False)
        end = next((i for i, token in enumerate(ids) if token in self.tokenizer.eos_token_ids), -1)
        return ids[end + 1 :]


def read_windows(writer: Writer, paths: Sequence[Path], window: int) -> Text:
    """Windows of files, each after BOS where the model uses it; the end of each file is held out.

    Raises ConversionError when a file cannot be used or is too short.
    """
    train: list[Windows] = []
    held: list[Windows] = []
    for path in paths:
        tokens = _cut(writer.tokens(path), writer.start, window)
        windows = Windows(tokens, np.zeros(tokens.shape, np.bool_))
        if len(windows) < 2:
            raise ConversionError(f"{path}: too short: expected at least two windows of {window} tokens")
        kept = max(1, len(windows) // _HELD_OUT)
        train.append(windows[:-kept])
        held.append(windows[-kept:])
    return _text(train, held)


def joined(parts: Sequence[Text]) -> Text:
    """All text together."""
    return _text([part.train for part in parts], [part.held_out for part in parts])


class Sampling:
    """Text that a model itself writes after prompts, a batch of windows at a time.

    All rows of a batch advance by one position a step, over their prompts too, so that none waits for another.
    """

    def __init__(self, model: Decoder, writer: Writer, window: int, seed: int, *, held_out: bool = False) -> None:
        """held_out: it answers questions that other text never asks."""
        device = model.embedding.weight.device
        self._model, self._window, self._ends = model, window, writer.tokenizer.eos_token_ids
        self._prompts = writer.prompts(seed, held_out=held_out)
        self._used = 0  # prompts
        self._generator = torch.Generator(device).manual_seed(2 * seed + held_out)
        self._done = torch.empty(0, window, dtype=torch.int32)
        self._given = torch.empty(0, window, dtype=torch.bool)

    @property
    def windows(self) -> Windows:
        """What is written; given is what prompts and template gave, and the model did not write."""
        return Windows(self._done.numpy(), self._given.numpy())

    def write(self, tokens: int | None, seconds: float = 0.0, progress: Progress | None = None) -> None:
        """Write on until there are so many tokens; None: for about `seconds`, but a batch at least.

        progress is called after each batch with the tokens so far, and those wanted.
        """
        together = _TOGETHER[self._model.embedding.weight.device.type]
        started = time.monotonic()
        while self._done.numel() < tokens if tokens is not None else self._has_time(started, seconds):
            rows = together
            if tokens is not None:
                rows = min(together, -(-(tokens - self._done.numel()) // self._window))
            sampled, given = _sample(self._model, self._upcoming(), rows, self._window, self._generator, self._ends)
            self._done, self._given = torch.cat([self._done, sampled]), torch.cat([self._given, given])
            if progress is not None:
                progress(self._done.numel(), tokens or self._done.numel())

    def state(self) -> dict[str, Any]:
        """What `load` needs to go on."""
        generator = self._generator.get_state()
        return {"windows": self._done, "given": self._given, "used": self._used, "generator": generator}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._done, self._given, self._used = state["windows"], state["given"], state["used"]
        self._generator.set_state(state["generator"])

    def _has_time(self, started: float, seconds: float) -> bool:
        return not len(self._done) or time.monotonic() - started < seconds

    def _upcoming(self) -> Iterator[Prompt]:
        while True:
            self._used += 1
            yield self._prompts[(self._used - 1) % len(self._prompts)]


def held_out_count(windows: int) -> int:
    """How many windows are held out besides so many to train on."""
    return min(max(1, windows // _HELD_OUT), _MOST_HELD_OUT)


@torch.no_grad()
def _sample(
    model: Decoder, prompts: Iterator[Prompt], rows: int, window: int, generator: torch.Generator, ends: Collection[int]
) -> tuple[Tensor, Tensor]:
    """Windows (int32) that begin with prompts; where a text ends, its prompt's `then` goes on, or else the next prompt,
    if it has room. And which of their tokens are of prompts (bool). Both on the CPU."""
    device = model.embedding.weight.device
    tokens = torch.full((rows, window), -1, device=device)
    fixed = torch.zeros(rows, window, dtype=torch.bool)
    temperatures = torch.ones(rows, 1, device=device)
    then: list[Prompt | None] = [None] * rows
    end_tokens = torch.tensor(sorted(ends), device=device)

    def begin(row: int, at: int, prompt: Prompt, given: list[int], most: int) -> None:
        ids = torch.tensor(given[:most], device=device)
        tokens[row, at : at + len(ids)], temperatures[row], then[row] = ids, prompt.temperature, prompt.then
        fixed[row, at : at + len(ids)] = True

    for row in range(rows):
        prompt = next(prompts)
        begin(row, 0, prompt, prompt.tokens, max(1, window // 2))
    like = model.embedding.weight.new_empty(0, dtype=compute_dtype(device.type))
    caches = [KvCache(rows, window, model.config, like) for _ in model.layers]
    with mixed_precision(device):
        for at in range(window - 1):
            hidden = model(tokens[:, at : at + 1], caches)
            # By the cumulative distribution: torch.multinomial draws a number for each token of the vocabulary.
            chances = torch.softmax(model.head(hidden[:, 0]).float() / temperatures, -1).cumsum(-1)
            at_most = torch.rand(rows, 1, device=device, generator=generator) * chances[:, -1:]
            drawn = torch.searchsorted(chances, at_most, right=True)[:, 0].clamp(max=chances.shape[1] - 1)
            free = tokens[:, at + 1] < 0
            tokens[:, at + 1] = torch.where(free, drawn, tokens[:, at + 1])
            ended = free & torch.isin(tokens[:, at + 1], end_tokens)
            for row in ended.nonzero()[:, 0].tolist():
                second, room = then[row], window - at - 2
                prompt = second or next(prompts)
                given = prompt.tokens if second or prompt.turn is None else prompt.turn
                if len(given) < room - _LEAST_ANSWER:
                    begin(row, at + 2, prompt, given, room)
    return tokens.to("cpu", torch.int32), fixed


def _cut(ids: Sequence[int], start: Sequence[int], window: int) -> Tokens:
    size = window - len(start)
    count = len(ids) // size
    body = np.asarray(ids[: count * size], np.int32).reshape(count, size)
    return np.concatenate([np.tile(np.asarray(start, np.int32), (count, 1)), body], axis=1)


def _text(train: Sequence[Windows], held: Sequence[Windows]) -> Text:
    """All parts together, but of what is held out at most so much, at even distances."""
    held_out = _concatenated(held)
    if len(held_out) > _MOST_HELD_OUT:
        held_out = held_out[np.linspace(0, len(held_out) - 1, _MOST_HELD_OUT).astype(int)]
    return Text(_concatenated(train), held_out)


def _concatenated(parts: Sequence[Windows]) -> Windows:
    return Windows(np.concatenate([part.tokens for part in parts]), np.concatenate([part.given for part in parts]))
