"""Barriers and wake-ups for a team of resident threads: atomics on integers, each on a cache line of its own."""

from __future__ import annotations

import os

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import types

from svdengine.kernels.cpu import isa
from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.simd import I32, I64, ISA, address, call, operation
from svdengine.kernels.cpu.workspace import ARRIVED, CALLED, EPOCH, PARKED

# A thread that waits longer than some tens of microseconds waits for one that has lost its core. It then sleeps rather
# than yields: only a thread that wakes up is moved to an idle core, and two members on one core would stay there.
SPINS = 2_000
NAP = 50  # microseconds
IDLE_SPINS = 50_000  # before a member without work parks: about a millisecond

_MACHINE = isa.triple_of(ISA)
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


@operation(types.void)
def nap(builder):
    """Sleep for a moment."""
    if _WINDOWS:
        call(builder, "Sleep", ir.VoidType(), [ir.Constant(I32, 1)])
    else:
        call(builder, "usleep", I32, [ir.Constant(I32, NAP)])


@jit
def barrier(sync, threads):
    """Wait until all threads of the team have arrived. `sync`: address of the synchronisation array."""
    if threads == 1:
        return
    ticket = fetch_add(sync + 8 * ARRIVED, 1)
    everyone = (ticket // threads + 1) * threads
    spins = 0
    while load_shared(sync + 8 * ARRIVED) < everyone:
        spins += 1
        if spins < SPINS:
            pause()
        else:
            nap()


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
