"""Tokens that end an answer, beside those that the settings of a model name.

Models that were trained on chats end a turn with a token of their own, and their config often still names the end of a
document. Without the former as a stop they talk on, with themselves.
"""

from __future__ import annotations

from dataclasses import replace

from svdengine.errors import SvdEngineError
from svdengine.files.model_writer import StoredTokenizer
from svdengine.text.chat_template import ChatTemplate
from svdengine.text.tokenizer import Tokenizer

# Texts that end a turn or a document whatever the model's settings say of them, as llama.cpp has it.
END_TEXTS = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|eom_id|>", "<|endoftext|>"),
        *("<|end_of_text|>", "<|end_of_turn|>", "<end_of_turn>", "<EOT>", "_<EOT>"),
    )
)
_ANSWER = "four"


def with_turn_end(stored: StoredTokenizer) -> StoredTokenizer:
    """The tokenizer, with the control token that its chat template writes after an answer as one that ends it."""
    end = _template_end(stored)
    known = stored.info.eos_token_ids
    if end is None or end in known:
        return stored
    return replace(stored, info=replace(stored.info, eos_token_ids=(*known, end)))


def _template_end(stored: StoredTokenizer) -> int | None:
    """The control token after an answer; None where there is no template, it writes none, or it does not run."""
    if stored.chat_template is None or stored.info.kind == "none":
        return None
    chat = [{"role": "user", "content": "What is two plus two?"}, {"role": "assistant", "content": _ANSWER}]
    try:
        tokenizer = Tokenizer(stored.info, stored.data)
        prompt = ChatTemplate(stored.chat_template, tokenizer).render(chat, add_generation_prompt=False).plain
        _, found, rest = prompt.rpartition(_ANSWER)
        after = rest.lstrip()
        texts = [text for text in tokenizer.special_texts if text and after.startswith(text)]
        ids = tokenizer.encode(max(texts, key=len), special=True, bos=False) if found and texts else []
    except SvdEngineError:  # it is told when it is used
        return None
    return ids[0] if len(ids) == 1 else None
