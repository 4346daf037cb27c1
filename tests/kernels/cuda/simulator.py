"""Runs CUDA kernels in Python: each thread of a block is a greenlet, and blocks run one after another.

It replaces how Numba's own simulator runs a kernel, which starts a thread of the system for every CUDA thread, knows no
warps, and checks neither negative indices nor barriers that some threads do not reach. A thread runs until it waits for
others, so that results are reproducible. A race that needs two lanes in step is not seen; one that depends on which
thread or block comes first shows when a kernel is run in both orders (`backwards`).
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Hashable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import greenlet
import numpy as np
from numpy.typing import NDArray

WARP, FULL = 32, 0xFFFFFFFF
PACKAGE = "svdengine.kernels.cuda."  # whose modules see the simulated `cuda`
_last_first = False  # the order of threads and blocks


class Index(NamedTuple):
    x: int
    y: int
    z: int


class Memory:
    """A flat array whose bounds are checked, below too. A value that is stored takes the array's type."""

    def __init__(self, array: NDArray) -> None:
        self.array = array

    def __getitem__(self, i: Any) -> Any:
        if i < 0:
            raise IndexError(f"index {i} of an array of {len(self.array)}")
        return self.array[i]

    def __setitem__(self, i: Any, value: Any) -> None:
        if i < 0:
            raise IndexError(f"index {i} of an array of {len(self.array)}")
        self.array[i] = value


class Thread(greenlet.greenlet):
    """One CUDA thread. `waits_for` names the barrier at which it stands."""

    def __init__(self, run: Callable[..., None], block: Block, number: int, index: Index) -> None:
        super().__init__(run)
        self.block, self.number, self.index = block, number, index
        self.waits_for: Hashable = None
        self.warp_steps = self.block_steps = 0


class Block:
    """A block: its threads, its shared memory, and what threads post for each other at barriers."""

    def __init__(self, index: Index, threads: Index, grid: Index, dynamic_bytes: int) -> None:
        self.index, self.size, self.grid = index, threads, grid
        self.shared: dict[Hashable, Memory] = {}
        self.posted: dict[Hashable, dict[int, Any]] = {}
        self.dynamic = np.full(dynamic_bytes, 0x7B, np.uint8)
        self.threads: list[Thread] = []

    def run(self, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        """Run all threads to their end. Raises RuntimeError when some wait for threads that never come."""
        indices = itertools.product(range(self.size.z), range(self.size.y), range(self.size.x))
        self.threads = [Thread(function, self, n, Index(x, y, z)) for n, (z, y, x) in enumerate(indices)]
        live = self.threads[::-1] if _last_first else self.threads
        for thread in live:
            self._switch(thread, *arguments)
        while live := [thread for thread in live if not thread.dead]:
            self._release(live)
            for thread in live:
                if thread.waits_for is None:
                    self._switch(thread)

    def _switch(self, thread: Thread, *arguments: Any) -> None:
        try:
            thread.switch(*arguments)
        except Exception as error:
            raise type(error)(f"thread {tuple(thread.index)} of block {tuple(self.index)}: {error}") from error

    def _release(self, live: list[Thread]) -> None:
        """Let those go on whose barrier is complete."""
        waiting: dict[Any, list[Thread]] = {}
        for thread in live:
            waiting.setdefault(thread.waits_for, []).append(thread)
        complete = [key for key, threads in waiting.items() if len(threads) == self._expected(key, live)]
        if not complete:
            raise RuntimeError(f"block {tuple(self.index)}: threads wait for others that do not come: {list(waiting)}")
        for key in complete:
            for thread in waiting[key]:
                thread.waits_for = None

    def _expected(self, key: Any, live: list[Thread]) -> int:
        """How many threads a barrier takes: (step,) of the block, or (warp, mask, step) of some lanes."""
        if len(key) == 1:
            return len(live)
        lanes = min(WARP, len(self.threads) - WARP * key[0])
        return (key[1] & ((1 << lanes) - 1)).bit_count()


def _me() -> Thread:
    thread = greenlet.getcurrent()
    assert isinstance(thread, Thread)
    return thread


def _meet(thread: Thread, key: Hashable, value: Any) -> dict[int, Any]:
    """Post a value, wait for the others of the barrier, and return what all posted, by thread number."""
    posted = thread.block.posted.setdefault(key, {})
    posted[thread.number] = value
    thread.waits_for = key
    thread.parent.switch()
    return posted


def _meet_block(value: Any = None) -> list[Any]:
    thread = _me()
    thread.block_steps += 1
    return list(_meet(thread, (thread.block_steps,), value).values())


def _post_in_warp(mask: int, value: Any) -> tuple[int, dict[int, Any]]:
    """This thread's number, and what the lanes of the mask posted, by thread number."""
    thread = _me()
    thread.warp_steps += 1
    warp, lane, mask = thread.number // WARP, thread.number % WARP, int(mask) & FULL
    assert mask >> lane & 1, f"lane {lane} is not in its own mask"
    return thread.number, _meet(thread, (warp, mask, thread.warp_steps), value)


def _meet_warp(mask: int, value: Any = None) -> tuple[int, dict[int, Any]]:
    """This lane, and what the lanes of the mask posted, by lane."""
    number, posted = _post_in_warp(mask, value)
    return number % WARP, {other % WARP: v for other, v in posted.items()}


def _shuffle(source: Callable[[int, int], int]) -> Callable[..., Any]:
    def shuffle(mask: int, value: Any, argument: int) -> Any:
        # The most frequent operation by far: nothing is copied.
        number, posted = _post_in_warp(mask, value)
        lane = number % WARP
        return posted.get(number - lane + source(lane, int(argument)), value)

    return shuffle


def _bits(posted: dict[int, Any]) -> int:
    return sum(1 << lane for lane, value in posted.items() if value)


def _dtype(kind: Any) -> np.dtype:
    return np.dtype(str(kind) if type(kind).__module__.startswith("numba") else kind)


def _shared_array(shape: int, dtype: Any, alignment: int | None = None) -> Memory:
    """The block's array of this place in the source, or with shape 0 what was launched with; it starts as rubbish."""
    block, caller = _me().block, sys._getframe(1)
    if shape == 0:
        return Memory(block.dynamic.view(_dtype(dtype)))
    key = (caller.f_code.co_filename, caller.f_code.co_firstlineno, caller.f_lasti)
    if key not in block.shared:
        block.shared[key] = Memory(np.full(shape * _dtype(dtype).itemsize, 0x7B, np.uint8).view(_dtype(dtype)))
    return block.shared[key]


def _add_atomic(values: Memory, i: int, x: Any) -> Any:
    """Threads run one at a time, so nothing comes between."""
    before = values[i]
    values[i] = before + x
    return before


def _local_array(shape: int, dtype: Any, alignment: int | None = None) -> Memory:
    return Memory(np.full(shape * _dtype(dtype).itemsize, 0x7B, np.uint8).view(_dtype(dtype)))


class Cuda:
    """What kernels see as `cuda`."""

    threadIdx = property(lambda self: _me().index)
    blockIdx = property(lambda self: _me().block.index)
    blockDim = property(lambda self: _me().block.size)
    gridDim = property(lambda self: _me().block.grid)
    laneid = property(lambda self: _me().number % WARP)
    shared = SimpleNamespace(array=_shared_array)
    local = SimpleNamespace(array=_local_array)

    syncthreads = staticmethod(lambda: _meet_block() and None)
    syncthreads_count = staticmethod(lambda value: sum(map(bool, _meet_block(value))))
    syncthreads_and = staticmethod(lambda value: int(all(_meet_block(value))))
    syncthreads_or = staticmethod(lambda value: int(any(_meet_block(value))))
    syncwarp = staticmethod(lambda mask=FULL: _meet_warp(mask) and None)
    shfl_sync = staticmethod(_shuffle(lambda lane, other: other % WARP))
    shfl_up_sync = staticmethod(_shuffle(lambda lane, by: lane - by if lane >= by else lane))
    shfl_down_sync = staticmethod(_shuffle(lambda lane, by: lane + by if lane + by < WARP else lane))
    shfl_xor_sync = staticmethod(_shuffle(lambda lane, by: lane ^ by))
    ballot_sync = staticmethod(lambda mask, value: np.uint32(_bits(_meet_warp(mask, value)[1])))
    any_sync = staticmethod(lambda mask, value: any(_meet_warp(mask, value)[1].values()))
    all_sync = staticmethod(lambda mask, value: all(_meet_warp(mask, value)[1].values()))

    atomic = SimpleNamespace(add=_add_atomic)
    popc = staticmethod(lambda value: (int(value) & FULL).bit_count())
    ffs = staticmethod(lambda value: (int(value) & -int(value)).bit_length())  # 1 for the lowest bit, 0 for none
    clz = staticmethod(lambda value: WARP - (int(value) & FULL).bit_length())
    threadfence = staticmethod(lambda: None)
    fma = staticmethod(lambda a, b, c: np.float32(np.float64(a) * np.float64(b) + np.float64(c)))
    grid = staticmethod(lambda dimensions: _me().block.index.x * _me().block.size.x + _me().index.x)


def launch(function: Callable[..., None], grid: Any, block: Any, arguments: Any, dynamic_bytes: int = 0) -> None:
    """Run a kernel's Python function over a grid of blocks of threads.

    Arrays are seen flat and must be contiguous; numbers are Python's, or float32.
    """
    blocks, threads = _index(grid), _index(block)
    seen = tuple(map(_argument, arguments))
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(PACKAGE)]
    places: list[dict[str, Any]] = [vars(module) for module in modules if "cuda" in vars(module)]
    if function.__globals__ not in places:
        places.append(function.__globals__)
    before = [place["cuda"] for place in places]
    for place in places:
        place["cuda"] = Cuda()
    try:
        with np.errstate(over="ignore"):
            indices = list(itertools.product(range(blocks.z), range(blocks.y), range(blocks.x)))
            for z, y, x in reversed(indices) if _last_first else indices:
                Block(Index(x, y, z), threads, blocks, dynamic_bytes).run(function, seen)
    finally:
        for place, module in zip(places, before, strict=True):
            place["cuda"] = module


def _index(size: Any) -> Index:
    sizes = (size,) if isinstance(size, int) else tuple(size)
    return Index(*sizes, *[1] * (3 - len(sizes)))


def _argument(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        assert value.flags.c_contiguous, "kernels take contiguous arrays"
        return Memory(value.reshape(-1))
    if isinstance(value, bool | np.bool_ | int | np.integer):
        return int(value)
    return np.float32(value)


@contextlib.contextmanager
def backwards() -> Iterator[None]:
    """Run the last threads and blocks first."""
    global _last_first
    _last_first = True
    try:
        yield
    finally:
        _last_first = False


def install() -> None:
    """Let Numba's simulated kernels, `kernel[grid, block](...)`, run here."""
    from numba.cuda.simulator.kernel import FakeCUDAKernel

    def call(self: Any, *arguments: Any) -> None:
        launch(self.fn, self.grid_dim, self.block_dim, arguments, self.dynshared_size)

    FakeCUDAKernel.__call__ = call
