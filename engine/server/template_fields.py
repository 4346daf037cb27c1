"""What the chat template is told beside the messages, from the body of a chat request."""

from __future__ import annotations

from typing import Any

from svdengine.server.api_error import ApiError
from svdengine.server.body import Body

_TAKEN = ("messages", "self")  # names that the variables of a template cannot have


def take_template_variables(body: Body) -> dict[str, Any]:
    """Variables of the template: `chat_template_kwargs`, and the fields that stand for one. Raises ApiError."""
    given = body.take("chat_template_kwargs", dict, {})
    for name in _TAKEN:
        if name in given:
            field = f"chat_template_kwargs.{name}"
            raise ApiError(400, f"{field} cannot be given: the request has it elsewhere", field, "invalid_value")
    effort = body.take("reasoning_effort", str)
    if effort is not None:
        # Templates of models that think read one of these; others think as much as they do.
        given = {"reasoning_effort": effort, "enable_thinking": effort != "none", **given}
    return {**given, **_ending(body)}


def _ending(body: Body) -> dict[str, bool]:
    """How the prompt ends: with the head of an answer, in the middle of one, or as the messages do."""
    head, middle = body.take("add_generation_prompt", bool), body.take("continue_final_message", bool)
    if head and middle:
        message = "continue_final_message goes on with the last message; add_generation_prompt begins another"
        raise ApiError(400, message, "continue_final_message", "invalid_value")
    if middle:
        return {"add_generation_prompt": False, "continue_final_message": True}
    return {} if head is None else {"add_generation_prompt": head}
