"""Get an answer that is JSON and fits a schema. Needs the extra `grammar`.

    pip install "svdengine[grammar]"
    python docs/examples/json_output.py [MODEL.svdp]

At each step only tokens that keep the text valid may come. So the form is certain. The content is not: a small model
writes valid JSON that may be wrong.
"""

import json
import sys
from pathlib import Path

import svdengine
from svdengine.commands.demo_model import demo_model

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "capital": {"type": "string", "maxLength": 20},
        "continent": {"enum": ["Africa", "America", "Asia", "Europe", "Oceania"]},
        "population_millions": {"type": "integer", "minimum": 0, "maximum": 2000},
    },
    "required": ["name", "capital", "continent", "population_millions"],
    "additionalProperties": False,
}


def main() -> None:
    """Ask for a record."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else demo_model(print)
    form = {"type": "json_schema", "json_schema": {"name": "country", "schema": SCHEMA}}
    with svdengine.load(path) as llm:
        messages = [{"role": "user", "content": "Describe France as JSON."}]
        answer = llm.chat(messages, response_format=form, temperature=0.0, max_tokens=200)
    if answer.finish_reason != "stop":
        sys.exit(f"the answer was cut ({answer.finish_reason}): {answer.text!r}")
    record = json.loads(answer.text)
    for name in SCHEMA["required"]:
        print(f"{name}: {record[name]}")


if __name__ == "__main__":
    main()
