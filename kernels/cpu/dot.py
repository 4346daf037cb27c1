"""Integer dot products, the only arithmetic that differs between instruction sets, and how packed bits are unpacked.

Activations are planes of int8 in -127..127 (quantize.py). `vpdpbusd` wants one side unsigned, so int8 weights are
offset by BIAS in the register, and sum(w * a) = sum((w + BIAS) * a) - BIAS * sum(a): the caller subtracts the last
term, whose sum over a group is made once for all rows.
"""

from __future__ import annotations

from svdengine.kernels.cpu import isa
from svdengine.kernels.cpu.simd import (
    F16,
    F32,
    F32V,
    I8,
    I8V,
    I16,
    I32,
    I32V,
    ISA,
    address,
    call,
    f32x16,
    fused,
    half_to_float,
    ir,
    load,
    operation,
    shuffle,
    splat,
)

BIAS = isa.weight_bias(ISA)
BLOCK = 64  # columns in one vector of bytes
CHUNK = 512  # columns whose scales fill one vector
_SIXTEEN, _FOUR = ir.VectorType(I8, 16), ir.VectorType(I32, 4)  # registers of Arm


def _pieces(builder, vector, lanes):
    """Split a vector into pieces of `lanes`."""
    return [shuffle(builder, vector, vector, list(range(s, s + lanes))) for s in range(0, vector.type.count, lanes)]


def _joined(builder, pieces):
    while len(pieces) > 1:
        count = pieces[0].type.count
        pieces = [
            shuffle(builder, a, b, list(range(2 * count))) for a, b in zip(pieces[::2], pieces[1::2], strict=True)
        ]
    return pieces[0]


def emit_dot(builder, total, weights, activations):
    """total (16 int32) + sums of 4 neighbouring products. weights: 64 bytes, biased by BIAS; activations: 64 int8."""
    if isa.wide(ISA):
        w, a = builder.bitcast(weights, I32V), builder.bitcast(activations, I32V)
        return call(builder, "llvm.x86.avx512.vpdpbusd.512", I32V, [total, w, a])
    if ISA == isa.AVXVNNI:
        half = ir.VectorType(I32, 8)
        parts = zip(
            _pieces(builder, total, 8), _pieces(builder, weights, 32), _pieces(builder, activations, 32), strict=True
        )
        sums = [
            call(builder, "llvm.x86.avx512.vpdpbusd.256", half, [t, builder.bitcast(w, half), builder.bitcast(a, half)])
            for t, w, a in parts
        ]
        return _joined(builder, sums)
    if ISA == isa.AVX2:
        return builder.add(total, _dot_avx2(builder, weights, activations))
    if ISA in isa.ARM_ISAS:
        parts = zip(
            _pieces(builder, total, 4), _pieces(builder, weights, 16), _pieces(builder, activations, 16), strict=True
        )
        return _joined(builder, [_arm_dot(builder, "sdot", *part) for part in parts])
    wide = ir.VectorType(I32, 64)
    products = builder.mul(builder.sext(weights, wide), builder.sext(activations, wide))
    for phase in range(4):
        total = builder.add(total, shuffle(builder, products, products, list(range(phase, 64, 4))))
    return total


def emit_products(builder, weights, rows, columns):
    """Integer products of 16 rows of weights with activation rows over a group of 32 columns: 16 int32 each, by row.

    weights(step): vector `step` of the group's 8, in the order of panels (tile.py), as `emit_dot` wants it. rows: where
    the group begins in the high planes; the low ones are `columns` bytes on.
    """
    if ISA in isa.ARM_ISAS:
        return _arm_products(builder, weights, rows, columns)
    high, low = ([ir.Constant(I32V, [0] * 16)] * len(rows) for _ in range(2))
    for step in range(8):
        w = weights(step)
        for t, row in enumerate(rows):
            for sums, plane in ((high, row), (low, builder.add(row, columns))):
                four = load(builder, plane, I32, 4 * step)
                sums[t] = emit_dot(builder, sums[t], w, builder.bitcast(splat(builder, four), I8V))
    return [_of_planes(builder, h, rest) for h, rest in zip(high, low, strict=True)]


def _of_planes(builder, high, low):
    return builder.add(builder.shl(high, ir.Constant(I32V, [8] * 16)), low)


def _arm_products(builder, weights, rows, columns):
    """`emit_products` register by register: as few as possible are in use at once, and 32 are all there are.

    sdot multiplies 4 rows x 4 columns of weights with 4 activations, a lane of a register. smmla multiplies 2 rows x 8
    columns with 8 x 2 activations: those of the two planes of a row.
    """
    zero, matrix = ir.Constant(_FOUR, [0] * 4), ISA == isa.I8MM
    sums = [[zero] * 8 for _ in rows]  # sdot: 4 registers of the high plane, then 4 of the low one. smmla: 2 rows each
    for half in range(2):
        planes = [[load(builder, at, _SIXTEEN, 16 * half) for at in (row, builder.add(row, columns))] for row in rows]
        for step in range(4):
            _no_reordering(builder)
            w = _pieces(builder, weights(4 * half + step), 16)
            first = 4 * (step % 2)  # of the sums of rows 0..7, or 8..15
            for part, piece in enumerate(w):
                for t, pair in enumerate(planes):
                    if matrix:
                        eight = shuffle(builder, *pair, _eights(8 * (step // 2)))
                        sums[t][first + part] = _arm_dot(builder, "smmla", sums[t][first + part], piece, eight)
                        continue
                    for i, plane in enumerate(pair):
                        words = builder.bitcast(plane, _FOUR)
                        four = builder.bitcast(shuffle(builder, words, words, [step] * 4), _SIXTEEN)
                        sums[t][4 * i + part] = _arm_dot(builder, "sdot", sums[t][4 * i + part], piece, four)
    results = []
    for own in sums:
        high, low = _joined(builder, own[:4]), _joined(builder, own[4:])
        if matrix:
            high, low = (shuffle(builder, high, low, list(range(plane, 32, 2))) for plane in range(2))
        results.append(_of_planes(builder, high, low))
    _no_reordering(builder)
    return results


def _no_reordering(builder):
    """Nothing is loaded earlier than here, or kept for later: it would take registers of the sums."""
    builder.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], True)


def _eights(first):
    """Lanes first..first + 8 of two vectors of 16, side by side."""
    return [source + lane for source in (0, 16) for lane in range(first, first + 8)]


def _arm_dot(builder, name, total, weights, activations):
    return call(builder, f"llvm.aarch64.neon.{name}.v4i32.v16i8", _FOUR, [total, weights, activations])


def _dot_avx2(builder, weights, activations):
    """|w| * (a with w's sign): pairs fit int16, since neither side holds -128."""
    words, sums = ir.VectorType(I16, 16), ir.VectorType(I32, 8)
    ones = ir.Constant(words, [1] * 16)
    results = []
    for w, a in zip(_pieces(builder, weights, 32), _pieces(builder, activations, 32), strict=True):
        size = call(builder, "llvm.x86.avx2.psign.b", w.type, [w, w])
        signed = call(builder, "llvm.x86.avx2.psign.b", w.type, [a, w])
        pairs = call(builder, "llvm.x86.avx2.pmadd.ub.sw", words, [size, signed])
        results.append(call(builder, "llvm.x86.avx2.pmadd.wd", sums, [pairs, ones]))
    return _joined(builder, results)


def emit_bias(builder, weights):
    """int8 weights as `emit_dot` wants them."""
    return builder.xor(weights, ir.Constant(I8V, [128] * 64)) if BIAS else weights


def emit_nibbles(builder, at, offset=0):
    """32 packed bytes as 64 values in 0..15: the low halves, then the high halves."""
    packed = load(builder, at, ir.VectorType(I8, 32), offset)
    both = shuffle(builder, packed, packed, list(range(32)) * 2)
    if isa.wide(ISA):
        # One shift by 0 or 4 of 16-bit lanes; the mask removes what crosses a byte.
        wide = ir.VectorType(I16, 32)
        shifted = builder.lshr(builder.bitcast(both, wide), ir.Constant(wide, [0] * 16 + [4] * 16))
        return builder.and_(builder.bitcast(shifted, I8V), ir.Constant(I8V, [15] * 64))
    low = builder.and_(packed, ir.Constant(packed.type, [15] * 32))
    high = builder.lshr(packed, ir.Constant(packed.type, [4] * 32))
    return shuffle(builder, low, high, list(range(64)))


def emit_scaled(builder, total, dots, scales, block):
    """total + dots * (the scales of the block's two groups)."""
    spread = shuffle(builder, scales, scales, [2 * block] * 8 + [2 * block + 1] * 8)
    return fused(builder, builder.sitofp(dots, F32V), spread, total)


def emit_dot_16(builder, weights, high, low):
    """Sums of 4 neighbouring products of biased int8 weights with 16-bit activations at two addresses."""
    dots = emit_dot(builder, ir.Constant(I32V, [0] * 16), weights, load(builder, high, I8V))
    return emit_dot(builder, builder.shl(dots, ir.Constant(I32V, [8] * 16)), weights, load(builder, low, I8V))


def emit_two_bits(builder, at):
    """16 packed bytes as 64 values in 0..3: the lowest bit pairs of all bytes first."""
    packed = load(builder, at, ir.VectorType(I8, 16))
    if not isa.wide(ISA):
        shifts = [builder.lshr(packed, ir.Constant(packed.type, [shift] * 16)) for shift in (0, 2, 4, 6)]
        return builder.and_(_joined(builder, shifts), ir.Constant(I8V, [3] * 64))
    wide = ir.VectorType(I16, 32)
    all_four = builder.bitcast(shuffle(builder, packed, packed, list(range(16)) * 4), wide)
    shifted = builder.lshr(all_four, ir.Constant(wide, [0] * 8 + [2] * 8 + [4] * 8 + [6] * 8))
    return builder.and_(builder.bitcast(shifted, I8V), ir.Constant(I8V, [3] * 64))


def emit_one_bit(builder, at):
    """8 packed bytes as 64 values in 0..1, lowest bit first."""
    bits = builder.bitcast(load(builder, at, ir.IntType(64)), ir.VectorType(ir.IntType(1), 64))
    return builder.zext(bits, I8V)


def _two_lanes(builder, pair):
    """Two float32 in lanes 0 and 1, zeros after them."""
    return shuffle(builder, pair, ir.Constant(pair.type, [0.0, 0.0]), [0, 1] + [2] * 14)


@operation(f32x16, address)
def load_f32_pair(builder, at):
    """Two float32, then zeros."""
    return _two_lanes(builder, load(builder, at, ir.VectorType(F32, 2)))


@operation(f32x16, address)
def load_f16_pair(builder, at):
    """Two float16, widened, then zeros."""
    return _two_lanes(builder, half_to_float(builder, load(builder, at, ir.VectorType(F16, 2))))


@operation(f32x16, address)
def load_u8_pair(builder, at):
    """Two unsigned bytes, converted, then zeros."""
    return _two_lanes(builder, builder.uitofp(load(builder, at, ir.VectorType(I8, 2)), ir.VectorType(F32, 2)))
