"""Messages whose content is null, or left out, beside tool calls."""

from typing import Any

import pytest
from tiny_model import CHATML, make_tokenizer

from svdengine.text.chat_template import ChatTemplate

CALLS = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
EACH = "{%% for m in messages %%}%s{%% endfor %%}"


def rendered(template: str, call: dict[str, Any]) -> str:
    messages = [{"role": "user", "content": "a"}, call, {"role": "tool", "content": "1"}]
    return ChatTemplate(template, make_tokenizer("byte_level")).render(messages).plain


@pytest.mark.parametrize("call", [{"content": None}, {}], ids=["null", "left out"])
@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("{{ '/' + m['content'] }}", "/a//1"),
        ("/{{ m.content }}", "/a//1"),
        ("/{{ m.content | trim }}", "/a//1"),
        ("/{{ m.content.strip() }}", "/a//1"),
        ("/{% if 'x' in m.content %}x{% endif %}", "///"),
        ("/{% if m.content %}{{ m.content }}{% endif %}{{ m.tool_calls | length if m.tool_calls }}", "/a/1/1"),
        ("/{% if m['content'] is none %}call{% else %}{{ m['content'] }}{% endif %}", "/a/call/1"),
        ("/{% if m.content is not none %}{{ m.content }}{% else %}call{% endif %}", "/a/call/1"),
        ("/{% if (m['content']) == None %}call{% else %}{{ m.content }}{% endif %}", "/a/call/1"),
        ("/{% set content = m.content %}{% if content is none %}call{% else %}{{ content }}{% endif %}", "/a/call/1"),
    ],
)
def test_templates_get_what_they_can_read(call: dict[str, Any], body: str, expected: str) -> None:
    assert rendered(EACH % body, {"role": "assistant", "tool_calls": CALLS, **call}) == expected


def test_chatml() -> None:
    text = rendered(CHATML, {"role": "assistant", "content": None, "tool_calls": CALLS})
    assert "<|im_start|>assistant\n<|im_end|>" in text and "None" not in text


def test_messages_stay_as_they_were() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": CALLS}
    rendered(CHATML, call)
    assert call["content"] is None
