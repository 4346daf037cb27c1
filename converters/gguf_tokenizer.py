"""Rebuild a tokenizer from the fields of a GGUF file."""

from __future__ import annotations

import sys
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer

from svdengine.converters.byte_level_bpe import PRE_TOKENIZERS, build_byte_level, split_merges
from svdengine.converters.sentencepiece_bpe import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    build_sentencepiece,
)
from svdengine.converters.turn_end import END_TEXTS, with_turn_end
from svdengine.files.model_writer import StoredTokenizer
from svdengine.text.tokenizer_info import TokenizerInfo

# Variables of chat templates besides bos_token and eos_token; the separator is spelled as in the format.
_TEMPLATE_FIELDS = {
    "unk_token": "unknown",
    "sep_token": "seperator",
    "pad_token": "padding",
    "cls_token": "cls",
    "mask_token": "mask",
}
_END_FIELDS = ("eos_token_id", "eot_token_id", "eom_token_id")


@dataclass(frozen=True)
class _PreOfVocabulary:
    """A pre-tokenizer, and the vocabularies that it belongs to: by their size, or by tokens that no other has."""

    name: str
    architectures: tuple[str, ...]
    counts: Container[int]
    tokens: frozenset[str]


_PRE_OF_VOCABULARY = (
    _PreOfVocabulary("llama-bpe", ("llama",), (128_256,), frozenset({"<|begin_of_text|>", "<|end_of_text|>"})),
    _PreOfVocabulary("tekken", ("llama",), (), frozenset({"[INST]", "[TOOL_CALLS]", "<SPECIAL_20>"})),
    _PreOfVocabulary("smollm", ("llama",), (49_152,), frozenset({"<|endoftext|>", "<repo_name>", "<jupyter_start>"})),
    _PreOfVocabulary(
        "qwen2", ("qwen2", "qwen3"), range(151_643, 152_065), frozenset({"<|endoftext|>", "<|im_start|>"})
    ),
    _PreOfVocabulary("falcon", ("falcon",), (65_024,), frozenset({">>TITLE<<", ">>ABSTRACT<<"})),
)


@dataclass(frozen=True)
class _Vocabulary:
    """The token lists of the file; a token's id is its index."""

    texts: list[str]
    types: list[int]

    def added(self) -> list[AddedToken]:
        """Tokens that are found in text before it is cut: control tokens (special) and user-defined ones."""
        result = []
        for text, kind in zip(self.texts, self.types, strict=True):
            if text and kind in (UNKNOWN, CONTROL, USER_DEFINED):
                result.append(AddedToken(text, special=kind != USER_DEFINED, normalized=False))
        return result


def read_gguf_tokenizer(fields: Mapping[str, Any], vocab_size: int) -> StoredTokenizer:
    """The tokenizer of a GGUF file as tokenizer.json. Raises ValueError when it is missing or of an unknown kind."""
    model = fields.get("tokenizer.ggml.model")
    vocabulary = _vocabulary(fields, vocab_size)
    if model == "gpt2":
        tokenizer, add_bos = _byte_level(fields, vocabulary)
    elif model == "llama":
        tokenizer, add_bos = _sentencepiece(fields, vocabulary), True
    else:
        raise ValueError(f"the tokenizer {str(model)[:40]!r} is not supported, only gpt2 and llama")
    template = fields.get("tokenizer.chat_template")
    stored = StoredTokenizer(
        _info(fields, vocabulary, add_bos, model == "llama"),
        tokenizer.to_str().encode("utf-8"),
        template if isinstance(template, str) and template else None,
    )
    return with_turn_end(stored)


def _vocabulary(fields: Mapping[str, Any], vocab_size: int) -> _Vocabulary:
    texts = _list(fields, "tokens", str)
    if not texts:
        raise ValueError("the file has no tokenizer (tokenizer.ggml.tokens)")
    if len(texts) > vocab_size:
        raise ValueError(f"the tokenizer has {len(texts)} tokens, the embedding only {vocab_size} rows")
    types = _list(fields, "token_type", int) or [NORMAL] * len(texts)
    if len(types) != len(texts):
        raise ValueError(f"tokenizer.ggml.token_type has {len(types)} entries, expected {len(texts)}")
    types = [CONTROL if text in END_TEXTS else kind for text, kind in zip(texts, types, strict=True)]
    return _Vocabulary(texts, types)


def _byte_level(fields: Mapping[str, Any], vocabulary: _Vocabulary) -> tuple[Tokenizer, bool]:
    """The tokenizer, and whether it begins with BOS when the file does not say."""
    name = fields.get("tokenizer.ggml.pre") or _inferred_pre(fields, vocabulary)
    if name is None:
        name = "default"
        print(
            "warning: the file does not say how text is cut before it is tokenised (tokenizer.ggml.pre), and its"
            " architecture and vocabulary do not tell; token ids may differ from those that the model knows"
            + ("" if "tokenizer.ggml.add_bos_token" in fields else ", and prompts begin without a BOS token"),
            file=sys.stderr,
        )
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise ValueError(
            f"the pre-tokenizer {str(name)[:40]!r} is not supported, only {', '.join(sorted(PRE_TOKENIZERS))};"
            " convert from the Hugging Face folder instead"
        )
    pre = PRE_TOKENIZERS[name]
    merges = split_merges(_list(fields, "merges", str))
    ids: dict[str, int] = {}
    for index, text in enumerate(vocabulary.texts):
        ids.setdefault(text, index)
    return build_byte_level(ids, merges, pre, vocabulary.added()), pre.add_bos


def _inferred_pre(fields: Mapping[str, Any], vocabulary: _Vocabulary) -> str | None:
    """The pre-tokenizer of a file from before they were named, by architecture and vocabulary; None: not known."""
    count, known = len(vocabulary.texts), frozenset(vocabulary.texts)
    for pre in _PRE_OF_VOCABULARY:
        if fields.get("general.architecture") in pre.architectures and (count in pre.counts or pre.tokens <= known):
            return pre.name
    return None


def _sentencepiece(fields: Mapping[str, Any], vocabulary: _Vocabulary) -> Tokenizer:
    scores = [float(score) for score in _list(fields, "scores", (int, float))]
    if len(scores) != len(vocabulary.texts):
        raise ValueError(f"tokenizer.ggml.scores has {len(scores)} entries, expected {len(vocabulary.texts)}")
    space = fields.get("tokenizer.ggml.add_space_prefix", True)
    return build_sentencepiece(vocabulary.texts, scores, vocabulary.types, vocabulary.added(), bool(space))


def _info(fields: Mapping[str, Any], vocabulary: _Vocabulary, add_bos: bool, sentencepiece: bool) -> TokenizerInfo:
    def token(field: str, default: int | None = None) -> int | None:
        value = fields.get(f"tokenizer.ggml.{field}", default)
        return value if type(value) is int and 0 <= value < len(vocabulary.texts) else None

    # SentencePiece files may leave these out; the original Llama has them.
    bos = token("bos_token_id", 1 if sentencepiece else None)
    eos = token("eos_token_id", 2 if sentencepiece else None)
    ends = [eos, *(token(field) for field in _END_FIELDS)]
    ends += [index for index, text in enumerate(vocabulary.texts) if text in END_TEXTS]
    add_bos = bool(fields.get("tokenizer.ggml.add_bos_token", add_bos))
    special = (UNKNOWN, CONTROL)
    first: dict[str, int] = {}
    for index, text in enumerate(vocabulary.texts):
        first.setdefault(text, index)
    roles = {name: token(f"{field}_token_id") for name, field in _TEMPLATE_FIELDS.items()}
    return TokenizerInfo(
        kind="tokenizer.json",
        bos_id=bos,
        eos_id=eos,
        pad_id=token("padding_token_id"),
        eos_token_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
        add_bos=add_bos and bos is not None,
        add_eos=bool(fields.get("tokenizer.ggml.add_eos_token", False)) and eos is not None,
        special_tokens={
            text: index
            for index, (text, kind) in enumerate(zip(vocabulary.texts, vocabulary.types, strict=True))
            if kind in special
        },
        added_tokens={text: index for index, text in enumerate(vocabulary.texts) if text and first[text] != index},
        template_tokens={name: vocabulary.texts[i] for name, i in roles.items() if i is not None},
    )


def _list(fields: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> list[Any]:
    value: Sequence[Any] = fields.get(f"tokenizer.ggml.{name}", [])
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise ValueError(f"tokenizer.ggml.{name} has the wrong type")
    return value
