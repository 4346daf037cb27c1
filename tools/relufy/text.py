"""The text to train on, as windows of token ids of one length: the user's files, and what the teacher writes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from svdengine.chat_template import ChatTemplate
from svdengine.converters.calibration_text import OPENINGS, QUESTIONS, read_chats, read_text
from svdengine.converters.checkpoint import Checkpoint
from svdengine.errors import ConversionError, RequestError, SvdEngineError
from svdengine.tokenizer import Tokenizer
from svdengine.tools.relufy.decoder import Decoder, KvCache

Windows = NDArray[np.int32]  # (windows, window)
Progress = Callable[[int, int], None]  # tokens sampled so far, tokens wanted

_HELD_OUT = 20  # one window in so many, at the end of each file
_MOST_HELD_OUT = 64  # windows, of all text
_SENTINEL = "\u2042"  # no template has it
_TOGETHER = {"cpu": 128, "cuda": 1024}  # windows sampled at once


@dataclass(frozen=True)
class Text:
    """Windows to train on, and windows that no stage sees."""

    train: Windows
    held_out: Windows


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

    def prompts(self) -> list[list[int]]:
        """Beginnings that lead the model to text of many kinds, as many of documents as of chats.

        Half of the chats begin with a question; the others leave it to the model to ask one (as in Magpie,
        arXiv:2406.08464): the prompt is what the template writes before a user's first word.
        """
        documents = [self.tokenizer.encode(text) for text in OPENINGS]
        if self.template is None:
            return documents
        chats = [self.template.encode([{"role": "user", "content": text}]) for text in QUESTIONS]
        opened = self.template.render([{"role": "user", "content": _SENTINEL}]).plain.split(_SENTINEL)[0]
        asked = self.tokenizer.encode(opened, special=True, bos=False) or documents[0]
        prompts = []
        for i in range(max(len(documents), len(chats))):
            document = documents[i % len(documents)]
            prompts += [document, chats[i % len(chats)], document, asked]
        return prompts


def read_windows(writer: Writer, paths: Sequence[Path], window: int) -> Text:
    """Windows of files, each after BOS where the model uses it; the end of each file is held out.

    Raises ConversionError when a file cannot be used or is too short.
    """
    train: list[Windows] = []
    held: list[Windows] = []
    for path in paths:
        windows = _cut(writer.tokens(path), writer.start, window)
        if len(windows) < 2:
            raise ConversionError(f"{path}: too short: expected at least two windows of {window} tokens")
        kept = max(1, len(windows) // _HELD_OUT)
        train.append(windows[:-kept])
        held.append(windows[-kept:])
    return Text(np.concatenate(train), _spread(np.concatenate(held), _MOST_HELD_OUT))


def hold_out(windows: Windows) -> Text:
    """Windows in random order, the last of them held out. Raises ConversionError when there are fewer than two."""
    if len(windows) < 2:
        raise ConversionError(f"found {len(windows)} windows of text, expected at least two")
    kept = min(max(1, len(windows) // _HELD_OUT), _MOST_HELD_OUT)
    return Text(windows[:-kept], windows[-kept:])


def joined(parts: Sequence[Text]) -> Text:
    """All text together."""
    held = np.concatenate([part.held_out for part in parts])
    return Text(np.concatenate([part.train for part in parts]), _spread(held, _MOST_HELD_OUT))


@torch.no_grad()
def sample_windows(
    model: Decoder,
    writer: Writer,
    window: int,
    seed: int,
    *,
    tokens: int | None = None,
    seconds: float = 0.0,
    progress: Progress | None = None,
) -> Windows:
    """What the model itself writes at temperature 1, in windows: `tokens` of it, or as much as comes in `seconds`.

    All rows of a batch advance by one position a step, over their prompts too, so that none waits for another.
    """
    device = model.embedding.weight.device
    prompts, together = writer.prompts(), _TOGETHER[device.type]
    generator = torch.Generator(device).manual_seed(seed)
    done: list[Windows] = []
    started, written = time.monotonic(), 0
    while written < tokens if tokens is not None else not done or time.monotonic() - started < seconds:
        rows = together if tokens is None else min(together, -(-(tokens - written) // window))
        first = sum(map(len, done))
        batch = [prompts[(first + i) % len(prompts)][: window // 2] for i in range(rows)]
        done.append(_sample(model, batch, window, generator))
        written += rows * window
        if progress is not None:
            progress(written, tokens or written)
    return np.concatenate(done)


def _sample(model: Decoder, prompts: Sequence[Sequence[int]], window: int, generator: torch.Generator) -> Windows:
    device, rows = model.embedding.weight.device, len(prompts)
    tokens = torch.full((rows, window), -1, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    tokens = tokens.to(device)
    like = model.embedding.weight.new_empty(0, dtype=torch.bfloat16)
    caches = [KvCache(rows, window, model.config, like) for _ in model.layers]
    with torch.autocast(device.type, torch.bfloat16):
        for at in range(window - 1):
            hidden = model(tokens[:, at : at + 1], caches)
            # By the cumulative distribution: torch.multinomial draws a number for each token of the vocabulary.
            chances = torch.softmax(model.head(hidden[:, 0]).float(), -1).cumsum(-1)
            at_most = torch.rand(rows, 1, device=device, generator=generator) * chances[:, -1:]
            drawn = torch.searchsorted(chances, at_most, right=True)[:, 0].clamp(max=chances.shape[1] - 1)
            tokens[:, at + 1] = torch.where(tokens[:, at + 1] < 0, drawn, tokens[:, at + 1])
    sampled: Windows = tokens.to("cpu", torch.int32).numpy()
    return sampled


def _cut(ids: Sequence[int], start: Sequence[int], window: int) -> Windows:
    size = window - len(start)
    count = len(ids) // size
    body = np.asarray(ids[: count * size], np.int32).reshape(count, size)
    return np.concatenate([np.tile(np.asarray(start, np.int32), (count, 1)), body], axis=1)


def _spread(windows: Windows, count: int) -> Windows:
    """At most `count` windows, at even distances."""
    if len(windows) <= count:
        return windows
    return windows[np.linspace(0, len(windows) - 1, count).astype(int)]
