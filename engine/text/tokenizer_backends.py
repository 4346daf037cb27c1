"""The two libraries behind the tokenizer: `tokenizers` for tokenizer.json, `sentencepiece` for tokenizer.model."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from svdengine.errors import ModelFileError
from svdengine.text.tokenizer_bounds import check_tokenizer


@dataclass(frozen=True)
class SpecialToken:
    """A control token, and whether it swallows the white space beside it."""

    id: int
    text: str
    lstrip: bool = False
    rstrip: bool = False


class Backend(Protocol):
    """Text to ids and back, without the tokens that begin or end a prompt."""

    vocab_size: int
    special_tokens: tuple[SpecialToken, ...]

    def encode(self, text: str, *, first: bool = True) -> list[int]:
        """Ids of plain text; control tokens written in it are text. `first`: it stands at the start of the prompt."""
        ...

    def encode_special(self, text: str) -> list[int] | None:
        """Ids of text whose control tokens count, or None when the library cannot do that."""
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

    def __init__(self, data: bytes) -> None:
        import tokenizers

        with _explained("tokenizer.json"):
            settings = json.loads(data)
            check_tokenizer(settings)
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
            added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = tuple(
            SpecialToken(i, t.content, t.lstrip, t.rstrip) for i, t in added.items() if t.special and t.content
        )
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

    def encode_special(self, text: str) -> list[int]:
        """See `Backend.encode_special`."""
        with self._lock, _explained("tokenizer.json"):
            self._tokenizer.encode_special_tokens = False
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], *, special: bool) -> str:
        """See `Backend.decode`."""
        with _explained("tokenizer.json"):
            return self._tokenizer.decode(list(ids), skip_special_tokens=not special)

    def token_bytes(self, token: int) -> bytes:
        """See `Backend.token_bytes`."""
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


class SentencePieceBackend:
    """A tokenizer.model. Its text to ids knows no control tokens; the caller splits the text at them."""

    def __init__(self, data: bytes) -> None:
        import sentencepiece

        if not data:
            raise ModelFileError("the model's tokenizer cannot be read (tokenizer.model): it is empty")
        with _explained("tokenizer.model"):
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=data)
            self.vocab_size = self._processor.vocab_size()
            control = [i for i in range(self.vocab_size) if self._processor.IsControl(i)]
            self.special_tokens = tuple(SpecialToken(i, self._processor.IdToPiece(i)) for i in control)
        self._control = frozenset(control)

    def encode(self, text: str, *, first: bool = True) -> list[int]:
        """See `Backend.encode`. Every part of a prompt gets the leading space, as Llama was trained."""
        with _explained("tokenizer.model"):
            return self._processor.encode(text, out_type=int, add_bos=False, add_eos=False)

    def encode_special(self, text: str) -> None:
        """Not possible with this library."""
        return None

    def decode(self, ids: Sequence[int], *, special: bool) -> str:
        """See `Backend.decode`."""
        known = [i for i in ids if 0 <= i < self.vocab_size]
        with _explained("tokenizer.model"):
            if not special or not self._control.intersection(known):
                return self._processor.decode(known)
            pieces = [self._processor.IdToPiece(i) if i in self._control else i for i in known]
            return "".join(p if isinstance(p, str) else self._processor.decode([p]) for p in pieces)

    def token_bytes(self, token: int) -> bytes:
        """See `Backend.token_bytes`."""
        return _bytes_of_piece(self._processor.IdToPiece(token)) if 0 <= token < self.vocab_size else b""


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
