"""Integer products by AMX's tile registers: 16 activation rows times 16 weight rows at once.

A panel of weights (panels.py, and those that formats pack) lies as a tile wants it: 16 rows side by side, four columns
of each. A group of 32 columns is a product of its own, since it has its own scales: a tile of 8 lines of weights times
one of 16 lines of 32 bytes of activations, for the high and the low plane. Sums are exact in int32, so that results
are bit for bit those of the dot products (dot.py).

Method: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18 (Programming with AMX).
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir
from numba.core import cgutils, types

from svdengine.kernels.cpu import isa
from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.simd import I8, I8V, I32V, I64, ISA, call, load, operation, store

AMX = isa.AMX == ISA
TILE_ROWS = 16  # of activations; a tile of 8 was no faster than the dot products
GROUPS = 2  # products that are on their way at once
GROUP_BYTES = 512  # of weights: 16 rows of 32 columns

_HIGH, _LOW, _WEIGHTS = 4, 5, 6  # tiles of operands; those of sums are 0, 1 of the first group and 2, 3 of the second
_SUM_BYTES = 1024  # of a tile of sums
SUMS_BYTES = GROUPS * 2 * _SUM_BYTES


def _configuration() -> ir.Constant:
    """The 64 bytes that say how large the tiles are."""
    size = bytearray(64)
    size[0] = 1  # the palette
    for tile in range(7):
        lines, line_bytes = (8, 64) if tile == _WEIGHTS else (TILE_ROWS, 32 if tile in (_HIGH, _LOW) else 64)
        size[16 + 2 * tile], size[48 + tile] = line_bytes, lines
    return ir.Constant(I8V, list(size))


@operation(types.void)
def _take(builder):
    """Take the tile registers into use."""
    place = cgutils.alloca_once(builder, I8V)
    builder.store(_configuration(), place).align = 1
    call(builder, "llvm.x86.ldtilecfg", ir.VoidType(), [builder.bitcast(place, I8.as_pointer())])


@operation(types.void)
def _release(builder):
    """Give the tile registers back: a thread that uses none is switched faster."""
    call(builder, "llvm.x86.tilerelease", ir.VoidType(), [])


@jit
def start_tiles(n):
    """Take tiles for products with n activation rows, where there are enough of them; gives whether it did."""
    if AMX and n >= TILE_ROWS:
        _take()
        return True
    return False


@jit
def end_tiles(tiles):
    """Give back the tiles, if `start_tiles` took them."""
    if AMX and tiles:
        _release()


def emit_room(builder: ir.IRBuilder, size: int) -> ir.Value:
    """Address of so many bytes on the stack, at the start of a cache line."""
    room = cgutils.alloca_once(builder, ir.ArrayType(I8, size + 64))
    whole = builder.add(builder.ptrtoint(room, I64), ir.Constant(I64, 63))
    return builder.and_(whole, ir.Constant(I64, -64))


def emit_unpacked(builder: ir.IRBuilder, room: ir.Value, vectors: list[ir.Value]) -> ir.Value:
    """Weights of GROUPS products, 8 vectors each, stored for tiles; gives their address."""
    for i, vector in enumerate(vectors):
        store(builder, builder.add(room, ir.Constant(I64, 64 * i)), vector)
    return room


def emit_tile_products(
    builder: ir.IRBuilder,
    weights: list[ir.Value],
    x: list[ir.Value],
    stride: ir.Value,
    columns: ir.Value,
    room: ir.Value,
) -> None:
    """Products of a group's weights at each address with the activation rows at the address beside it.

    stride: bytes between rows. room: address of SUMS_BYTES, for the sums of both planes; `sums_at` reads them.
    """
    line = ir.Constant(I64, 64)
    for group, (w, high) in enumerate(zip(weights, x, strict=True)):
        sums = 2 * group
        _load(builder, _WEIGHTS, w, line)
        for plane, tile in enumerate((_HIGH, _LOW)):
            call(builder, "llvm.x86.tilezero", ir.VoidType(), [_number(sums + plane)])
            _load(builder, tile, builder.add(high, columns) if plane else high, stride)
            numbers = [_number(sums + plane), _number(tile), _number(_WEIGHTS)]
            call(builder, "llvm.x86.tdpbsud", ir.VoidType(), numbers)
    for tile in range(2 * len(weights)):
        at = builder.inttoptr(builder.add(room, ir.Constant(I64, _SUM_BYTES * tile)), I8.as_pointer())
        call(builder, "llvm.x86.tilestored64", ir.VoidType(), [_number(tile), at, line])


def sums_at(builder: ir.IRBuilder, room: ir.Value) -> Callable[[int, int], ir.Value]:
    """What `emit_tile_products` stored, by group and row: the 16 int32 sums of both planes, 256 * high + low."""

    def sums_of(group: int, row: int) -> ir.Value:
        at = 2 * _SUM_BYTES * group + 64 * row
        high, low = load(builder, room, I32V, at), load(builder, room, I32V, at + _SUM_BYTES)
        return builder.add(builder.shl(high, ir.Constant(I32V, [8] * 16)), low)

    return sums_of


def _number(tile: int) -> ir.Constant:
    return ir.Constant(I8, tile)


def _load(builder: ir.IRBuilder, tile: int, at: ir.Value, stride: ir.Value) -> None:
    at = builder.inttoptr(at, I8.as_pointer())
    call(builder, "llvm.x86.tileloadd64", ir.VoidType(), [_number(tile), at, stride])
