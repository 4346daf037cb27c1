// Copies between device memory and UB of any length, not only of multiples of 32 bytes.
#ifndef SVDENGINE_ASCEND_COPIES_H
#define SVDENGINE_ASCEND_COPIES_H

#include "kernel_operator.h"
#include "sizes.h"
#include "soc.h"
#include "sync.h"

// `count` elements into UB. What follows them in their last 32 bytes is undefined; a 310P reads it from device memory.
template <typename T>
__aicore__ inline void CopyIn(
    const AscendC::LocalTensor<T>& to, const AscendC::GlobalTensor<T>& from, uint32_t count)
{
#ifdef SVD_310P
    AscendC::DataCopy(to, from, RoundUp(count, BLOCK_BYTES / sizeof(T)));
#else
    AscendC::DataCopyExtParams size{1, static_cast<uint32_t>(count * sizeof(T)), 0, 0, 0};
    AscendC::DataCopyPad(to, from, size, AscendC::DataCopyPadExtParams<T>{false, 0, 0, 0});
#endif
}

// `count` elements out of UB. A 310P writes whole pieces of 32 bytes: what comes behind is written later, or unused.
template <typename T>
__aicore__ inline void CopyOut(
    const AscendC::GlobalTensor<T>& to, const AscendC::LocalTensor<T>& from, uint32_t count)
{
#ifdef SVD_310P
    AscendC::DataCopy(to, from, RoundUp(count, BLOCK_BYTES / sizeof(T)));
#else
    AscendC::DataCopyExtParams size{1, static_cast<uint32_t>(count * sizeof(T)), 0, 0, 0};
    AscendC::DataCopyPad(to, from, size);
#endif
}

// to (padded) float32 = from (count) float16, then zeros. staging: (padded) float16 in UB, which nothing else uses yet.
__aicore__ inline void LoadVector(AscendC::TPipe& pipe, const AscendC::LocalTensor<float>& to,
    const AscendC::GlobalTensor<half>& from, const AscendC::LocalTensor<half>& staging, uint32_t count,
    uint32_t padded)
{
    CopyIn(staging, from, count);
    AscendC::Duplicate(to, 0.0f, padded);
    VectorBarrier();
    Sync<AscendC::HardEvent::MTE2_V>(pipe);
    AscendC::Cast(to, staging, AscendC::RoundMode::CAST_NONE, count);
    VectorBarrier();
}

#endif
