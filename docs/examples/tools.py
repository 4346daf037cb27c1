"""Let a model call a function. Needs the extra `grammar`.

    pip install "svdengine[grammar]"
    python docs/examples/tools.py [MODEL.svdp]

The call is always one of the tools, with arguments that fit its schema. Whether it is a sensible call is up to the
model. Over HTTP, `svdengine serve` takes the field `tools` of OpenAI's interface and does all of this itself.
"""

import json
import sys
from pathlib import Path

import svdengine
from svdengine.commands.demo_model import demo_model
from svdengine.text.tool_calls import Tool, ToolCallReader, tool_grammar, tool_prompt

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION = {"name": "get_temperature", "description": "Degrees Celsius in a city now.", "parameters": PARAMETERS}
TOOL = Tool("get_temperature", PARAMETERS, {"type": "function", "function": FUNCTION})


def get_temperature(city: str) -> int:
    """What the model may call."""
    return {"Paris": 18, "Rome": 24, "Oslo": 7}[city]


def main() -> None:
    """Ask, let the model call, give it the result, and print its answer."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else demo_model(print)
    messages = [{"role": "user", "content": "How warm is it in Rome?"}]
    with svdengine.load(path) as llm:
        told, variables = tool_prompt(messages, [TOOL], llm.chat_template)
        grammar = tool_grammar([TOOL], required=True, several=False)
        answer = llm.chat(told, template=variables, response_format=grammar, temperature=0.0, max_tokens=200)
        _, calls = ToolCallReader().push(answer.text)
        if not calls:
            sys.exit(f"the call was cut ({answer.finish_reason}): {answer.text!r}")
        arguments = json.loads(calls[0].arguments)
        result = get_temperature(**arguments)
        print(f"{calls[0].name}({arguments}) = {result}")
        call = {"type": "function", "function": {"name": calls[0].name, "arguments": arguments}}
        messages += [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": str(result)},
        ]
        told, variables = tool_prompt(messages, [TOOL], llm.chat_template)
        print(llm.chat(told, template=variables, temperature=0.0, max_tokens=60).text)


if __name__ == "__main__":
    main()
