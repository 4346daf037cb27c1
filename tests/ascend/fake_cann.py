"""An emulated NPU: `acl` and the C functions of CANN's operator libraries, over host memory.

It computes (fake_operators.py), and it checks how it is used: handles that are alive, owned once and of the right
kind, memory in bounds (fake_memory.py), copies in the right direction, streams and contexts that exist, workspace that
is large enough. Work is queued, and runs when the stream is synchronised: what the host overwrites or frees too early
is noticed. A test makes single calls fail with `fail_at`.

C functions are real ones, made by ctypes from signatures.py, so that arguments are converted as for CANN.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from fake_memory import BrokenRule, Memory, View
from fake_operators import NOT_ON_310P, OPERATORS, OUTPUTS
from numpy.typing import NDArray

from svdengine.kernels.ascend import signatures
from svdengine.kernels.ascend.cann import Cann, Function
from svdengine.kernels.ascend.tensor import ACL_TYPES

DTYPES = {number: np.dtype(name) for name, number in ACL_TYPES.items()}
INJECTED = 507899  # the code of a call that a test makes fail
BROKEN = 500000  # the code of a call that breaks a rule
# Calls that end something do so even when they fail; a stream whose work failed has none left.
_ENDS = ("destroy", "free", "reset", "aclDestroy", "synchronize")
_SCRIBBLE = 0xFE  # what operators leave in their workspace


@dataclass
class Handle:
    """Something that C code made and that must be destroyed once."""

    kind: str
    value: Any
    alive: bool = True


@dataclass
class Plan:
    """An executor: an operator with its arguments as they were when it was planned."""

    operator: str
    arguments: list[Any]
    parts: list[Handle]  # descriptors, which must outlive a repeatable plan
    workspace: int
    repeatable: bool = False
    ran: bool = False
    first: list[tuple[View, Any]] | None = None  # what its first run left in its tensors


@dataclass
class Npu:
    """The device and everything that a process has made on it."""

    soc: str = "Ascend910B3"
    vector_cores: int = 3
    memory_bytes: int = 4 << 30
    repeatable: bool = True  # whether this CANN lets plans run again
    missing: frozenset[str] = frozenset()  # C functions that this CANN lacks
    stale: frozenset[str] = frozenset()  # operators whose plans do not see new inputs when they run again
    unsupported: frozenset[str] = frozenset()  # operators that are there and that this device lacks a kernel for
    launches: dict[str, Callable[..., None]] = field(default_factory=dict)  # own kernels by their C name
    fail_at: int | None = None  # the call that fails, by its place in `calls`

    @property
    def is_310p(self) -> bool:
        """Whether it is one of the Atlas inference series: other memory, other cores, and fewer operators."""
        return self.soc.startswith("Ascend310P")

    def __post_init__(self) -> None:
        self.memory = Memory(self.memory_bytes)
        self.calls: list[str] = []
        self.broken: list[str] = []  # rules
        self.started = 0
        self.devices: list[int] = []  # that are set
        self.pinned: dict[int, NDArray[np.uint8]] = {}  # host memory
        self.staged: list[int] = []  # bytes of copies with other host memory
        self.contexts: set[int] = set()
        self.deterministic: set[int] = set()  # contexts
        self.streams: dict[int, list[Callable[[], None]]] = {}  # and what they have not done yet
        self.handles: dict[int, Handle] = {}
        self.thread = threading.local()
        self._next = 0x1000
        self.acl = _acl(self)
        self.cann = Cann(self.acl, self, "8.1.emulated")

    def find(self, symbol: str) -> Function | None:
        """A C function; see cann.Libraries."""
        implementation = _implementation(self, symbol)
        if implementation is None or symbol in self.missing:
            return None
        result, parameters = signatures.signature_of(symbol)

        def function(*arguments: Any) -> int:
            return self.call(symbol, implementation, arguments, 0 if result is ctypes.c_void_p else INJECTED)

        return ctypes.CFUNCTYPE(result, *parameters)(function)  # type: ignore[no-any-return]

    def call(self, name: str, implementation: Callable[..., Any], arguments: Sequence[Any], failed: Any) -> Any:
        """Run a call unless it is the one to fail, and note rules that it breaks."""
        self.calls.append(name)
        failing = self.fail_at == len(self.calls) - 1
        if failing and not any(part in name for part in _ENDS):
            if name in OPERATORS:
                _consume(self.handles[arguments[2]])
            return failed
        try:
            result = implementation(*arguments)
        except BrokenRule as error:
            self.broken.append(f"{name}: {error}")
            return BROKEN if failed is INJECTED else failed
        except Exception as error:
            self.broken.append(f"{name}: {type(error).__name__}: {error}")
            return BROKEN if failed is INJECTED else failed
        return failed if failing else result

    def make(self, kind: str, value: Any) -> int:
        """A new handle."""
        self._next += 16
        self.handles[self._next] = Handle(kind, value)
        return self._next

    def get(self, kind: str, address: int | None) -> Handle:
        """A handle that is alive."""
        found = self.handles.get(address or 0)
        if found is None or found.kind != kind:
            raise BrokenRule(f"{address} is no {kind}")
        if not found.alive:
            raise BrokenRule(f"a {kind} is used after it was destroyed")
        return found

    def end(self, kind: str, address: int | None) -> int:
        """Destroy a handle."""
        self.get(kind, address).alive = False
        return 0

    def check_context(self) -> None:
        """Raise BrokenRule unless the calling thread has a context."""
        if getattr(self.thread, "context", None) not in self.contexts:
            raise BrokenRule("the thread has no context")

    def run_stream(self, stream: int) -> None:
        """Do what a stream has been asked for."""
        self.check_context()
        if stream not in self.streams:
            raise BrokenRule(f"{stream} is no stream")
        queue, self.streams[stream] = self.streams[stream], []
        for work in queue:
            work()

    def left(self) -> list[str]:
        """What was never given back, and which rules were broken."""
        found = list(self.broken)
        found += [f"a {handle.kind} was never destroyed" for handle in self.handles.values() if handle.alive]
        found += [f"{self.memory.used} bytes were never freed"] if self.memory.used else []
        found += ["pinned memory was never freed" for _ in self.pinned]
        found += [f"stream {stream} was not destroyed" for stream in self.streams]
        found += [f"context {context} was not destroyed" for context in self.contexts]
        return found + [f"device {index} was not reset" for index in self.devices]


def _implementation(npu: Npu, symbol: str) -> Callable[..., Any] | None:
    if symbol in signatures.LAUNCHES:
        kernel = npu.launches.get(symbol)
        return None if kernel is None else lambda *arguments: _launch(npu, kernel, *arguments)
    if symbol in signatures.DESCRIPTORS:
        found: Callable[..., Any] = getattr(_Descriptors(npu), symbol)
        return found
    operator = symbol.removesuffix("GetWorkspaceSize")
    if operator not in OPERATORS:
        return None
    if operator == symbol:
        return lambda *arguments: _run(npu, operator, *arguments)
    return lambda *arguments: _plan(npu, operator, arguments)


class _Descriptors:
    """The functions of libnnopbase.so."""

    def __init__(self, npu: Npu) -> None:
        self.npu = npu

    def aclCreateTensor(
        self, shape: Any, n: int, dtype: int, strides: Any, offset: int, form: int, storage: Any, m: int, address: int
    ) -> int:
        sizes = int(np.prod(storage[:m], dtype=np.int64))
        if form != 2:
            raise BrokenRule(f"format {form} is not ND")
        view = View(address, DTYPES[dtype], tuple(shape[:n]), tuple(strides[:n]), offset, sizes)
        self.npu.memory.array(view)
        return self.npu.make("Tensor", view)

    def aclCreateTensorList(self, tensors: Any, n: int) -> int:
        return self.npu.make("TensorList", [(t, self.npu.get("Tensor", t)) for t in tensors[:n]])

    def aclCreateScalar(self, value: int, dtype: int) -> int:
        if DTYPES[dtype] != np.float32:
            raise BrokenRule("only float32 scalars are emulated")
        return self.npu.make("Scalar", ctypes.c_float.from_address(value).value)

    def aclCreateIntArray(self, values: Any, n: int) -> int:
        return self.npu.make("IntArray", values[:n])

    def aclDestroyTensor(self, address: int) -> int:
        return self.npu.end("Tensor", address)

    def aclDestroyTensorList(self, address: int) -> int:
        for tensor, _ in self.npu.get("TensorList", address).value:
            self.npu.end("Tensor", tensor)
        return self.npu.end("TensorList", address)

    def aclDestroyScalar(self, address: int) -> int:
        return self.npu.end("Scalar", address)

    def aclDestroyIntArray(self, address: int) -> int:
        return self.npu.end("IntArray", address)

    def aclSetAclOpExecutorRepeatable(self, address: int) -> int:
        if not self.npu.repeatable:
            return 561000
        self.npu.get("Executor", address).value.repeatable = True
        return 0

    def aclDestroyAclOpExecutor(self, address: int) -> int:
        return self.npu.end("Executor", address)


_KINDS = {"tensor": "Tensor", "tensors": "TensorList", "scalar": "Scalar", "integers": "IntArray"}


def _plan(npu: Npu, operator: str, arguments: Sequence[Any]) -> int:
    """The first phase: look at the arguments, say how much workspace they need, and make an executor."""
    npu.check_context()
    if operator in npu.unsupported or (npu.is_310p and operator in NOT_ON_310P):
        return 561003
    *natives, size, executor = arguments
    values: list[Any] = []
    parts: list[Handle] = []
    for kind, native in zip(signatures.OPERATORS[operator].split(), natives, strict=True):
        if kind not in _KINDS or native is None:
            values.append(native)
            continue
        handle = npu.get(_KINDS[kind], native)
        parts.append(handle)
        values.append([part.value for _, part in handle.value] if kind == "tensors" else handle.value)
    views = [v for v in values if isinstance(v, View)]
    if npu.is_310p and operator in ("aclnnRmsNorm", "aclnnAddRmsNorm") and views[0].shape[-1] < 16:
        raise BrokenRule(f"{operator}: rows of {views[0].shape[-1]}, a 310P takes 32 bytes at least")
    if not operator.startswith("aclnnInplace"):
        count = OUTPUTS.get(operator, 1)
        if any(view.overlaps(output) for view in views[:-count] for output in views[-count:]):
            raise BrokenRule("an output overlaps an input")
    size[0] = 0 if operator == "aclnnRelu" else 512 + 32 * len(operator) * len(views)
    executor[0] = npu.make("Executor", Plan(operator, values, parts, size[0]))
    return 0


def _run(npu: Npu, operator: str, workspace: int | None, size: int, executor: int, stream: int) -> int:
    """The second phase: queue the work."""
    npu.check_context()
    handle = npu.get("Executor", executor)
    plan: Plan = handle.value
    if plan.operator != operator or (plan.ran and not plan.repeatable):
        raise BrokenRule(f"an executor of {plan.operator} runs again, or as {operator}")
    if any(not part.alive for part in plan.parts):
        raise BrokenRule("a descriptor was destroyed before its executor ran")
    if stream not in npu.streams:
        raise BrokenRule(f"{stream} is no stream")
    if size < plan.workspace:
        raise BrokenRule(f"a workspace of {size} bytes, {plan.workspace} are needed")
    plan.ran = True
    _consume(handle)

    def work() -> None:
        if plan.workspace:
            npu.memory.find(workspace or 0, size)[:] = _SCRIBBLE
        if operator in npu.stale and plan.first is not None:
            for view, values in plan.first:
                npu.memory.array(view)[...] = values
            return
        OPERATORS[operator](*(_array(npu, value) for value in plan.arguments))
        if operator in npu.stale:
            plan.first = [(view, npu.memory.array(view).copy()) for view in _written(operator, plan.arguments)]

    npu.streams[stream].append(work)
    return 0


def _written(operator: str, arguments: list[Any]) -> list[View]:
    views = [value for value in arguments if isinstance(value, View)]
    return views[:1] if operator.startswith("aclnnInplace") else views[-OUTPUTS.get(operator, 1) :]


def _consume(executor: Handle) -> None:
    """What the second phase does to an executor, whether it fails or not: nnopbase deletes it unless it may repeat."""
    executor.alive = executor.value.repeatable


def _array(npu: Npu, value: Any) -> Any:
    if isinstance(value, View):
        return npu.memory.array(value)
    if isinstance(value, list) and value and isinstance(value[0], View):
        return [npu.memory.array(view) for view in value]
    return value


def _launch(npu: Npu, kernel: Callable[..., None], blocks: int, stream: int, *arguments: Any) -> int:
    npu.check_context()
    if stream not in npu.streams:
        raise BrokenRule(f"{stream} is no stream")
    npu.streams[stream].append(lambda: kernel(npu.memory, blocks, *arguments))
    return 0


class _Runtime:
    """The functions of acl.rt and acl that are used, as Python sees them: a code, or values and a code."""

    def __init__(self, npu: Npu) -> None:
        self.npu = npu

    def init(self) -> int:
        self.npu.started += 1
        return 0 if self.npu.started == 1 else 100002

    def get_device_count(self) -> tuple[int, int]:
        return 1, 0

    def get_device_capability(self, device: int, what: int) -> tuple[int, int]:
        counted = 0 if self.npu.is_310p else 1  # AI cores, or vector cores
        return (self.npu.vector_cores, 0) if what == counted else (7, 0)

    def set_device(self, index: int) -> int:
        self.npu.devices.append(index)
        return 0

    def reset_device(self, index: int) -> int:
        self.npu.devices.remove(index)
        return 0

    def create_context(self, index: int) -> tuple[int, int]:
        if index not in self.npu.devices:
            raise BrokenRule("a context on a device that was not set")
        context = self.npu.make("context", None)
        self.npu.handles.pop(context)
        self.npu.contexts.add(context)
        self.npu.thread.context = context
        return context, 0

    def set_context(self, context: int) -> int:
        if context not in self.npu.contexts:
            raise BrokenRule(f"{context} is no context")
        self.npu.thread.context = context
        return 0

    def destroy_context(self, context: int) -> int:
        self.npu.contexts.remove(context)
        return 0

    def ctx_set_sys_param_opt(self, option: int, value: int) -> int:
        self.npu.check_context()
        if (option, value) != (0, 1):
            raise BrokenRule(f"option {option} becomes {value}")
        self.npu.deterministic.add(self.npu.thread.context)
        return 0

    def create_stream(self) -> tuple[int, int]:
        self.npu.check_context()
        stream = self.npu.make("stream", None)
        self.npu.handles.pop(stream)
        self.npu.streams[stream] = []
        return stream, 0

    def destroy_stream(self, stream: int) -> int:
        self.npu.check_context()
        if self.npu.streams.pop(stream):
            raise BrokenRule("a stream is destroyed with work that it has not done")
        return 0

    def synchronize_stream(self, stream: int) -> int:
        self.npu.run_stream(stream)
        return 0

    def malloc(self, size: int, policy: int) -> tuple[int, int]:
        self.npu.check_context()
        address = self.npu.memory.allocate(size)
        return (address, 0) if address else (0, 207001)

    def free(self, address: int) -> int:
        self.npu.check_context()
        self.npu.memory.free(address)
        return 0

    def malloc_host(self, size: int) -> tuple[int, int]:
        self.npu.check_context()
        array = np.zeros(size, np.uint8)
        self.npu.pinned[array.ctypes.data] = array
        return array.ctypes.data, 0

    def free_host(self, address: int) -> int:
        if self.npu.pinned.pop(address, None) is None:
            raise BrokenRule("what is freed is no pinned memory")
        return 0

    def memset(self, address: int, room: int, value: int, size: int) -> int:
        self.npu.memory.find(address, room)
        self.npu.memory.find(address, size)[:] = value
        return 0

    def memcpy(self, to: int, room: int, source: int, size: int, kind: int) -> int:
        self.npu.check_context()
        if size > room:
            raise BrokenRule(f"{size} bytes are copied into {room}")
        device, host = (to, source) if kind == 1 else (source, to)
        if kind not in (1, 2) or self.npu.memory.holds(host):
            raise BrokenRule(f"a copy of kind {kind} within the device")
        if not any(start <= host < start + len(array) for start, array in self.npu.pinned.items()):
            self.npu.staged.append(size)
        data = self.npu.memory.find(device, room if kind == 1 else size)
        if kind == 1:
            ctypes.memmove(data.ctypes.data, source, size)
        else:
            ctypes.memmove(to, data.ctypes.data, size)
        return 0

    def get_mem_info(self, attribute: int) -> tuple[int, int, int]:
        if attribute != (0 if self.npu.is_310p else 1):  # DDR or HBM
            return 0, 0, 100000
        return self.npu.memory_bytes - self.npu.memory.used, self.npu.memory_bytes, 0


_RT = ("set_device", "reset_device", "get_device_count", "create_context", "set_context", "destroy_context")
_RT += (
    "ctx_set_sys_param_opt",
    "malloc_host",
    "free_host",
    "create_stream",
    "destroy_stream",
    "synchronize_stream",
    "malloc",
    "free",
    "memset",
    "memcpy",
    "get_mem_info",
)
_VALUES = {"get_device_count": 1, "create_context": 1, "create_stream": 1, "malloc": 1, "get_mem_info": 2}
_VALUES |= {"get_device_capability": 1, "malloc_host": 1}


def _acl(npu: Npu) -> SimpleNamespace:
    """The module `acl`."""
    runtime = _Runtime(npu)

    def function(name: str) -> Callable[..., Any]:
        values = _VALUES.get(name, 0)
        failed = (*(0,) * values, INJECTED) if values else INJECTED
        return lambda *arguments: npu.call(name, getattr(runtime, name), arguments, failed)

    return SimpleNamespace(
        rt=SimpleNamespace(**{name: function(name) for name in _RT}),
        init=function("init"),
        get_device_capability=function("get_device_capability"),
        get_soc_name=lambda: npu.soc,
        get_recent_err_msg=lambda: "EZ9999: the emulator\nsays why",
    )
