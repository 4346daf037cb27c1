"""Decodes many tokens of a small model on a device, dense and sparse, alone and several sequences together.

Run as a program it does so on the GPU, for tools that watch a process. The number of tokens may be given.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from test_cpu_sparse import make_predictor
from test_executor import RELU, executors

from svdengine.kernels.cuda.executor import CudaExecutor
from svdengine.scheduling.engine_loop import Engine
from svdengine.scheduling.request import ContextLimit, Generation
from svdengine.scheduling.sampling import SamplingParams

EACH = 2  # tokens of a request
TOGETHER = 2  # of its requests run at once
WARM = 2 * 2 * TOGETHER * EACH  # tokens: every kind of step is launched, then recorded, and the next one after it


def decode(executor: CudaExecutor, count: int) -> int:
    """Decode at least `count` tokens, half of them on each path of the FFN, greedily and sampled. Returns how many."""
    engine, total = Engine(executor), 0
    while total < count:
        for ffn in ("dense", "sparse"):
            engine.set_ffn(ffn)  # type: ignore[arg-type]
            requests = [request(total + number) for number in range(TOGETHER)]
            for one in requests:
                engine.add(one)
            while not all(one.done for one in requests):
                engine.step()
            for one in requests:
                assert one.error is None, one.error
                total += len(one.token_ids)
    return total


def request(number: int) -> Generation:
    """A request whose first token differs from the last one's, and every second of which is sampled."""
    params = SamplingParams(temperature=float(number % 2), top_k=5, seed=number, max_tokens=EACH)
    return Generation(
        [number % RELU.vocab_size, 1], params, vocab_size=RELU.vocab_size, end_tokens=frozenset(),
        limit=ContextLimit(16), decoder=None,
    )  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What a long run did, after one in which every kind of step came up."""

    tokens: int
    lost: int  # bytes of the device's memory
    graphs: int  # recorded steps that were new


def run(device: Any, count: int) -> Outcome:
    """Decode at least `count` tokens, after some that do not count."""
    with executors(device, RELU, "q8", predictor=make_predictor(RELU, 8, 2, threshold=-0.05)) as (cuda, _):
        decode(cuda, WARM)
        device.synchronize()
        free, graphs = device.free_bytes(), len(cuda._graphs)
        tokens = decode(cuda, count)
        device.synchronize()
        return Outcome(tokens, free - device.free_bytes(), len(cuda._graphs) - graphs)


def main() -> None:
    """Decode on the GPU."""
    from svdengine.kernels.cuda.cupy_device import CupyDevice

    print(run(CupyDevice(), int(sys.argv[1]) if len(sys.argv) > 1 else 24))


if __name__ == "__main__":
    main()
