"""Answer several questions at once from coroutines, and give up one that takes too long.

    python docs/examples/async_chat.py [MODEL.svdp]

Without a model file, the demo model is used. All tasks share the model's steps, so that together they take little
longer than one of them.
"""

import asyncio
import sys
from pathlib import Path

import svdengine
from svdengine.commands.demo_model import demo_model

QUESTIONS = ["Name three primary colours.", "What is the capital of Italy?", "Say hello in French."]


async def ask(llm: svdengine.LLM, question: str) -> None:
    """Print an answer when it is there."""
    done = await llm.achat([{"role": "user", "content": question}], temperature=0.0, max_tokens=48)
    print(f"{question} -> {done.text!r}")


async def count_for_ever(llm: svdengine.LLM, seconds: float) -> None:
    """Read a long answer piece by piece, for so long. Leaving the block frees its KV blocks."""
    pieces = 0
    try:
        async with asyncio.timeout(seconds), llm.astream("1, 2, 3, 4,", ignore_eos=True, max_tokens=None) as stream:
            async for _ in stream:
                pieces += 1
    except TimeoutError:
        print(f"gave up after {seconds} s", end="; ")
    print(f"{pieces} pieces were read")


async def main() -> None:
    """Ask all questions together."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else demo_model(print)
    with svdengine.load(path, context=512, sequences=4) as llm:
        await asyncio.gather(*(ask(llm, question) for question in QUESTIONS), count_for_ever(llm, 1.0))
        print(f"{llm.stats().blocks_used} KV blocks are in use")


if __name__ == "__main__":
    asyncio.run(main())
