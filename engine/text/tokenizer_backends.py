"""The two libraries behind the tokenizer: `tokenizers` for tokenizer.json, `sentencepiece` for tokenizer.model."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

from svdengine.errors import ModelFileError
from svdengine.text.tokenizer_bounds import check_tokenizer


@dataclass(frozen=True)
class SpecialToken:
    """A control token, and whether it swallows the white space beside it."""

    id: int
    text: str
    lstrip: bool = False
    rstrip: bool = False


class Span(NamedTuple):
    """A control token in a text, with the white space that it swallows."""

    start: int
    end: int
    id: int


class Backend(Protocol):
    """Text to ids and back, without the tokens that begin or end a prompt."""

    vocab_size: int  # the largest id and one; there may be ids below it that stand for nothing
    special_tokens: tuple[SpecialToken, ...]

    def encode(self, text: str, *, first: bool = True) -> list[int]:
        """Ids of plain text; control tokens written in it are text. `first`: it stands at the start of the prompt."""
        ...

    def encode_special(self, text: str) -> list[int] | None:
        """Ids of text whose control tokens count, or None when the library cannot do that."""
        ...

    def find_special(self, text: str) -> list[Span] | None:
        """Where control tokens are written in a text, or None when the library cannot tell."""
        ...

    def decode(self, ids: Sequence[int], *, special: bool) -> str:
        """Text of ids, with or without control tokens. Ids outside the vocabulary are left out."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 that one token adds in the middle of a text, which may be a part of a character."""
        ...


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn whatever the library raises on a damaged file, a Rust panic included, into ModelFileError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError, ModelFileError):
        raise
    except BaseException as error:
        raise ModelFileError(f"the model's tokenizer cannot be read ({what}): {str(error)[:200]}") from error


class JsonBackend:
    """A tokenizer.json. One object serves both readings of control tokens, under a lock."""

    def __init__(self, data: bytes, again: Mapping[str, int]) -> None:
        """`again`: text -> second id of tokens that are in the vocabulary twice, which the library does not know."""
        import tokenizers

        with _explained("tokenizer.json"):
            settings = json.loads(data)
            check_tokenizer(settings)
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            added = self._tokenizer.get_added_tokens_decoder()
            first = {i: self._tokenizer.token_to_id(text) for text, i in again.items()}
            self._first_ids = {i: known for i, known in first.items() if known is not None}
            # Not the number of texts: ids may have holes, and two of them the same text.
            self.vocab_size = 1 + max((_largest_id(settings), *added, *self._first_ids))
        self.special_tokens = tuple(
            SpecialToken(i, t.content, t.lstrip, t.rstrip) for i, t in added.items() if t.special and t.content
        )
        self._special = {token.id: token.text for token in self.special_tokens}
        self._normalized = self._tokenizer.normalizer is not None and any(t.normalized for t in added.values())
        self._data = data
        self._added = frozenset(added)  # written as they are, whatever the alphabet
        self._byte_level = any(step.get("type") == "ByteLevel" for step in _steps(settings.get("decoder")))
        self._inner: Any = None  # for text that does not stand first; made when it is needed
        self._lock = threading.Lock()

    def encode(self, text: str, *, first: bool = True) -> list[int]:
        """See `Backend.encode`."""
        with self._lock, _explained("tokenizer.json"):
            tokenizer = self._tokenizer if first else self._inner_tokenizer()
            tokenizer.encode_special_tokens = True
            return tokenizer.encode(text, add_special_tokens=False).ids

    def encode_special(self, text: str) -> list[int] | None:
        """See `Backend.encode_special`.

        The library also finds a normalised control token where the text only becomes it, such as </S> for </s>. Then
        it is None: the caller takes for found what is written exactly.
        """
        encoding = self._encode_whole(text)
        return (
            encoding.ids if not self._normalized or len(self._exact(text, encoding)) == self._count(encoding) else None
        )

    def find_special(self, text: str) -> list[Span]:
        """See `Backend.find_special`."""
        return self._exact(text, self._encode_whole(text))

    def _encode_whole(self, text: str) -> Any:
        with self._lock, _explained("tokenizer.json"):
            self._tokenizer.encode_special_tokens = False
            return self._tokenizer.encode(text, add_special_tokens=False)

    def _exact(self, text: str, encoding: Any) -> list[Span]:
        """The control tokens of an encoding that are written in its text as they are."""
        spans = (Span(start, end, id_) for id_, (start, end) in zip(encoding.ids, encoding.offsets, strict=True))
        known = (span for span in spans if span.id in self._special)
        return [span for span in known if text[span.start : span.end].strip() == self._special[span.id].strip()]

    def _count(self, encoding: Any) -> int:
        return sum(id_ in self._special for id_ in encoding.ids)

    def decode(self, ids: Sequence[int], *, special: bool) -> str:
        """See `Backend.decode`."""
        with _explained("tokenizer.json"):
            known = [self._first_ids.get(i, i) for i in ids] if self._first_ids else list(ids)
            return self._tokenizer.decode(known, skip_special_tokens=not special)

    def token_bytes(self, token: int) -> bytes:
        """See `Backend.token_bytes`."""
        token = self._first_ids.get(token, token)
        piece = self._tokenizer.id_to_token(token) or ""
        if token in self._added:
            return piece.encode()
        return b"".join(map(_bytes_of_letter, piece)) if self._byte_level else _bytes_of_piece(piece)

    def _inner_tokenizer(self) -> Any:
        """The same tokenizer, without the space that some put before the first word of a prompt only."""
        if self._inner is None:
            import tokenizers

            settings = json.loads(self._data)
            first_only = [s for s in _steps(settings.get("pre_tokenizer")) if s.get("prepend_scheme") == "first"]
            for step in first_only:
                step["prepend_scheme"] = "never"
            self._inner = tokenizers.Tokenizer.from_str(json.dumps(settings)) if first_only else self._tokenizer
        return self._inner


def _largest_id(settings: Mapping[str, Any]) -> int:
    """The largest id of the vocabulary of a tokenizer.json that the library took, or -1.

    Read in the file: the library's own table takes as long to copy as a third of the whole file takes to be read.
    """
    vocabulary = settings["model"]["vocab"]
    return max(vocabulary.values(), default=-1) if isinstance(vocabulary, dict) else len(vocabulary) - 1


class SentencePieceBackend:
    """A tokenizer.model, and tokens that were added to it. Its library knows no control tokens in a text."""

    def __init__(self, data: bytes, control: Mapping[str, int], added: Mapping[str, int]) -> None:
        """`control`: text -> id of control tokens, `added`: of others; their ids may lie beyond the library's own."""
        import sentencepiece

        if not data:
            raise ModelFileError("the model's tokenizer cannot be read (tokenizer.model): it is empty")
        with _explained("tokenizer.model"):
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=data)
            self._pieces = self._processor.vocab_size()
            controls = [i for i in range(self._pieces) if self._processor.IsControl(i)]
            self.special_tokens = tuple(SpecialToken(i, self._processor.IdToPiece(i)) for i in controls)
        self._control = {token.id: token.text for token in self.special_tokens}
        self._control |= {i: text for text, i in control.items() if text and not self._is_piece(text, i)}
        self._added = {text: i for text, i in added.items() if text and i not in self._control}
        self._added_texts = {i: text for text, i in self._added.items()}
        self.vocab_size = 1 + max((self._pieces - 1, *self._control, *self._added_texts))
        longest_first = sorted(self._added, key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None

    def encode(self, text: str, *, first: bool = True) -> list[int]:
        """See `Backend.encode`. Every part of a prompt gets the leading space, as Llama was trained."""
        ids: list[int] = []
        with _explained("tokenizer.model"):
            for part in self._pattern.split(text) if self._pattern else (text,):
                if part in self._added:
                    ids.append(self._added[part])
                elif part:
                    ids += self._processor.encode(part, out_type=int, add_bos=False, add_eos=False)
        return ids

    def encode_special(self, text: str) -> None:
        """Not possible with this library."""
        return None

    def find_special(self, text: str) -> None:
        """Not possible with this library."""
        return None

    def decode(self, ids: Sequence[int], *, special: bool) -> str:
        """See `Backend.decode`."""
        parts: list[str] = []
        run: list[int] = []  # of the library's own tokens
        for i in ids:
            text = self._added_texts.get(i) or (self._control.get(i) if special else None)
            if text is not None:
                parts += (self._run_text(run, bool(parts)), text)
                run = []
            elif 0 <= i < self._pieces and i not in self._control:
                run.append(i)
        return "".join((*parts, self._run_text(run, bool(parts))))

    def token_bytes(self, token: int) -> bytes:
        """See `Backend.token_bytes`."""
        if token in self._added_texts:
            return self._added_texts[token].encode()
        return _bytes_of_piece(self._processor.IdToPiece(token)) if 0 <= token < self._pieces else b""

    def _run_text(self, run: list[int], inside: bool) -> str:
        """Text of tokens. The library drops the first space, which only the beginning of a text has for itself."""
        if not run:
            return ""
        with _explained("tokenizer.model"):
            text = self._processor.decode(run)
            spaced = inside and self._processor.IdToPiece(run[0]).startswith("\u2581") and not text.startswith(" ")
        return " " + text if spaced else text

    def _is_piece(self, text: str, token: int) -> bool:
        """Whether a token is one of the library's own that it writes itself, such as the unknown one."""
        return token < self._pieces and self._processor.IdToPiece(token) == text


_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")


def _bytes_of_piece(piece: str) -> bytes:
    byte = _BYTE_PIECE.fullmatch(piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace("\u2581", " ").encode()


@cache
def _letter_table() -> dict[str, bytes]:
    """GPT-2's way to write bytes: printable Latin-1 letters are themselves, the others follow from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}
    return {letter: bytes([byte]) for letter, byte in letters.items()}


def _bytes_of_letter(letter: str) -> bytes:
    return _letter_table().get(letter) or letter.encode()


def _steps(part: Any) -> list[dict[str, Any]]:
    """A component of a tokenizer.json, and those that it is a sequence of."""
    if not isinstance(part, dict):
        return []
    inner = [step for name in ("pretokenizers", "decoders") for step in part.get(name, ())]
    return [step for step in (part, *inner) if isinstance(step, dict)]
