"""One NPU: its context and stream, memory, copies, operators, and launches of own kernels.

What is asked for runs on one stream, in order. Everything is freed once, in `close`, also when opening fails half-way.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from svdengine.errors import DeviceError
from svdengine.kernels.ascend.cann import Cann
from svdengine.kernels.ascend.operator_calls import Action, OperatorCalls
from svdengine.kernels.ascend.repeats import Repeats
from svdengine.kernels.ascend.soc import SUPPORTED, soc_of
from svdengine.kernels.ascend.tensor import ALIGNMENT, Tensor, whole

_HUGE_PAGES_FIRST = 0  # policy of acl.rt.malloc
_TO_DEVICE, _TO_HOST = 1, 2  # directions of acl.rt.memcpy
_DETERMINISTIC = 0  # option of acl.rt.ctx_set_sys_param_opt
_LEAST_WORKSPACE = 1 << 20
_PINNED_BYTES = 1 << 20  # copies up to that size go by pinned host memory: the runtime would stage any other first


class AscendDevice:
    """A device that is open. Not for use from several threads at once, but from any: `use` makes it a thread's own.

    Raises DeviceError where it cannot be opened, or is of a kind that is not supported.
    """

    def __init__(self, cann: Cann, index: int = 0) -> None:
        self.cann = cann
        self.repeat = False  # whether operators that are run now will come again with the same arguments
        self._recording: list[Action] | None = None
        self._closed = False
        self._memory: dict[int, int] = {}  # address -> bytes
        self._workspace = (0, 0)  # address, bytes
        self._spare: Tensor | None = None
        cann.start()
        with ExitStack() as stack:
            cann.call("rt.set_device", index)
            stack.callback(cann.call, "rt.reset_device", index)
            name = str(cann.acl.get_soc_name())
            soc = soc_of(name)
            if soc is None:
                raise DeviceError(f"{name} is not supported; supported are {SUPPORTED}")
            self.soc = soc
            self.vector_cores = int(cann.call("get_device_capability", index, soc.cores))
            self._context = cann.call("rt.create_context", index)
            stack.callback(cann.call, "rt.destroy_context", self._context)
            cann.call("rt.set_context", self._context)
            # The quantised product and others add up in any order otherwise, and greedy answers differ from run to run.
            if hasattr(cann.acl.rt, "ctx_set_sys_param_opt"):
                cann.call("rt.ctx_set_sys_param_opt", _DETERMINISTIC, 1)
            self._pinned: int = cann.call("rt.malloc_host", _PINNED_BYTES)
            stack.callback(cann.call, "rt.free_host", self._pinned)
            self._stream = cann.call("rt.create_stream")
            stack.callback(cann.call, "rt.destroy_stream", self._stream)
            repeats = Repeats(self.read, self.write, cann.version)
            self._calls = OperatorCalls(cann, self._stream, self._workspace_of, repeats)
            self._resources = stack.pop_all()

    def use(self) -> None:
        """Make this the device of the calling thread: the runtime keeps one for each."""
        self.cann.call("rt.set_context", self._context)

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Tensor:
        """New memory of undefined content. Raises DeviceError when it runs out."""
        count = int(np.prod(shape, dtype=np.int64))
        more = ALIGNMENT if self.soc.whole_copies else 0
        return whole(self._allocate(max(count, 1) * np.dtype(dtype).itemsize + more), shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> Tensor:
        """New memory of zeros."""
        tensor = self.empty(shape, dtype)
        size = tensor.size * tensor.item_bytes
        if size:
            self.cann.call("rt.memset", tensor.address, size, 0, size)
        return tensor

    def upload(self, array: NDArray) -> Tensor:
        """A copy of a host array."""
        tensor = self.empty(array.shape, array.dtype)
        self.write(tensor, array)
        return tensor

    def make_spare(self, items: int) -> None:
        """Have memory for so many float16 that nothing owns: what an operator's substitute leaves between its steps."""
        self._spare = self.empty((items,), np.float16)

    def spare(self, shape: tuple[int, ...], after: int = 0) -> Tensor:
        """Part of that memory, from item `after` on. The next to ask for it gets the same."""
        assert self._spare is not None
        size = int(np.prod(shape, dtype=np.int64))
        return self._spare.rows(after, size).reshape(*shape)

    def write(self, to: Tensor, array: NDArray) -> None:
        """Copy a host array into a view without gaps. The stream must not be using it: this does not wait."""
        array = np.ascontiguousarray(array)
        if array.dtype.name != to.dtype or array.size > to.size or not to.contiguous:
            raise ValueError(f"{array.dtype} {array.shape} does not fit a view of {to.dtype} {to.shape}")
        if array.nbytes:
            room, source = to.size * to.item_bytes, array.ctypes.data
            if array.nbytes <= _PINNED_BYTES:
                ctypes.memmove(self._pinned, source, array.nbytes)
                source = self._pinned
            self.cann.call("rt.memcpy", to.pointer, room, source, array.nbytes, _TO_DEVICE)

    def read(self, tensor: Tensor) -> NDArray[Any]:
        """A host copy of a view without gaps, once all work before it is done."""
        if not tensor.contiguous:
            raise ValueError(f"a view of shape {tensor.shape} and strides {tensor.strides} has gaps")
        self.synchronize()
        array = np.empty(tensor.shape, tensor.dtype)
        if array.nbytes:
            pinned = array.nbytes <= _PINNED_BYTES
            to = self._pinned if pinned else array.ctypes.data
            self.cann.call("rt.memcpy", to, array.nbytes, tensor.pointer, array.nbytes, _TO_HOST)
            if pinned:
                ctypes.memmove(array.ctypes.data, self._pinned, array.nbytes)
        return array

    def run(self, name: str, *arguments: Any) -> None:
        """Start an operator; see OperatorCalls.run."""
        self._record(self._calls.run(name, *arguments, keep=self.repeat))

    def prepare(self, name: str, *arguments: Any) -> Callable[[tuple[int, ...]], None]:
        """What starts an operator of which one argument varies; see OperatorCalls.prepare."""
        return self._calls.prepare(name, *arguments)

    def vary(self, action: Action) -> None:
        """Run an action whose operators have other arguments each time. A recording repeats the action as such."""
        recording, self._recording = self._recording, None
        try:
            self._unkept(action)
        finally:
            self._recording = recording
        self._record(partial(self._unkept, action))

    def _unkept(self, action: Action) -> None:
        """Run an action whose plans are not to be kept: they would be others each time, and never freed."""
        repeat, self.repeat = self.repeat, False
        try:
            action()
        finally:
            self.repeat = repeat

    def launch(self, kernel: Callable[..., int], name: str, blocks: int, *arguments: Any) -> None:
        """Start an own kernel on `blocks` vector cores: tensors by their addresses (None: null), and numbers."""
        values = [argument.pointer if isinstance(argument, Tensor) else argument for argument in arguments]
        start = partial(self._launch, name, kernel, blocks, self._stream, *values)
        start()
        self._record(start)

    def record(self, actions: Action) -> list[Action]:
        """Run actions that start work, and return what starts the same work again, with nothing left to decide."""
        self._recording = []
        try:
            actions()
            return self._recording
        finally:
            self._recording = None

    def synchronize(self) -> None:
        """Wait for everything that was started. Raises DeviceError where some of it failed."""
        self.cann.call("rt.synchronize_stream", self._stream)

    def free_bytes(self) -> int:
        """Memory that could still be allocated."""
        free, _ = self.cann.call("rt.get_mem_info", self.soc.memory)
        return int(free)

    def free(self, tensors: Iterable[Tensor]) -> None:
        """Give memory back before the device is closed, by tensors that begin where it does."""
        self.synchronize()
        self._calls.close()  # plans that are kept may use it, and so may recordings
        with ExitStack() as stack:
            for tensor in tensors:
                stack.callback(self._free, tensor.address)

    def close(self) -> None:
        """Wait, and give everything back. Calling it twice is fine. Raises DeviceError after all was tried."""
        if self._closed:
            return
        self._closed = True
        with ExitStack() as stack:
            stack.push(self._resources)
            for address in list(self._memory):
                stack.callback(self._free, address)
            stack.callback(self._calls.close)
            stack.callback(self.synchronize)
            stack.callback(self.use)

    def _record(self, action: Action) -> None:
        if self._recording is not None:
            self._recording.append(action)

    def _launch(self, name: str, kernel: Callable[..., int], *arguments: Any) -> None:
        code = kernel(*arguments)
        if code:
            raise DeviceError(self.cann.failure(f"launching {name}", code))

    def _allocate(self, size: int) -> int:
        address: int = self.cann.call("rt.malloc", size, _HUGE_PAGES_FIRST)
        self._memory[address] = size
        return address

    def _free(self, address: int) -> None:
        del self._memory[address]
        self.cann.call("rt.free", address)

    def _workspace_of(self, size: int) -> int:
        """Memory for the operator that comes next; operators of a stream run in order and share it."""
        address, room = self._workspace
        if room < size:
            if room:
                self.synchronize()
                self._workspace = (0, 0)
                self._free(address)
            room = max(_LEAST_WORKSPACE, 1 << (size - 1).bit_length())
            address = self._allocate(room)
            self._workspace = (address, room)
        return address
