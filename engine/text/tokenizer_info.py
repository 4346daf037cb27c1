"""What is needed beside a tokenizer's own file to use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from svdengine.errors import quoted

_RARE = ("added_tokens", "unnamed", "template_tokens")  # left out of a file where there are none

TokenizerKind = Literal["tokenizer.json", "tokenizer.model", "none"]


@dataclass(frozen=True)
class TokenizerInfo:
    """What is needed beside the tokenizer's own file to use it. Ids lie in 0..vocab_size - 1 of the config."""

    kind: TokenizerKind  # the byte tensor that holds the tokenizer; "none": the model reads token ids only
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()  # every token that ends a completion, eos_id among them
    add_bos: bool = False  # a prompt begins with bos_id; the tokenizer's own post-processor is not to be used
    add_eos: bool = False
    special_tokens: Mapping[str, int] = field(default_factory=dict)  # text -> id of the control tokens
    # text -> id of tokens that are text and that the file lacks: added ones, or a second id for the same text
    added_tokens: Mapping[str, int] = field(default_factory=dict)
    unnamed: tuple[str, ...] = ()  # of bos and eos: what the tokenizer has no name for, so that templates write nothing

    # What a chat template gets besides bos_token and eos_token, such as unk_token: the text of each
    template_tokens: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types. What few models have is left out where there is none, for programs that do not know it."""
        plain = {**asdict(self), "eos_token_ids": list(self.eos_token_ids), "unnamed": list(self.unnamed)}
        return {name: value for name, value in plain.items() if value or name not in _RARE}

    @classmethod
    def from_dict(cls, data: Any, vocab_size: int) -> TokenizerInfo:
        """Rebuild from `to_dict`. Raises ValueError on an ill-typed field or an id outside the vocabulary."""
        if not isinstance(data, dict) or not set(data) <= set(cls.__dataclass_fields__) or "kind" not in data:
            raise ValueError(f"tokenizer: expected some of the fields {', '.join(cls.__dataclass_fields__)}")
        lists = {name: tuple(_list(name, data.get(name, []))) for name in ("eos_token_ids", "unnamed")}
        info = cls(**{**data, **lists})
        if info.kind not in get_args(TokenizerKind):
            raise ValueError(f"tokenizer: unknown kind {quoted(str(info.kind))}")
        if type(info.add_bos) is not bool or type(info.add_eos) is not bool:
            raise ValueError("tokenizer: add_bos and add_eos must be true or false")
        for name in ("special_tokens", "added_tokens", "template_tokens"):
            if not isinstance(getattr(info, name), dict):
                raise ValueError(
                    f"tokenizer: {name} must map texts to {'texts' if name == 'template_tokens' else 'ids'}"
                )
        if not all(name.isidentifier() and isinstance(text, str) for name, text in info.template_tokens.items()):
            raise ValueError("tokenizer: template_tokens must map names of variables to texts")
        if any(role not in ("bos", "eos") for role in info.unnamed):
            raise ValueError("tokenizer: unnamed must be some of bos and eos")
        optional = (i for i in (info.bos_id, info.eos_id, info.pad_id) if i is not None)
        written = (*info.special_tokens.values(), *info.added_tokens.values())
        for token in (*optional, *info.eos_token_ids, *written):
            if type(token) is not int or not 0 <= token < vocab_size:
                raise ValueError(f"tokenizer: found the token id {token!r}, expected 0..{vocab_size - 1}")
        return info


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"tokenizer: {name} must be a list")
    return value
