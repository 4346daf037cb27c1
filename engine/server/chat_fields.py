"""What the readers of chat completions and completions check in code, and state no schema of: for /openapi.json."""

from __future__ import annotations

from collections.abc import Mapping

from svdengine.server.body_schema import Schema, choice, either, flag, listing, mapping, record, text, whole
from svdengine.server.shared_fields import LENGTH, OWN_FIELDS, SCHEMA, SEED, STOP, TEMPERATURE, TOP_K, TOP_P

_MESSAGE: Schema = {
    "type": "object",
    "properties": {
        "role": choice("system", "developer", "user", "assistant", "tool"),
        "content": either(text(), listing(mapping())),
        "name": text(),
        "tool_call_id": text(),
        "tool_calls": listing(mapping()),
    },
    "required": ["role"],
}
_FUNCTION = record({"name": text(1), "description": text(), "parameters": SCHEMA, "strict": flag()}, ["name"])
_TOKENS = listing(whole(0, 1 << 31))

_SAMPLING: Mapping[str, Schema] = {
    **OWN_FIELDS,
    "temperature": TEMPERATURE,
    "top_p": TOP_P,
    "top_k": TOP_K,
    "stop": STOP,
    "seed": SEED,
    "n": whole(1, 16),
    "response_format": mapping(),
}

CHAT_DETAILS: Mapping[str, Schema] = {
    **_SAMPLING,
    "messages": listing(_MESSAGE, 1),
    "max_tokens": LENGTH,
    "max_completion_tokens": LENGTH,
    "top_logprobs": whole(0, 20),
    "tools": listing(record({"type": choice("function"), "function": _FUNCTION}, ["type", "function"])),
    "tool_choice": either(choice("none", "auto", "required"), mapping()),
}

COMPLETION_DETAILS: Mapping[str, Schema] = {
    **{name: schema for name, schema in _SAMPLING.items() if name != "chat_template_kwargs"},
    "prompt": either(text(), listing({"anyOf": [text(), whole(0, 1 << 31), _TOKENS]})),
    "max_tokens": LENGTH,
    "logprobs": whole(0, 20),
}

TOKENIZE = record(
    {"content": text(), "messages": listing(_MESSAGE), "add_special": flag(), "with_pieces": flag(), "model": text()}
)
DETOKENIZE = record({"tokens": _TOKENS, "model": text()}, ["tokens"])
