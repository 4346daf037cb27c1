"""Print an answer while the model writes it, then what it cost.

    python docs/examples/stream.py [MODEL.svdp]

Without a model file, the demo model is used.
"""

import sys
from pathlib import Path

import svdengine
from svdengine.commands.demo_model import demo_model

QUESTION = "Name three primary colours."


def main() -> None:
    """Ask one question."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else demo_model(print)
    with svdengine.load(path) as llm:
        messages = [{"role": "user", "content": QUESTION}]
        # Leaving the block, or breaking out of the loop, ends the answer and frees its KV blocks.
        with llm.stream_chat(messages, temperature=0.0, max_tokens=64) as stream:
            for piece in stream:
                print(piece, end="", flush=True)
        print()
        stats = stream.completion.stats
        print(f"first token after {stats.time_to_first_token:.2f} s, then {stats.tokens_per_second:.0f} tokens/s")


if __name__ == "__main__":
    main()
