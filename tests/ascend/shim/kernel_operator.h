// The part of the AscendC API that kernels/ascend/ops uses, over host memory, in our own words. Every call checks the
// rules of the hardware that it would break on a device, and ends the process with a message where one is broken.
//
// It models one vector core at a time, of the 910B kind, or of the 310P's AI cores where SVD_310P is defined, which lack
// some calls: its UB, its queues, and the order in which its pipes see each other's work. It says nothing about speed, nor whether the toolkit's compiler accepts the source.
#ifndef SHIM_KERNEL_OPERATOR_H
#define SHIM_KERNEL_OPERATOR_H

#include "core.h"
#include "data_copy.h"
#include "failure.h"
#include "half.h"
#include "pipes.h"
#include "queues.h"
#include "tensors.h"
#include "vector_ops.h"
#include "vector_repeats.h"

#define __aicore__
#define __global__
#define __gm__
#define GM_ADDR uint8_t*
#ifdef SVD_310P
#define KERNEL_TYPE_AICORE 2
#define KERNEL_TASK_TYPE_DEFAULT(kind) static_assert((kind) == KERNEL_TYPE_AICORE, "only AI cores are modelled")
#else
#define KERNEL_TYPE_AIV_ONLY 1
#define KERNEL_TASK_TYPE_DEFAULT(kind) static_assert((kind) == KERNEL_TYPE_AIV_ONLY, "only vector kernels are modelled")
#endif

namespace AscendC {

inline int64_t GetBlockIdx()
{
    return shim::core.block;
}

inline int64_t GetBlockNum()
{
    return shim::core.blocks;
}

}  // namespace AscendC

#endif
