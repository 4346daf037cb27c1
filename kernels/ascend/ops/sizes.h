// Sizes that the kernels and the host (kernels/ascend/tiling.py) agree on.
#ifndef SVDENGINE_ASCEND_SIZES_H
#define SVDENGINE_ASCEND_SIZES_H

#include "kernel_operator.h"

constexpr uint32_t LANES = 64;           // floats in a repeat of 256 bytes; rows and compares are multiples of it
constexpr uint32_t BLOCK_BYTES = 32;     // unit of UB addresses and of strides
constexpr uint32_t MAX_REPEAT = 255;     // repeats, and blocks of a repeat stride, that an instruction takes
constexpr uint32_t CHUNK = 512;          // neurons of a list that are in UB at once
constexpr uint32_t COUNT_INTS = 8;       // int32 in the count record of a block, 32 bytes; the first is used
constexpr uint32_t MAX_PRODUCERS = 64;   // blocks that may have written a list
constexpr uint32_t MAX_COLUMNS = 8192;   // of a row, padded: more does not fit in UB
constexpr uint32_t ROW_SLOT = 8192;      // float16 in a slot of listed rows, 16 KB: at least one row
constexpr uint32_t ROW_SLOTS = 3;        // slots: rows are copied while others are multiplied
constexpr uint32_t WINDOW = 2048;        // neighbouring entries of a bias that are in UB at once, 8 KB
constexpr uint32_t MAX_SLOT_ROWS = 128;  // rows in a slot, so that one instruction can repeat over them

__aicore__ inline uint32_t RoundUp(uint32_t n, uint32_t multiple)
{
    return (n + multiple - 1) / multiple * multiple;
}

__aicore__ inline uint32_t Smaller(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

// First of `count` things that belongs to `block`; the next block's first is this block's end. Shares differ by one.
__aicore__ inline uint32_t ShareStart(uint32_t count, uint32_t block, uint32_t blocks)
{
    return static_cast<uint32_t>(static_cast<uint64_t>(count) * block / blocks);
}

// Rows of `columns` float16 in a slot of `elements`.
__aicore__ inline uint32_t RowsInSlot(uint32_t elements, uint32_t columns)
{
    return Smaller(elements / columns, MAX_SLOT_ROWS);
}

#endif
