"""The shim notices each broken rule of the hardware, and lets a sound kernel pass."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from host_kernels import BROKEN_RULE, HERE, Script, compiled

# Kernel of broken_kernels.cpp -> what the shim says.
RULES = {
    "unaligned_vector": "Relu: UB address .* is not a multiple of 32 bytes",
    "unaligned_copy_in": "DataCopy: UB address .* is not a multiple of 32 bytes",
    "unaligned_copy_out": "DataCopy: UB address .* is not a multiple of 32 bytes",
    "unaligned_pad_in": "DataCopyPad: UB address .* is not a multiple of 32 bytes",
    "unaligned_pad_out": "DataCopyPad: UB address .* is not a multiple of 32 bytes",
    "part_of_a_block": "36 bytes are no multiple of 32",
    "part_of_a_block_out": "48 bytes are no multiple of 32",
    "copy_of_nothing": "a piece of 0 bytes",
    "compare_of_part": "32 floats are no multiple of 256 bytes",
    "gather_of_part": "40 elements give, no multiple of 64",
    "too_many_repeats": "256 repeats",
    "overlap": "the target overlaps an operand",
    "beyond_ub_tensor": "elements 0 to 256 of 248 in UB",
    "beyond_device_tensor": "256 elements of a device tensor of 248",
    "beyond_device_memory": "accessed 4 bytes beyond its end",
    "null_address": "no device memory of this launch",
    "too_much_ub": "188192 bytes of UB are asked for, there are 188160",
    "too_many_buffers": "more than 64 buffers",
    "alloc_without_free": "all 2 buffers of the queue are in use",
    "end_without_free": "allocated and not freed",
    "dequeue_of_nothing": "nothing is queued",
    "enqueue_twice": "was not just allocated",
    "enqueue_too_deep": "1 tensors are queued already",
    "enqueue_of_another": "of another queue",
    "free_twice": "freed before",
    "use_after_free": "used after it was freed",
    "use_of_an_earlier_life": "used after it was freed",
    "use_while_queued": "used while it is in its queue",
    "vector_before_copy_in": "pipe V uses what pipe MTE2 may not have written",
    "vector_without_barrier": "pipe V uses what pipe V may not have written",
    "copy_out_before_vector": "pipe MTE3 uses what pipe V may not have written",
    "scalar_before_copy_in": "pipe S uses what pipe MTE2 may not have written",
    "scalar_before_vector": "pipe S uses what pipe V may not have written",
    "vector_before_scalar": "pipe V uses what pipe S may not have written",
    "copy_in_before_read": "pipe MTE2 overwrites what pipe V may still read",
    "vector_before_copy_out": "pipe V overwrites what pipe MTE3 may still read",
    "flag_twice": "set that is set already",
    "flag_not_set": "awaited that was not set",
    "flag_left": "a flag that nobody awaited",
    "flag_id": "event id 8, there are 8",
    "two_writers": "blocks 0 and 1 write the same device memory",
    "reader_of_a_writer": "block 1 reads device memory that block 0 writes",
}


@pytest.fixture(scope="session")
def broken_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled("broken_kernels.cpp", tmp_path_factory)


def script(program: Path, kernel: str, blocks: int) -> Script:
    one = Script(program)
    one.buffer("in", np.arange(256, dtype=np.float32))
    one.empty("out", (256,), np.float32)
    one.launch(kernel, blocks, "in", "out")
    one.dump("out")
    return one


def test_a_sound_kernel_passes(broken_kernels: Path) -> None:
    np.testing.assert_array_equal(script(broken_kernels, "sound", 1).run()[0], 2 * np.arange(256))


@pytest.mark.parametrize("kernel", RULES)
def test_a_broken_rule_is_noticed(broken_kernels: Path, kernel: str) -> None:
    blocks = 2 if kernel in ("two_writers", "reader_of_a_writer") else 1
    done = script(broken_kernels, kernel, blocks).execute()
    assert done.returncode == BROKEN_RULE
    assert re.search(f"broken rule: .*{RULES[kernel]}", done.stderr.decode())


@pytest.mark.parametrize("blocks", [0, 49])
def test_a_launch_of_more_blocks_than_there_are_cores_is_noticed(broken_kernels: Path, blocks: int) -> None:
    done = script(broken_kernels, "sound", blocks).execute()
    assert done.returncode == BROKEN_RULE and b"a device has 48 vector cores" in done.stderr


def test_every_broken_kernel_is_tested() -> None:
    names = re.findall(r'^    \{"(\w+)"', (HERE / "broken_kernels.cpp").read_text(), re.MULTILINE)
    assert sorted(names) == sorted([*RULES, "sound"])


def test_float16_rounds_as_numpy_does(host_kernels: Path) -> None:
    """svd_sum of one partial sum only rounds: to nearest even, to subnormals, to infinity."""
    random = np.random.default_rng(0)
    values = random.standard_normal(8000).astype(np.float32) * np.exp(random.uniform(-20, 12, 8000)).astype(np.float32)
    values[:8] = [0, 65519.99, 65520, 2**-24, 2**-25, 1.5 * 2**-24, 1 + 2**-11, 1 + 3 * 2**-11]
    one = Script(host_kernels)
    one.buffer("partials", values)
    one.empty("y", (8000,), np.float16)
    one.launch("svd_sum", 3, "partials", None, "y", 1, 8000)
    one.dump("y")
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(one.run()[0], values.astype(np.float16))
