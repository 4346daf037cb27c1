"""Barriers and wake-ups for a team of resident threads: atomics on integers, each on a cache line of its own."""

from __future__ import annotations

import os

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import types

from svdengine.kernels.cpu import isa
from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.simd import I32, I64, ISA, address, call, operation
from svdengine.kernels.cpu.workspace import ARRIVED, ASLEEP, CALLED, CROWDED, EPOCH, PARKED

# A thread that waits longer than some tens of microseconds waits for one that has lost its core. It then sleeps rather
# than yields: only a thread that wakes up is moved to an idle core, and two members on one core would stay there.
SPINS = 2_000
# After a wait that long others are likely to follow: two members may share a core, and the one that spins is what the
# other waits for. So the next waits spin for a moment only.
CROWDED_SPINS = 400
CROWDED_WAITS = 500  # a few steps
NAP = 50  # microseconds, where the system has no futex
IDLE_SPINS = 50_000  # before a member without work parks: about a millisecond

_MACHINE = isa.triple_of(ISA)
_FUTEX = {"x86_64": 202, "aarch64": 98}.get(_MACHINE.split("-")[0]) if "linux" in _MACHINE else None  # of syscall(2)
_WAIT, _WAKE = 128, 129  # FUTEX_WAIT_PRIVATE, FUTEX_WAKE_PRIVATE
_WINDOWS = os.name == "nt"
if _WINDOWS:
    llvm.load_library_permanently("kernel32.dll")


@operation(types.int64, address, types.int64)
def fetch_add(builder, at, value):
    """Atomically add to the int64 at an address; gives what it held before."""
    return builder.atomic_rmw("add", builder.inttoptr(at, I64.as_pointer()), value, "seq_cst")


@operation(types.int64, address, types.int64)
def exchange(builder, at, value):
    """Atomically store an int64; gives what it held before."""
    return builder.atomic_rmw("xchg", builder.inttoptr(at, I64.as_pointer()), value, "seq_cst")


@operation(types.int64, address)
def load_shared(builder, at):
    """Atomically load an int64."""
    return builder.load_atomic(builder.inttoptr(at, I64.as_pointer()), "seq_cst", 8)


@operation(types.void)
def pause(builder):
    """Tell the core that this is a spin loop."""
    if _MACHINE.startswith(("aarch64", "arm64")):
        call(builder, "llvm.aarch64.hint", ir.VoidType(), [ir.Constant(I32, 1)])
    elif _MACHINE.startswith("x86_64"):
        call(builder, "llvm.x86.sse2.pause", ir.VoidType(), [])


def _futex(builder, at, operation_code, value):
    """syscall(2) of futex(2), without a time-out."""
    name = "syscall"
    kind = ir.FunctionType(I64, [I64], var_arg=True)
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    zero = ir.Constant(I64, 0)
    builder.call(function, [ir.Constant(I64, _FUTEX), at, ir.Constant(I64, operation_code), value, zero, zero, zero])


@operation(types.void, address, types.int64)
def sleep_while(builder, at, value):
    """Sleep while the int64 at an address has this value in its lower half, or for a moment; it may wake up early."""
    if _FUTEX is not None:
        _futex(builder, at, _WAIT, value)
    elif _WINDOWS:
        call(builder, "Sleep", ir.VoidType(), [ir.Constant(I32, 1)])
    else:
        call(builder, "usleep", I32, [ir.Constant(I32, NAP)])


@operation(types.void, address)
def wake_all(builder, at):
    """Wake those that sleep at an address."""
    if _FUTEX is not None:
        _futex(builder, at, _WAKE, ir.Constant(I64, 2**31 - 1))


@jit
def barrier(sync, threads):
    """Wait until all threads of the team have arrived. `sync`: address of the synchronisation array."""
    if threads == 1:
        return
    at = sync + 8 * ARRIVED
    ticket = fetch_add(at, 1)
    everyone = (ticket // threads + 1) * threads
    if ticket + 1 == everyone:
        if load_shared(sync + 8 * ASLEEP) > 0:
            wake_all(at)
        return
    crowded = load_shared(sync + 8 * CROWDED)
    most = CROWDED_SPINS if crowded > 0 else SPINS
    spins = 0
    while load_shared(at) < everyone and spins < most:
        spins += 1
        pause()
    if spins < most:
        if crowded > 0:
            fetch_add(sync + 8 * CROWDED, -1)
        return
    exchange(sync + 8 * CROWDED, CROWDED_WAITS)
    # Who arrives last adds to ARRIVED and then looks at ASLEEP: it sees the sleeper, or the sleeper that all are there.
    fetch_add(sync + 8 * ASLEEP, 1)
    arrived = load_shared(at)
    while arrived < everyone:
        sleep_while(at, arrived)
        arrived = load_shared(at)
    fetch_add(sync + 8 * ASLEEP, -1)


@jit
def wait_for_work(sync, member, seen):
    """Wait for an epoch other than `seen` and return it; or park the member, after a while, and return -1."""
    spins = 0
    while True:
        epoch = load_shared(sync + 8 * EPOCH)
        if epoch != seen:
            return epoch
        spins += 1
        pause()
        if spins >= IDLE_SPINS:
            spins = 0
            parked = sync + 8 * (PARKED + 8 * member)
            exchange(parked, 1)
            # Who calls the members raises CALLED first and looks at this flag then: one of the two sees the other.
            if load_shared(sync + 8 * CALLED) == 0 and load_shared(sync + 8 * EPOCH) == seen:
                return -1
            exchange(parked, 0)
