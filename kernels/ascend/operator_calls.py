"""Calls of CANN's operators, in their two phases: plan (which makes an executor), then run it on a stream.

What a plan holds is freed once: after its only run, or, for plans that are kept, when the calls are closed. A kept plan
runs again with the same tensors at the same addresses, without the host's work of planning. "Two-phase API" and
"aclSetAclOpExecutorRepeatable" of CANN's documentation state the rules.

That page says that operators which copy cannot be repeated, but not that CANN refuses them. So a plan is not believed
before it has run again on other data, and the same call, planned anew, gave the same (repeats.py).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from svdengine.errors import DeviceError
from svdengine.kernels.ascend.cann import Cann, Function
from svdengine.kernels.ascend.repeats import Repeats
from svdengine.kernels.ascend.signatures import OPERATORS
from svdengine.kernels.ascend.tensor import ACL_TYPES, Tensor

_ND = 2  # format: plain dimensions
_FLOAT = ACL_TYPES["float32"]


Action = Callable[[], object]  # starts some work
VARYING = object()  # in place of the integers that differ from call to call


@dataclass(frozen=True)
class _Plan:
    """An operator with its arguments, ready to run."""

    name: str
    function: Function  # the second phase
    executor: ctypes.c_void_p
    workspace: int  # bytes that it needs
    repeatable: bool
    resources: ExitStack  # frees descriptors, and an executor that CANN does not free itself


class OperatorCalls:
    """Operators on one stream. `workspace` gives the address of that many bytes, which stay until it is asked again."""

    def __init__(self, cann: Cann, stream: int, workspace: Callable[[int], int], repeats: Repeats) -> None:
        self._cann, self._stream, self._workspace, self._repeats = cann, stream, workspace, repeats
        self._kept: dict[tuple[Any, ...], Action] = {}
        self._plans: list[_Plan] = []  # that are kept
        self._prepared: list[ExitStack] = []

    def run(self, name: str, *arguments: Any, keep: bool = False) -> Action:
        """Start an operator with the arguments that signatures.py lists, and return what starts it again.

        Tensors are Tensor or None, lists of them tuples, scalars float, integers tuples. keep: the same call is to be
        expected again. Raises DeviceError where a call fails.
        """
        key = (name, *arguments)
        again = self._kept.get(key) if keep else None
        if again is not None:
            again()
            return again
        plan = self._plan(name, arguments, keep and self._repeats.allowed(name))
        if not plan.repeatable:
            with plan.resources:
                self._start(plan)
            return partial(self.run, name, *arguments, keep=keep)
        self._plans.append(plan)  # from here on `close` frees it
        once = partial(self.run, name, *arguments)
        again = self._kept[key] = self._repeats.first(name, arguments, partial(self._start, plan), once)
        return again

    def prepare(self, name: str, *arguments: Any) -> Callable[[tuple[int, ...]], None]:
        """What starts an operator with one list of integers that differs, VARYING among the arguments.

        It is planned for each call; all other descriptors are made once and freed when the calls are closed.
        """
        place = arguments.index(VARYING)
        fixed = [None if value is VARYING else value for value in arguments]
        with ExitStack() as stack:
            natives = self._natives(name, fixed, stack)
            self._prepared.append(stack.pop_all())

        def start(integers: tuple[int, ...]) -> None:
            with ExitStack() as own:
                array = self._native("integers", integers, own)
                executor, workspace = self._begin(name, [*natives[:place], array, *natives[place + 1 :]], own)
                self._start(_Plan(name, self._cann.function(name), executor, workspace, False, own))

        return start

    def close(self) -> None:
        """Free all plans and descriptors that are kept. The stream must have passed them."""
        with ExitStack() as stack:
            for resources in [*(plan.resources for plan in self._plans), *self._prepared]:
                stack.push(resources)
            self._kept, self._plans, self._prepared = {}, [], []

    def _start(self, plan: _Plan) -> None:
        workspace = self._workspace(plan.workspace) if plan.workspace else None
        executor = plan.executor.value
        if not plan.repeatable:
            plan.executor.value = None  # its run frees it, also when it fails
        code = plan.function(workspace, plan.workspace, executor, self._stream)
        if code:
            raise DeviceError(self._cann.failure(plan.name, code))

    def _plan(self, name: str, arguments: tuple[Any, ...], keep: bool) -> _Plan:
        with ExitStack() as stack:
            executor, workspace = self._begin(name, self._natives(name, arguments, stack), stack)
            repeatable = keep and self._make_repeatable(executor)
            return _Plan(name, self._cann.function(name), executor, workspace, repeatable, stack.pop_all())

    def _natives(self, name: str, arguments: Sequence[Any], stack: ExitStack) -> list[Any]:
        """The arguments as C takes them."""
        kinds = OPERATORS[name].split()
        return [self._native(kind, value, stack) for kind, value in zip(kinds, arguments, strict=True)]

    def _begin(self, name: str, natives: Sequence[Any], stack: ExitStack) -> tuple[ctypes.c_void_p, int]:
        """The first phase: an executor, and the bytes of workspace that it needs."""
        workspace, executor = ctypes.c_uint64(), ctypes.c_void_p()
        self._check(f"{name}GetWorkspaceSize", *natives, ctypes.byref(workspace), ctypes.byref(executor))
        stack.callback(self._destroy_executor, executor)
        return executor, workspace.value

    def _make_repeatable(self, executor: ctypes.c_void_p) -> bool:
        """Whether the plan may run more than once. Some operators refuse, and CANN before 8.1 lacks the call."""
        function = self._cann.find("aclSetAclOpExecutorRepeatable")
        return function is not None and function(executor) == 0

    def _destroy_executor(self, executor: ctypes.c_void_p) -> None:
        if executor.value is not None and self._cann.find("aclDestroyAclOpExecutor") is not None:
            self._check("aclDestroyAclOpExecutor", executor)

    def _native(self, kind: str, value: Any, stack: ExitStack) -> Any:
        """An argument as C takes it; `stack` frees what was made for it."""
        if value is None or kind not in ("tensor", "tensors", "scalar", "integers"):
            return value
        if kind == "tensor":
            return self._owned("Tensor", self._tensor(value), stack)
        if kind == "tensors":
            return self._tensors(value, stack)
        if kind == "scalar":
            number = ctypes.c_float(value)
            return self._owned("Scalar", self._made("aclCreateScalar", ctypes.byref(number), _FLOAT), stack)
        return self._owned("IntArray", self._made("aclCreateIntArray", _integers(value), len(value)), stack)

    def _tensor(self, tensor: Tensor) -> int:
        shape, strides = _integers(tensor.shape), _integers(tensor.strides)
        return self._made(
            "aclCreateTensor", shape, len(tensor.shape), ACL_TYPES[tensor.dtype], strides, tensor.offset, _ND,
            _integers((tensor.storage,)), 1, tensor.address,
        )  # fmt: skip

    def _tensors(self, tensors: tuple[Tensor, ...], stack: ExitStack) -> int:
        """A list, which owns its tensors from the moment it is made."""
        with ExitStack() as parts:
            addresses = [self._owned("Tensor", self._tensor(tensor), parts) for tensor in tensors]
            array = (ctypes.c_void_p * len(addresses))(*addresses)
            made = self._made("aclCreateTensorList", array, len(addresses))
            parts.pop_all()
        return self._owned("TensorList", made, stack)

    def _made(self, symbol: str, *arguments: Any) -> int:
        made = self._cann.function(symbol)(*arguments)
        if not made:
            raise DeviceError(self._cann.failure(symbol, 0).replace("failed with 0", "returned nothing"))
        return int(made)

    def _owned(self, kind: str, address: int, stack: ExitStack) -> int:
        stack.callback(self._check, f"aclDestroy{kind}", address)
        return address

    def _check(self, symbol: str, *arguments: Any) -> None:
        code = self._cann.function(symbol)(*arguments)
        if code:
            raise DeviceError(self._cann.failure(symbol, code))


def _integers(values: tuple[int, ...]) -> Any:
    return (ctypes.c_int64 * len(values))(*values)
