"""Keep what a model has read in a file, so that the next start does not read it again.

    python docs/examples/embed_with_saved_kv.py [MODEL.svdp] [FILE.kv]

Run it twice. The first run reads a long system prompt and writes FILE.kv. The second run finds it there, and its first
token comes sooner. The file belongs to one model, predictor, FFN path and KV dtype; another one is refused.
"""

import sys
from pathlib import Path

import svdengine
from svdengine.commands.demo_model import demo_model

RULES = "\n".join(f"Rule {n}: answer politely, briefly and in plain words." for n in range(1, 21))
QUESTION = "What is the capital of Italy?"


def main() -> None:
    """Answer one question with the help of the saved KV cache."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else demo_model(print)
    saved = Path(sys.argv[2]) if len(sys.argv) > 2 else Path("prompts.kv")
    # A fixed FFN path: what `auto` measures may differ between two starts.
    with svdengine.load(path, ffn="dense") as llm:
        if saved.exists():
            try:
                print(f"{llm.load_kv(saved)} tokens came from {saved}")
            except svdengine.ModelFileError as error:
                print(f"starting without it: {error}")
        messages = [{"role": "system", "content": RULES}, {"role": "user", "content": QUESTION}]
        answer = llm.chat(messages, temperature=0.0, max_tokens=40)
        print(answer.text)
        stats = answer.stats
        print(f"{stats.cached_tokens} of {stats.prompt_tokens} prompt tokens were known,", end=" ")
        print(f"first token after {stats.time_to_first_token:.2f} s")
        print(f"{llm.save_kv(saved)} tokens are in {saved}")


if __name__ == "__main__":
    main()
