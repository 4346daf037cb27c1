// Vector instructions that repeat over 256 bytes at a time, stepping by strides.
#ifndef SHIM_VECTOR_REPEATS_H
#define SHIM_VECTOR_REPEATS_H

#include <cstdint>
#include <cstring>

#include "core.h"
#include "failure.h"
#include "tensors.h"

namespace AscendC {

// Strides in units of 32 bytes: between the blocks of a repeat, and between repeats.
struct BinaryRepeatParams {
    uint8_t dstBlkStride, src0BlkStride, src1BlkStride, dstRepStride, src0RepStride, src1RepStride;
};

}  // namespace AscendC

namespace shim {

constexpr uint32_t FLOATS = 8;    // in 32 bytes
constexpr uint32_t REPEAT = 64;   // floats in a repeat

inline void CheckRepeats(const char* name, uint64_t mask, int64_t repeats)
{
    if (mask != REPEAT) {
        Fail("%s: only whole repeats of 64 floats are modelled", name);
    }
    if (repeats < 1 || repeats > 255) {
        Fail("%s: %lld repeats, an instruction takes 1 to 255", name, static_cast<long long>(repeats));
    }
}

template <typename Operation>
void Repeated(const char* name, const AscendC::LocalTensor<float>& to, const AscendC::LocalTensor<float>& a,
    const AscendC::LocalTensor<float>& b, uint64_t mask, uint8_t repeats, const AscendC::BinaryRepeatParams& p,
    Operation operation)
{
    CheckRepeats(name, mask, repeats);
    if (p.dstBlkStride != 1 || p.src0BlkStride != 1 || p.src1BlkStride != 1) {
        Fail("%s: only neighbouring blocks are modelled", name);
    }
    if (repeats > 1 && p.dstRepStride < FLOATS) {
        Fail("%s: repeats overwrite each other", name);
    }
    to.CheckAligned(ALIGNMENT, name);
    a.CheckAligned(ALIGNMENT, name);
    b.CheckAligned(ALIGNMENT, name);
    const uint32_t number = core.pipes.Start(PIPE_V);
    for (uint32_t r = 0; r < repeats; ++r) {
        const float* x = a.Read(PIPE_V, number, r * p.src0RepStride * FLOATS, REPEAT);
        const float* y = b.Read(PIPE_V, number, r * p.src1RepStride * FLOATS, REPEAT);
        float* out = to.Write(PIPE_V, number, r * p.dstRepStride * FLOATS, REPEAT);
        for (uint32_t i = 0; i < REPEAT; ++i) {
            out[i] = operation(x[i], y[i]);
        }
    }
}

}  // namespace shim

namespace AscendC {

inline void Add(const LocalTensor<float>& to, const LocalTensor<float>& a, const LocalTensor<float>& b, uint64_t mask,
    uint8_t repeats, const BinaryRepeatParams& strides)
{
    shim::Repeated("Add", to, a, b, mask, repeats, strides, [](float x, float y) { return x + y; });
}

inline void Mul(const LocalTensor<float>& to, const LocalTensor<float>& a, const LocalTensor<float>& b, uint64_t mask,
    uint8_t repeats, const BinaryRepeatParams& strides)
{
    shim::Repeated("Mul", to, a, b, mask, repeats, strides, [](float x, float y) { return x * y; });
}

// One sum a repeat, pairwise. The target needs the alignment of one float only; its stride is in elements.
inline void WholeReduceSum(const LocalTensor<float>& to, const LocalTensor<float>& from, int32_t mask, int32_t repeats,
    int32_t to_stride, int32_t block_stride, int32_t repeat_stride)
{
    shim::CheckRepeats("WholeReduceSum", static_cast<uint64_t>(mask), repeats);
    if (to_stride < 1 || block_stride != 1 || repeat_stride < 0) {
        shim::Fail("WholeReduceSum: strides %d, %d and %d", to_stride, block_stride, repeat_stride);
    }
    to.CheckAligned(sizeof(float), "WholeReduceSum");
    from.CheckAligned(shim::ALIGNMENT, "WholeReduceSum");
    const uint32_t number = shim::core.pipes.Start(PIPE_V);
    for (int32_t r = 0; r < repeats; ++r) {
        const uint64_t start = static_cast<uint64_t>(r) * repeat_stride * shim::FLOATS;
        const float* x = from.Read(PIPE_V, number, start, shim::REPEAT);
        float sums[shim::REPEAT];
        std::memcpy(sums, x, sizeof sums);
        for (uint32_t left = shim::REPEAT / 2; left > 0; left /= 2) {
            for (uint32_t i = 0; i < left; ++i) {
                sums[i] = sums[2 * i] + sums[2 * i + 1];
            }
        }
        *to.Write(PIPE_V, number, static_cast<uint64_t>(r) * to_stride, 1) = sums[0];
    }
}

}  // namespace AscendC

#endif
