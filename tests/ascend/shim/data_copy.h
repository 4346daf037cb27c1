// Copies between device memory and UB.
#ifndef SHIM_DATA_COPY_H
#define SHIM_DATA_COPY_H

#include <cstdint>
#include <cstring>

#include "core.h"
#include "failure.h"
#include "tensors.h"

namespace AscendC {

// Lengths and gaps in units of 32 bytes.
struct DataCopyParams {
    uint16_t blockCount, blockLen, srcStride, dstStride;
};

// Length in bytes; gaps in bytes in device memory, in units of 32 bytes in UB.
struct DataCopyExtParams {
    uint16_t blockCount;
    uint32_t blockLen, srcStride, dstStride, rsv;
};

template <typename T>
struct DataCopyPadExtParams {
    bool isPad;
    uint8_t leftPadding, rightPadding;
    T paddingValue;
};

}  // namespace AscendC

namespace shim {

template <typename T>
void CheckWholeBlocks(uint64_t count)
{
    if (count == 0) {
        Fail("DataCopy: of nothing");
    }
    if (count * sizeof(T) % ALIGNMENT != 0) {
        Fail("DataCopy: %llu bytes are no multiple of 32, the rest would not be copied",
            static_cast<unsigned long long>(count * sizeof(T)));
    }
}

template <typename T>
void CheckPadded(const AscendC::DataCopyExtParams& size)
{
    if (size.blockCount != 1 || size.srcStride != 0 || size.dstStride != 0) {
        Fail("DataCopyPad: only one piece is modelled");
    }
    if (size.blockLen == 0 || size.blockLen > 2097151) {
        Fail("DataCopyPad: a piece of %u bytes", size.blockLen);
    }
    if (size.blockLen % sizeof(T) != 0) {
        Fail("DataCopyPad: %u bytes are no whole elements", size.blockLen);
    }
}

}  // namespace shim

namespace AscendC {

template <typename T>
void DataCopy(const LocalTensor<T>& to, const GlobalTensor<T>& from, uint32_t count)
{
    shim::CheckWholeBlocks<T>(count);
    to.CheckAligned(shim::ALIGNMENT, "DataCopy");
    from.CheckCount(count);
    T* data = to.Write(PIPE_MTE2, shim::core.pipes.Start(PIPE_MTE2), 0, count);
    shim::ReadDevice(data, from.Data(), count * sizeof(T));
}

template <typename T>
void DataCopy(const GlobalTensor<T>& to, const LocalTensor<T>& from, uint32_t count)
{
    shim::CheckWholeBlocks<T>(count);
    from.CheckAligned(shim::ALIGNMENT, "DataCopy");
    to.CheckCount(count);
    const T* data = from.Read(PIPE_MTE3, shim::core.pipes.Start(PIPE_MTE3), 0, count);
    shim::WriteDevice(to.Data(), data, count * sizeof(T));
}

template <typename T>
void DataCopy(const LocalTensor<T>& to, const GlobalTensor<T>& from, const DataCopyParams& shape)
{
    const uint64_t unit = shim::ALIGNMENT / sizeof(T);
    if (shape.blockCount == 0 || shape.blockCount > 4095 || shape.blockLen == 0) {
        shim::Fail("DataCopy: %u pieces of %u blocks", shape.blockCount, shape.blockLen);
    }
    to.CheckAligned(shim::ALIGNMENT, "DataCopy");
    const uint32_t number = shim::core.pipes.Start(PIPE_MTE2);
    for (uint64_t i = 0; i < shape.blockCount; ++i) {
        const uint64_t source = i * (shape.blockLen + shape.srcStride) * unit;
        from.CheckCount(source + shape.blockLen * unit);
        T* data = to.Write(PIPE_MTE2, number, i * (shape.blockLen + shape.dstStride) * unit, shape.blockLen * unit);
        shim::ReadDevice(data, from.Data() + source, shape.blockLen * unit * sizeof(T));
    }
}

#ifndef SVD_310P
// The last 32 bytes that are touched are written whole; what pads them is undefined, here NaN.
template <typename T>
void DataCopyPad(const LocalTensor<T>& to, const GlobalTensor<T>& from, const DataCopyExtParams& size,
    const DataCopyPadExtParams<T>& padding)
{
    shim::CheckPadded<T>(size);
    if (padding.isPad || padding.leftPadding != 0 || padding.rightPadding != 0) {
        shim::Fail("DataCopyPad: padding with a value is not modelled");
    }
    to.CheckAligned(shim::ALIGNMENT, "DataCopyPad");
    from.CheckCount(size.blockLen / sizeof(T));
    const uint64_t whole = (size.blockLen + shim::ALIGNMENT - 1) / shim::ALIGNMENT * shim::ALIGNMENT;
    T* data = to.Write(PIPE_MTE2, shim::core.pipes.Start(PIPE_MTE2), 0, whole / sizeof(T));
    std::memset(static_cast<void*>(data), 0xFF, whole);
    shim::ReadDevice(data, from.Data(), size.blockLen);
}

template <typename T>
void DataCopyPad(const GlobalTensor<T>& to, const LocalTensor<T>& from, const DataCopyExtParams& size)
{
    shim::CheckPadded<T>(size);
    from.CheckAligned(shim::ALIGNMENT, "DataCopyPad");
    to.CheckCount(size.blockLen / sizeof(T));
    const T* data = from.Read(PIPE_MTE3, shim::core.pipes.Start(PIPE_MTE3), 0, size.blockLen / sizeof(T));
    shim::WriteDevice(to.Data(), data, size.blockLen);
}
#endif

}  // namespace AscendC

#endif
