"""Complete several prompts together, and see what running them together brings.

    python docs/examples/batch.py [MODEL.svdp]

A weight that a step reads serves every sequence in the step. So four sequences together take less time than one after
the other. `svdengine batch` does the same for a file of requests.
"""

import sys
import time
from pathlib import Path

import svdengine
from svdengine.commands.demo_model import demo_model

PROMPTS = ["The capital of France is", "Water boils at", "The opposite of hot is", "A week has seven"]


def main() -> None:
    """Run the prompts one by one, then all at once."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else demo_model(print)
    params = svdengine.SamplingParams(temperature=0.0, max_tokens=24)
    # The KV cache must have room for all sequences at once; otherwise some wait for others.
    with svdengine.load(path, context=256, sequences=len(PROMPTS)) as llm:
        llm.generate("Warm up.", params)
        start = time.perf_counter()
        for prompt in PROMPTS:
            llm.generate(prompt, params)
        alone = time.perf_counter() - start
        # What was read before is still in the KV cache. Other text makes the comparison a fair one.
        start = time.perf_counter()
        done = llm.generate(["So: " + prompt for prompt in PROMPTS], params)
        together = time.perf_counter() - start
    for prompt, completion in zip(PROMPTS, done, strict=True):
        print(f"{prompt!r} -> {completion.text!r} ({completion.finish_reason})")
    print(f"one after the other {alone:.2f} s, together {together:.2f} s")


if __name__ == "__main__":
    main()
