// Products of float16 rows with a float32 vector, summed in float32 by a tree that depends on the columns only.
#ifndef SVDENGINE_ASCEND_DOTS_H
#define SVDENGINE_ASCEND_DOTS_H

#include "kernel_operator.h"
#include "sizes.h"
#include "sync.h"

// Short rows: one instruction does a column group of all rows, stepping from row to row by its repeat stride.
__aicore__ inline void DotShortRows(const AscendC::LocalTensor<float>& dst, const AscendC::LocalTensor<float>& x,
    const AscendC::LocalTensor<float>& work, uint32_t count, uint32_t columns)
{
    const uint8_t step = static_cast<uint8_t>(columns * sizeof(float) / BLOCK_BYTES);
    uint32_t groups = columns / LANES;
    for (uint32_t g = 0; g < groups; ++g) {
        const uint32_t at = g * LANES;
        AscendC::Mul(work[at], work[at], x[at], static_cast<uint64_t>(LANES), static_cast<uint8_t>(count),
            AscendC::BinaryRepeatParams{1, 1, 1, step, step, 0});
    }
    VectorBarrier();
    while (groups > 1) {
        const uint32_t half_of = (groups + 1) / 2;
        for (uint32_t g = 0; g + half_of < groups; ++g) {
            const uint32_t at = g * LANES;
            AscendC::Add(work[at], work[at], work[at + half_of * LANES], static_cast<uint64_t>(LANES),
                static_cast<uint8_t>(count), AscendC::BinaryRepeatParams{1, 1, 1, step, step, step});
        }
        VectorBarrier();
        groups = half_of;
    }
    AscendC::WholeReduceSum(dst, work, static_cast<int32_t>(LANES), static_cast<int32_t>(count), 1, 1,
        static_cast<int32_t>(step));
}

// Long rows: one instruction does a row, whose length no repeat stride could step over.
__aicore__ inline void DotLongRows(const AscendC::LocalTensor<float>& dst, const AscendC::LocalTensor<float>& x,
    const AscendC::LocalTensor<float>& work, uint32_t count, uint32_t columns)
{
    for (uint32_t r = 0; r < count; ++r) {
        AscendC::Mul(work[r * columns], work[r * columns], x, columns);
    }
    VectorBarrier();
    uint32_t groups = columns / LANES;
    while (groups > 1) {
        const uint32_t half_of = (groups + 1) / 2;
        for (uint32_t r = 0; r < count; ++r) {
            const uint32_t at = r * columns;
            AscendC::Add(work[at], work[at], work[at + half_of * LANES], (groups - half_of) * LANES);
        }
        VectorBarrier();
        groups = half_of;
    }
    for (uint32_t r = 0; r < count; ++r) {
        AscendC::WholeReduceSum(dst[r], work[r * columns], static_cast<int32_t>(LANES), 1, 1, 1, 8);
    }
}

// dst[r] = row r . x, for `count` rows that lie one after the other.
// rows: (count, columns) float16; x: (columns,) float32; work: (count, columns) float32, overwritten.
// columns: a multiple of LANES; count: at most MAX_SLOT_ROWS.
__aicore__ inline void DotRows(const AscendC::LocalTensor<float>& dst, const AscendC::LocalTensor<half>& rows,
    const AscendC::LocalTensor<float>& x, const AscendC::LocalTensor<float>& work, uint32_t count, uint32_t columns)
{
    AscendC::Cast(work, rows, AscendC::RoundMode::CAST_NONE, count * columns);
    VectorBarrier();
    if (columns * sizeof(float) / BLOCK_BYTES <= MAX_REPEAT) {
        DotShortRows(dst, x, work, count, columns);
    } else {
        DotLongRows(dst, x, work, count, columns);
    }
    VectorBarrier();
}

#endif
