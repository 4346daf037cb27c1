"""What is needed beside a tokenizer's own file to use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from svdengine.errors import quoted

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

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "eos_token_ids": list(self.eos_token_ids)}

    @classmethod
    def from_dict(cls, data: Any, vocab_size: int) -> TokenizerInfo:
        """Rebuild from `to_dict`. Raises ValueError on an ill-typed field or an id outside the vocabulary."""
        if not isinstance(data, dict) or not set(data) <= set(cls.__dataclass_fields__) or "kind" not in data:
            raise ValueError(f"tokenizer: expected some of the fields {', '.join(cls.__dataclass_fields__)}")
        info = cls(**{**data, "eos_token_ids": tuple(_list(data.get("eos_token_ids", [])))})
        if info.kind not in get_args(TokenizerKind):
            raise ValueError(f"tokenizer: unknown kind {quoted(str(info.kind))}")
        if type(info.add_bos) is not bool or type(info.add_eos) is not bool:
            raise ValueError("tokenizer: add_bos and add_eos must be true or false")
        if not isinstance(info.special_tokens, dict):
            raise ValueError("tokenizer: special_tokens must map texts to ids")
        optional = (i for i in (info.bos_id, info.eos_id, info.pad_id) if i is not None)
        for token in (*optional, *info.eos_token_ids, *info.special_tokens.values()):
            if type(token) is not int or not 0 <= token < vocab_size:
                raise ValueError(f"tokenizer: found the token id {token!r}, expected 0..{vocab_size - 1}")
        return info


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("tokenizer: eos_token_ids must be a list")
    return value
