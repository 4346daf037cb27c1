// What a 310P (Atlas inference series) has otherwise than a 910B, for which SVD_310P is defined: CMakeLists.txt does so
// by the name of the SoC. The sources are the pages of each call in the repository cann/asc-devkit (docs/zh/api).
#ifndef SVDENGINE_ASCEND_SOC_H
#define SVDENGINE_ASCEND_SOC_H

#include "kernel_operator.h"
#include "sync.h"

#ifdef SVD_310P
#define SVD_KERNEL_TYPE KERNEL_TYPE_AICORE  // it has no vector cores that could run alone
constexpr auto ROUND_TO_HALF = AscendC::RoundMode::CAST_NONE;  // rounds to nearest even; it lacks CAST_RINT
constexpr uint32_t SLACK_BYTES = 32;  // that copies may reach beyond what is wanted
#else
#define SVD_KERNEL_TYPE KERNEL_TYPE_AIV_ONLY  // does not start cube cores
constexpr auto ROUND_TO_HALF = AscendC::RoundMode::CAST_RINT;
constexpr uint32_t SLACK_BYTES = 0;
#endif

// Elements of device memory that copies of `count` elements may touch: the host has room for them.
template <typename T>
__aicore__ inline uint64_t Reach(uint64_t count)
{
    return count + SLACK_BYTES / sizeof(T);
}

// Weights are read once: they need not push what is used again out of the L2 cache.
template <typename T>
__aicore__ inline void ReadOnce(AscendC::GlobalTensor<T>& weights)
{
#ifdef SVD_310P
    static_cast<void>(weights);
#else
    weights.SetL2CacheHint(AscendC::CacheMode::CACHE_MODE_DISABLE);
#endif
}

// to (count,) = first, first + 1, ... The vector unit may use it afterwards.
__aicore__ inline void FillIndex(
    AscendC::TPipe& pipe, AscendC::LocalTensor<int32_t>& to, uint32_t first, uint32_t count)
{
#ifdef SVD_310P
    // No page says whether CreateVecIndex takes int32 there.
    Sync<AscendC::HardEvent::V_S>(pipe);
    for (uint32_t i = 0; i < count; ++i) {
        to.SetValue(i, static_cast<int32_t>(first + i));
    }
    Sync<AscendC::HardEvent::S_V>(pipe);
#else
    static_cast<void>(pipe);
    AscendC::CreateVecIndex(to, static_cast<int32_t>(first), count);
#endif
}

#endif
