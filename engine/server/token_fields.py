"""Text to token ids and back: /tokenize, /detokenize, /tokenizer_info, with fields as llama.cpp and vLLM name them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from svdengine.llm import LLM
from svdengine.server.api_error import ApiError
from svdengine.server.body import Body, encode_json
from svdengine.server.bounded_text import BoundedTokenizer
from svdengine.server.messages import read_messages
from svdengine.server.template_fields import take_template_variables

_SLICE = 4096  # values that are written as JSON at a time: more would hold up the other threads


def tokenized(llm: LLM, tokenizer: BoundedTokenizer, value: Any) -> bytes:
    """The answer of /tokenize, as JSON. Raises ApiError or RequestError."""
    body = Body(value)
    messages, content, prompt = body.take("messages", list), body.take("content", str), body.take("prompt", str)
    if sum(given is not None for given in (messages, content, prompt)) != 1:
        raise ApiError(400, "give content (or prompt), a text, or messages, a conversation", "content")
    bos, special = take_special(body)
    if special is None:  # programs ask for the id of a control token in this way
        special = prompt in tokenizer.special_texts
    with_pieces, with_texts = body.take("with_pieces", bool, False), body.take("return_token_strs", bool, False)
    variables = take_template_variables(body)
    body.ignore("model")
    body.finish()
    if messages is not None:
        tokens = llm.chat_template.encode(read_messages(messages), **variables)
    else:
        tokens = tokenizer.encode(content if content is not None else prompt or "", bool(special), bos=bool(bos))
    texts = tokenizer.pieces(tokens) if with_pieces or with_texts else []
    listed = [{"id": t, "piece": text} for t, text in zip(tokens, texts, strict=True)] if with_pieces else tokens
    parts = [
        b'{"tokens":' + _encode_list(listed),
        b'"count":' + encode_json(len(tokens)),
        b'"max_model_len":' + encode_json(llm.context),
    ]
    if with_texts:
        parts.append(b'"token_strs":' + _encode_list(texts))
    return b",".join(parts) + b"}"


def detokenized(llm: LLM, tokenizer: BoundedTokenizer, value: Any) -> bytes:
    """The answer of /detokenize, as JSON. Raises ApiError."""
    body = Body(value)
    tokens = body.need("tokens", list)
    body.ignore("model")
    body.finish()
    size = llm.config.vocab_size
    if not all(type(token) is int and 0 <= token < size for token in tokens):
        raise ApiError(400, "tokens must be token ids of this model", "tokens", "invalid_value")
    text = tokenizer.whole_text(tokens)
    return encode_json({"content": text, "prompt": text})


def tokenizer_info(llm: LLM) -> dict[str, Any]:
    """What programs that make prompts themselves ask for: control tokens and the chat template."""
    info = llm.model_file.tokenizer_info
    named = {"bos_token": info.bos_id, "eos_token": info.eos_id, "pad_token": info.pad_id}
    return {
        "tokenizer_class": "svdengine",
        "vocab_size": llm.config.vocab_size,
        "model_max_length": llm.context,
        "add_bos_token": llm.tokenizer.add_bos,
        **{name: llm.tokenizer.special_text(token) or None for name, token in named.items()},
        **{f"{name}_id": token for name, token in named.items()},
        "chat_template": llm.model_file.chat_template,
    }


def take_special(body: Body) -> tuple[bool | None, bool | None]:
    """Whether the tokens that begin a prompt are added, and whether control tokens that are written in it count.

    Neither, where it is not said: text of users that spells a control token is to stay text.
    """
    bos = body.take("add_special_tokens", bool, body.take("add_special", bool))
    return bos, body.take("parse_special", bool)


def _encode_list(values: Sequence[Any]) -> bytes:
    slices = (values[start : start + _SLICE] for start in range(0, len(values), _SLICE))
    return b"[" + b",".join(encode_json(part)[1:-1] for part in slices) + b"]"
