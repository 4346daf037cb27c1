"""The text to calibrate on, as windows of token ids: a text file, chats in JSONL, or what the model itself writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from svdengine.converters.split_text import SplitText, one_in_five
from svdengine.errors import ConversionError, RequestError
from svdengine.scheduling.sampling import SamplingParams

if TYPE_CHECKING:
    from svdengine.llm import LLM

Progress = Callable[[int, int], None]  # tokens sampled so far, tokens wanted

WINDOW = 256  # tokens
TOKENS = 16_384  # in all windows

# Beginnings that lead a model to different kinds of text.
OPENINGS = (
    "The history of",
    "def ",
    "Chapter 1\n\n",
    "In this paper, we",
    "Once upon a time",
    "#include <",
    "To solve the equation",
    "According to the latest report,",
    "Dear ",
    "Question: ",
    "import numpy as np\n",
    "Step 1:",
    "The patient",
    "Yesterday I",
    "<html>",
    "SELECT ",
    "Il était une fois",
    "El gobierno",
    "Ingredients:",
    "Abstract\n\n",
)
QUESTIONS = (
    "Explain how a bicycle stays upright.",
    "Write a Python function that reverses a linked list.",
    "What is 17 times 23? Show your steps.",
    "Summarise the causes of the First World War.",
    "Give me a recipe for vegetable soup.",
    "Write a short poem about the sea.",
    "What is the difference between a virus and a bacterium?",
    "Help me write an email that asks for a day off.",
    "How do I find the largest number in a list in C?",
    "A train travels 120 km in 1.5 hours. What is its average speed?",
    "Translate into French: The weather is nice today.",
    "What should I consider when I choose a laptop?",
)


def split_files(llm: LLM, paths: Sequence[Path], tokens: int = TOKENS, window: int = WINDOW) -> SplitText:
    """Windows of text files and, by the suffix .jsonl, of files of chats, in random order: the same share of each file.

    Each file is a kind of text, by its name, and has one window in five held out, about. Raises ConversionError as
    `text_windows` and `chat_windows` do.
    """
    share = max(1, tokens // len(paths))
    found: list[tuple[list[int], str]] = []
    for path in paths:
        windows = (chat_windows if path.suffix == ".jsonl" else text_windows)(llm, path, share, window)
        found += [(ids, path.name) for ids in windows]
    # Every fifth window is held out: in random order these come from all files.
    order = np.random.default_rng(0).permutation(len(found)) if len(paths) > 1 else range(len(found))
    return one_in_five([found[i][0] for i in order], [found[i][1] for i in order])


def text_windows(llm: LLM, path: Path, tokens: int = TOKENS, window: int = WINDOW) -> list[list[int]]:
    """Windows of a text file (UTF-8), spread evenly over it when it has more than `tokens` tokens.

    Raises ConversionError when the file cannot be read or is empty.
    """
    return cut_windows(llm, llm.tokenizer.encode(read_text(path), bos=False), tokens, window)


def chat_windows(llm: LLM, path: Path, tokens: int = TOKENS, window: int = WINDOW) -> list[list[int]]:
    """Windows of chats, one a line of a JSONL file: a list of messages, or an object that has it as `messages`.

    Each chat is written by the model's own template, and is cut where it is longer than a window. Raises
    ConversionError, with the line, when one is no chat.
    """
    windows: list[list[int]] = []
    for number, messages in read_chats(path):
        try:
            ids = llm.chat_template.encode(messages, add_generation_prompt=False)
        except RequestError as error:
            raise ConversionError(f"{path}, line {number}: {error}") from error
        windows += [ids[at : at + window] for at in range(0, len(ids), window)]
    windows = [w for w in windows if len(w) > 1]
    if not windows:
        raise ConversionError(f"{path}: holds no chat")
    return _spread(windows, tokens // window)


def sampled_windows(
    llm: LLM,
    tokens: int = TOKENS,
    window: int = WINDOW,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    together: int = 16,
) -> list[list[int]]:
    """Windows that the model writes itself, from openings of many kinds and, where it has a template, as a chat.

    Every other window is an answer to a question when the model has a chat template. The same seed gives the same
    windows. `together` sequences are written at once.
    """
    prompts = [llm.tokenizer.encode(text) for text in OPENINGS]
    if llm.model_file.chat_template is not None:
        chats = [llm.chat_template.encode([{"role": "user", "content": text}]) for text in QUESTIONS]
        length = max(len(prompts), len(chats))
        pairs = ((prompts[i % len(prompts)], chats[i % len(chats)]) for i in range(length))
        prompts = [prompt for pair in pairs for prompt in pair]
    count = max(1, tokens // window)
    windows: list[list[int]] = []
    for start in range(0, count, together):
        numbers = range(start, min(start + together, count))
        batch = [prompts[i % len(prompts)][: window // 2] for i in numbers]
        params = [
            SamplingParams(temperature=1.0, top_p=0.95, max_tokens=window - len(p), seed=seed + i, ignore_eos=True)
            for p, i in zip(batch, numbers, strict=True)
        ]
        done = llm.generate(batch, params)
        windows += [[*p, *completion.token_ids] for p, completion in zip(batch, done, strict=True)]
        if progress is not None:
            progress(len(windows) * window, count * window)
    return windows


def cut_windows(llm: LLM, ids: Sequence[int], tokens: int, window: int) -> list[list[int]]:
    """Cut token ids into windows, each after the beginning-of-sequence token where the model uses one."""
    bos = llm.tokenizer.bos_id
    start = [bos] if llm.tokenizer.add_bos and bos is not None else []
    size = window - len(start)
    windows = [start + list(ids[at : at + size]) for at in range(0, len(ids), size)]
    windows = [w for w in windows if len(w) > 1]
    if not windows:
        raise ConversionError("the calibration text is empty")
    return _spread(windows, tokens // window)


def _spread(windows: list[list[int]], count: int) -> list[list[int]]:
    """At most `count` windows, at even distances."""
    if len(windows) <= count:
        return windows
    return [windows[i] for i in np.linspace(0, len(windows) - 1, max(count, 1)).astype(int)]


def read_text(path: Path) -> str:
    """A UTF-8 text file. Raises ConversionError when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"{path}: cannot be read as UTF-8 text: {error}") from error


def read_chats(path: Path) -> Iterator[tuple[int, list[Any]]]:
    """Line number and messages of each chat of a JSONL file. Raises ConversionError."""
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            chat = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConversionError(f"{path}, line {number}: is not JSON: {error}") from error
        messages = chat.get("messages") if isinstance(chat, dict) else chat
        if not isinstance(messages, list) or not messages:
            raise ConversionError(f"{path}, line {number}: expected a list of messages, or an object with `messages`")
        yield number, messages
