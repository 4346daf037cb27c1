"""The last hidden states of a step: those that the reference's head reads, on every executor that can tell them."""

from __future__ import annotations

import numpy as np
import pytest
from model_zoo import block_table, make_batch, random_tokens, random_weights, relative_error, stored, zoo
from numpy.typing import NDArray

from svdengine.kernels.ascend.executor import AscendExecutor
from svdengine.kernels.base_executor import ExecutorSetup
from svdengine.kernels.batch import Batch
from svdengine.kernels.cpu.executor import CpuExecutor
from svdengine.kernels.executor import HiddenStates
from svdengine.kernels.reference import ReferenceExecutor

ZOO = zoo()
LENGTH = 21


def without_logits(batch: Batch) -> Batch:
    return Batch(**{**vars(batch), "logit_rows": np.zeros(0, np.int32)})


def hidden_in_chunks(executor: HiddenStates, tokens: list[int], sizes: list[int]) -> NDArray[np.float32]:
    """Those of a prompt that is cut into chunks; every second chunk has logits too, which must change nothing."""
    table, found, start = block_table(len(tokens), first=1, step=2), [], 0
    for i, size in enumerate(sizes):
        batch = make_batch([(tokens[start : start + size], start)], [table])
        executor.forward(batch if i % 2 else without_logits(batch))
        found.append(executor.hidden_states())
        start += size
    return np.concatenate(found)


@pytest.mark.parametrize("name", ZOO)
def test_logits_are_what_the_head_makes_of_them(name: str) -> None:
    config = ZOO[name]
    weights = random_weights(config)
    executor = ReferenceExecutor(config, weights, block_count=16)
    logits = executor.forward(make_batch([(random_tokens(config, LENGTH), 0)], [block_table(LENGTH)]))
    head = weights["embedding" if config.tied_embeddings else "lm_head"]
    hidden = executor.hidden_states()
    assert hidden.dtype == np.float32 and hidden.shape == (LENGTH, config.hidden_size)
    assert relative_error(hidden @ head.T * config.logit_scale, logits) < 1e-5


@pytest.mark.parametrize("name", ZOO)
def test_the_cpu_agrees_with_the_reference(name: str) -> None:
    config, tokens = ZOO[name], random_tokens(ZOO[name], LENGTH)
    arrays, formats, exact = stored(config, "f32")
    reference = ReferenceExecutor(config, exact, block_count=16)
    expected = hidden_in_chunks(reference, tokens, [LENGTH])
    cpu = CpuExecutor(ExecutorSetup(config, arrays, formats, 16, max_batch_rows=64, kv_dtype="f32"), threads=2)
    try:
        for sizes in ([LENGTH], [1] * LENGTH, [9, 1, 1, 10]):
            assert relative_error(hidden_in_chunks(cpu, tokens, sizes), expected) < 2e-5
    finally:
        cpu.close()
    with pytest.raises(ValueError, match="closed"):
        cpu.hidden_states()


def test_neighbours_do_not_change_them() -> None:
    config = ZOO["llama"]
    a, b = random_tokens(config, 20, seed=1), random_tokens(config, 7, seed=2)
    arrays, formats, _ = stored(config, "q8")
    cpu = CpuExecutor(ExecutorSetup(config, arrays, formats, 16, max_batch_rows=64), threads=2)
    try:
        cpu.forward(without_logits(make_batch([(a, 0)], [[0, 1]])))
        alone = cpu.hidden_states()
        cpu.forward(make_batch([(b, 0), (a, 0)], [[3], [5, 4]]))
        assert relative_error(cpu.hidden_states()[7:], alone) < 2e-3
    finally:
        cpu.close()


def test_the_next_step_does_not_write_to_what_was_given() -> None:
    config = ZOO["llama"]
    executor = ReferenceExecutor(config, random_weights(config), block_count=16)
    assert executor.hidden_states().shape == (0, config.hidden_size)  # there was no step
    executor.forward(make_batch([(random_tokens(config, 5), 0)], [[0]]))
    given = executor.hidden_states()
    before = given.copy()
    executor.forward(make_batch([(random_tokens(config, 5, seed=9), 0)], [[0]]))
    assert (given == before).all()


def test_ascend_says_that_it_cannot() -> None:
    assert not issubclass(AscendExecutor, HiddenStates)
