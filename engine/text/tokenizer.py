"""The tokenizer: text to token ids and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from svdengine.errors import ModelFileError, RequestError
from svdengine.text.tokenizer_backends import Backend, JsonBackend, SentencePieceBackend, Span, SpecialToken

Prompt = str | Sequence[int] | NDArray[np.integer[Any]]  # an array: (n,)


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several as a list. Raises RequestError."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise RequestError(f"prompts must be texts or lists of token ids, found {type(prompts).__name__}")
    batch = list(prompts)
    if not batch:
        raise RequestError("there is no prompt")
    if all(isinstance(p, int | np.integer) and not isinstance(p, bool) for p in batch):
        return [[int(p) for p in batch]]
    return batch


def token_list(tokens: Any) -> list[int]:
    """Token ids as a list of int. Raises RequestError on anything else."""
    if isinstance(tokens, np.ndarray):
        tokens = tokens.tolist()
    if isinstance(tokens, str | bytes) or not isinstance(tokens, Iterable):
        raise RequestError(f"token ids must be a list of whole numbers, found {type(tokens).__name__}")
    ids = list(tokens)
    if any(isinstance(t, bool) or not isinstance(t, int | np.integer) for t in ids):
        raise RequestError("token ids must be whole numbers")
    return [int(t) for t in ids]


if TYPE_CHECKING:
    from svdengine.text.tokenizer_info import TokenizerInfo


class Tokenizer:
    """Wraps the tokenizer that the model file carries. Safe to use from several threads.

    Raises ModelFileError when the file's tokenizer is damaged, and on use when the model has none.
    """

    def __init__(self, info: TokenizerInfo, data: bytes) -> None:
        self._backend: Backend | None = None
        if info.kind == "tokenizer.json":
            self._backend = JsonBackend(data, info.added_tokens)
        elif info.kind == "tokenizer.model":
            self._backend = SentencePieceBackend(data, info.special_tokens, info.added_tokens)
        self._size = self._backend.vocab_size if self._backend else 0
        self.bos_id = info.bos_id
        self.eos_id = info.eos_id
        self._unnamed = frozenset(info.unnamed)
        self.template_tokens = dict(info.template_tokens)
        self.eos_token_ids = frozenset(info.eos_token_ids)
        self.add_bos = info.add_bos and info.bos_id is not None
        self._specials = _by_text(self._backend, info.special_tokens)
        texts = sorted(self._specials, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, texts))) if texts else None
        self._texts = {token.id: token.text for token in self._specials.values()}

    @property
    def special_texts(self) -> tuple[str, ...]:
        """How control tokens are written, for example "<|im_end|>"."""
        return tuple(self._specials)

    @property
    def vocab_size(self) -> int:
        """Tokens that the tokenizer knows; the model's own vocabulary may be padded to more."""
        return self._require().vocab_size

    def encode(
        self, text: str, special: bool = False, *, bos: bool = True, literals: Mapping[str, str] | None = None
    ) -> list[int]:
        """Token ids of `text`, after the beginning-of-sequence token where the model wants one and `bos` is true.

        A control token that is written in the text is text, unless `special` is true. With `special`, `literals` maps
        single characters to the text that they stand for, which stays text in any case.
        Raises RequestError when `text` is no string.
        """
        if not isinstance(text, str):
            raise RequestError(f"a prompt must be a string, found {type(text).__name__}")
        backend = self._require()
        text = text.encode("utf-8", "replace").decode()  # a lone surrogate has no UTF-8
        if not text:
            ids = []
        elif not special:
            ids = backend.encode(text)
        else:
            whole = backend.encode_special(text) if not literals else None
            ids = self._encode_parts(backend, text, literals or {}) if whole is None else whole
        if bos and self.add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """Text of token ids; control tokens are left out unless `special` is true. Broken UTF-8 becomes U+FFFD."""
        return self._require().decode([int(i) for i in ids], special=special)

    def token_text(self, token: int) -> str:
        """Text that one token adds in the middle of a sentence, control tokens included."""
        if token in self._texts:
            return self._texts[token]
        once, twice = self.decode([token]), self.decode([token, token])
        return twice[len(once) :] if twice.startswith(once) else once

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 that one token adds in the middle of a text, which may be a part of a character."""
        if token in self._texts:
            return self._texts[token].encode()
        return self._require().token_bytes(token)

    def tokens_with(self, texts: Iterable[str]) -> frozenset[int]:
        """The tokens whose own text holds one of these."""
        parts = [text.encode("utf-8", "replace") for text in texts]
        return frozenset(t for t in range(self.vocab_size) if any(part in self.token_bytes(t) for part in parts))

    def is_silent(self, token: int) -> bool:
        """Whether the token adds nothing to decoded text: a control token, or one that the tokenizer does not know."""
        return token in self._texts or not 0 <= token < self._size

    def special_text(self, token: int | None) -> str:
        """How a control token is written, or "" when the id is none."""
        return self._texts.get(token, "") if token is not None else ""

    def named_id(self, role: str) -> int | None:
        """The id of "bos" or "eos" where the tokenizer itself has a name for it, and not only the model."""
        return None if role in self._unnamed else self.bos_id if role == "bos" else self.eos_id

    def _encode_parts(self, backend: Backend, text: str, literals: Mapping[str, str]) -> list[int]:
        """Split at the control tokens; between them is plain text, in which literals get their meaning back."""
        table = {ord(mark): meaning for mark, meaning in literals.items()}
        ids: list[int] = []
        start = 0
        for span in self._special_spans(backend, text):
            part = text[start : span.start].translate(table)
            ids += [*(backend.encode(part, first=start == 0) if part else ()), span.id]
            start = span.end
        part = text[start:].translate(table)
        return ids + (backend.encode(part, first=start == 0) if part else [])

    def _special_spans(self, backend: Backend, text: str) -> list[Span]:
        """Where control tokens are written: as the library says, so that no other text decides about them."""
        found = backend.find_special(text)
        if found is None:
            matches = self._pattern.finditer(text) if self._pattern else ()
            found = [Span(*match.span(), self._specials[match.group()].id) for match in matches]
        return found

    def _require(self) -> Backend:
        if self._backend is None:
            raise ModelFileError("this model file has no tokenizer; give token ids, or convert the model with its own")
        return self._backend


def _by_text(backend: Backend | None, more: Mapping[str, int]) -> dict[str, SpecialToken]:
    """Control tokens by how they are written: the library's, and those that the model file adds."""
    tokens = {text: SpecialToken(token, text) for text, token in more.items() if text}
    tokens.update({token.text: token for token in (backend.special_tokens if backend else ()) if token.text})
    return tokens
