// Vector instructions on the first n elements of their operands.
#ifndef SHIM_VECTOR_OPS_H
#define SHIM_VECTOR_OPS_H

#include <cstdint>

#include "core.h"
#include "failure.h"
#include "tensors.h"

namespace AscendC {

enum class RoundMode { CAST_NONE, CAST_RINT };
enum class CMPMODE { LT, GT, EQ, LE, GE, NE };

struct GatherMaskParams {
    uint8_t src0BlockStride;
    uint16_t repeatTimes, src0RepeatStride;
    uint8_t src1RepeatStride;
};

}  // namespace AscendC

namespace shim {

// Operands of one vector instruction.
class VectorOp {
public:
    VectorOp(const char* name, uint64_t count) : name_(name), count_(count), number_(core.pipes.Start(PIPE_V))
    {
        if (count == 0) {
            Fail("%s: of nothing", name);
        }
    }

    template <typename T>
    const T* Read(const AscendC::LocalTensor<T>& source) const
    {
        source.CheckAligned(ALIGNMENT, name_);
        return source.Read(PIPE_V, number_, 0, count_);
    }

    template <typename T>
    T* Write(const AscendC::LocalTensor<T>& target) const
    {
        return Write(target, count_);
    }

    template <typename T>
    T* Write(const AscendC::LocalTensor<T>& target, uint64_t count) const
    {
        target.CheckAligned(ALIGNMENT, name_);
        return target.Write(PIPE_V, number_, 0, count);
    }

    // An operand may be the target itself; one that is shifted against it would be overwritten while it is read.
    template <typename T, typename U>
    void CheckApart(const AscendC::LocalTensor<T>& target, const AscendC::LocalTensor<U>& source) const
    {
        const size_t target_end = target.Offset() + count_ * sizeof(T);
        const size_t source_end = source.Offset() + count_ * sizeof(U);
        const bool same = target.Offset() == source.Offset() && sizeof(T) == sizeof(U);
        if (!same && target.Offset() < source_end && source.Offset() < target_end) {
            Fail("%s: the target overlaps an operand", name_);
        }
    }

private:
    const char* name_;
    uint64_t count_;
    uint32_t number_;
};

template <typename T, typename Operation>
void Elementwise(const char* name, const AscendC::LocalTensor<T>& to, const AscendC::LocalTensor<T>& a,
    const AscendC::LocalTensor<T>& b, uint64_t count, Operation operation)
{
    const VectorOp op(name, count);
    op.CheckApart(to, a);
    op.CheckApart(to, b);
    const T* x = op.Read(a);
    const T* y = op.Read(b);
    T* out = op.Write(to);
    for (uint64_t i = 0; i < count; ++i) {
        out[i] = operation(x[i], y[i]);
    }
}

template <typename To, typename From>
void Convert(const AscendC::LocalTensor<To>& to, const AscendC::LocalTensor<From>& from, uint64_t count)
{
    const VectorOp op("Cast", count);
    op.CheckApart(to, from);
    const From* x = op.Read(from);
    To* out = op.Write(to);
    for (uint64_t i = 0; i < count; ++i) {
        out[i] = static_cast<To>(x[i]);
    }
}

}  // namespace shim

namespace AscendC {

inline void Add(
    const LocalTensor<float>& to, const LocalTensor<float>& a, const LocalTensor<float>& b, int32_t count)
{
    shim::Elementwise("Add", to, a, b, count, [](float x, float y) { return x + y; });
}

inline void Mul(
    const LocalTensor<float>& to, const LocalTensor<float>& a, const LocalTensor<float>& b, int32_t count)
{
    shim::Elementwise("Mul", to, a, b, count, [](float x, float y) { return x * y; });
}

inline void Relu(const LocalTensor<float>& to, const LocalTensor<float>& from, int32_t count)
{
    shim::Elementwise("Relu", to, from, from, count, [](float x, float) { return x > 0 ? x : 0; });
}

// to += scalar * from
inline void Axpy(const LocalTensor<float>& to, const LocalTensor<float>& from, float scalar, int32_t count)
{
    shim::Elementwise("Axpy", to, to, from, count, [scalar](float x, float y) { return x + scalar * y; });
}

inline void Cast(const LocalTensor<float>& to, const LocalTensor<half>& from, RoundMode mode, uint32_t count)
{
    if (mode != RoundMode::CAST_NONE) {
        shim::Fail("Cast: float16 to float32 does not round");
    }
    shim::Convert(to, from, count);
}

inline void Cast(const LocalTensor<half>& to, const LocalTensor<float>& from, RoundMode mode, uint32_t count)
{
#ifdef SVD_310P
    const RoundMode nearest = RoundMode::CAST_NONE;  // which rounds so; there is no CAST_RINT
#else
    const RoundMode nearest = RoundMode::CAST_RINT;
#endif
    if (mode != nearest) {
        shim::Fail("Cast: only rounding to nearest even is modelled");
    }
    shim::Convert(to, from, count);
}

template <typename T>
void Duplicate(const LocalTensor<T>& to, T value, int32_t count)
{
    const shim::VectorOp op("Duplicate", count);
    T* out = op.Write(to);
    for (int32_t i = 0; i < count; ++i) {
        out[i] = value;
    }
}

#ifndef SVD_310P
template <typename T>
void CreateVecIndex(LocalTensor<T>& to, T first, uint32_t count)
{
    const shim::VectorOp op("CreateVecIndex", count);
    T* out = op.Write(to);
    for (uint32_t i = 0; i < count; ++i) {
        out[i] = first + static_cast<T>(i);
    }
}
#endif

// One bit an element, lowest bits of a byte first.
inline void CompareScalar(
    const LocalTensor<uint8_t>& to, const LocalTensor<float>& from, float scalar, CMPMODE mode, uint32_t count)
{
    if (mode != CMPMODE::GT) {
        shim::Fail("CompareScalar: only GT is modelled");
    }
    if (count * sizeof(float) % 256 != 0) {
        shim::Fail("CompareScalar: %u floats are no multiple of 256 bytes", count);
    }
    const shim::VectorOp op("CompareScalar", count);
    const float* x = op.Read(from);
    uint8_t* out = op.Write(to, count / 8);
    for (uint32_t i = 0; i < count / 8; ++i) {
        uint8_t bits = 0;
        for (uint32_t bit = 0; bit < 8; ++bit) {
            bits |= static_cast<uint8_t>((x[8 * i + bit] > scalar) << bit);
        }
        out[i] = bits;
    }
}

// Packs the elements whose bit is 1. Only the counter mode with one repeat, whose meaning all versions share.
template <typename T>
void GatherMask(const LocalTensor<T>& to, const LocalTensor<T>& from, const LocalTensor<uint32_t>& pattern,
    bool counter, uint32_t count, const GatherMaskParams& shape, uint64_t& kept)
{
    static_assert(sizeof(T) == 4, "a pattern of uint32_t is for elements of four bytes");
    if (!counter || shape.repeatTimes != 1 || shape.src0BlockStride != 1) {
        shim::Fail("GatherMask: only one repeat in counter mode is modelled");
    }
    if (count % 64 != 0) {
        shim::Fail("GatherMask: what %u elements give, no multiple of 64, is not established", count);
    }
    const shim::VectorOp op("GatherMask", count);
    if (to.Offset() < from.Offset() + count * 4 && from.Offset() < to.Offset() + count * 4) {
        shim::Fail("GatherMask: the target overlaps an operand");
    }
    const T* x = op.Read(from);
    const shim::VectorOp bits("GatherMask", count / 32);
    const uint32_t* mask = bits.Read(pattern);
    T* out = op.Write(to);
    kept = 0;
    for (uint32_t i = 0; i < count; ++i) {
        if (mask[i / 32] >> (i % 32) & 1) {
            out[kept++] = x[i];
        }
    }
}

}  // namespace AscendC

#endif
