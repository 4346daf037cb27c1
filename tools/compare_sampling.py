"""How often a small model's answers go wrong by sampling: loops, answers that never end, and wrong ones.

    python -m svdengine.tools.compare_sampling MODEL

24 everyday questions are asked greedily and with three seeds, for each of some settings; a table is printed. An answer
loops when its last eight words stand in it three times or more. Fourteen of the questions have a word that a right
answer holds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from svdengine import LLM, load
from svdengine.errors import SvdEngineError
from svdengine.scheduling.completion import Completion

QUESTIONS: tuple[tuple[str, str], ...] = (  # and a word of a right answer; empty: there is none to look for
    ("What is the capital of France?", "paris"),
    ("What is the capital of Italy?", "rome"),
    ("How many days does a week have?", "seven|7"),
    ("What is 2 + 2?", "4|four"),
    ("Who wrote Romeo and Juliet?", "shakespeare"),
    ("What do bees make?", "honey"),
    ("What is the largest planet of our solar system?", "jupiter"),
    ("What colour is the sky on a clear day?", "blue"),
    ("Which animal barks?", "dog"),
    ("What is the opposite of hot?", "cold"),
    ("How many legs does a spider have?", "eight|8"),
    ("What is water made of?", "hydrogen"),
    ("Which season comes after winter?", "spring"),
    ("What is the currency of Japan?", "yen"),
    ("Name three rivers.", ""),
    ("Write a short poem about rain.", ""),
    ("How do I boil an egg?", ""),
    ("What should I cook tonight?", ""),
    ("Write an email that asks for a day off.", ""),
    ("Explain what a computer is to a child.", ""),
    ("Give me five tips for better sleep.", ""),
    ("Tell me a story about a lost cat.", ""),
    ("How can I learn a language quickly?", ""),
    ("What is the difference between a lake and a sea?", ""),
)
CARD = {"temperature": 0.2, "top_p": 0.9, "top_k": 0, "min_p": 0.0}  # of the demo model's card
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "llama.cpp's": {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
    "the card's": CARD,
    "the card's, repetition 1.1, last 64": {**CARD, "repetition_penalty": 1.1, "repeat_last_n": 64},
    "the card's, DRY 0.8": {**CARD, "dry_multiplier": 0.8},
}
_MOST_TOKENS = 120


def answers(llm: LLM, settings: Mapping[str, Any], *, greedy: bool, seed: int) -> list[Completion]:
    """All questions together, as first messages."""
    fields = {**settings, "temperature": 0.0} if greedy else settings
    template = llm.chat_template
    prompts = [template.encode([{"role": "user", "content": question}]) for question, _ in QUESTIONS]
    return llm.generate(prompts, llm.default_params, **fields, seed=seed, max_tokens=_MOST_TOKENS)


def loops(text: str) -> bool:
    """Whether the end of a text stands in it three times or more."""
    words = text.split()
    end = words[-8:]
    return len(end) == 8 and sum(words[i : i + 8] == end for i in range(len(words))) > 2


def is_right(text: str, wanted: str) -> bool:
    """Whether one of the words, with | between them, stands in the text."""
    return any(word in text.lower() for word in wanted.split("|"))


def row(llm: LLM, name: str, settings: Mapping[str, Any], seeds: int) -> str:
    """A line of the table."""
    cells = []
    for greedy, count in ((True, 1), (False, seeds)):
        done = [c for seed in range(count) for c in answers(llm, settings, greedy=greedy, seed=seed)]
        wanted = [w for _ in range(count) for _, w in QUESTIONS]
        asked = [(c.text, w) for c, w in zip(done, wanted, strict=True) if w]
        right = sum(is_right(text, word) for text, word in asked)
        endless = sum(c.finish_reason == "length" for c in done)
        cells += [f"{right}/{len(asked)}", f"{sum(loops(c.text) for c in done)}/{len(done)}", f"{endless}/{len(done)}"]
    return f"| {name} | {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="compare_sampling", description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a .svdp file")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="how often to sample; 3 by default")
    parser.add_argument("--show", metavar="NAME", help="print the answers of one setting instead")
    given = parser.parse_args(arguments)
    try:
        with load(given.model, sequences=len(QUESTIONS), context=1024) as llm:
            if given.show is not None:
                for (question, _), done in zip(
                    QUESTIONS, answers(llm, SETTINGS[given.show], greedy=False, seed=0), strict=True
                ):
                    print(f"{question}\n    {done.text!r}")
                return 0
            print("| sampling | greedy: right | loops | endless | sampled: right | loops | endless |")
            print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
            for name, settings in SETTINGS.items():
                print(row(llm, name, settings, given.seeds), flush=True)
    except SvdEngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
