// GlobalTensor and LocalTensor: typed views of device memory and of UB.
#ifndef SHIM_TENSORS_H
#define SHIM_TENSORS_H

#include <cstdint>
#include <cstring>

#include "core.h"
#include "failure.h"
#include "half.h"

namespace AscendC {

enum class CacheMode { CACHE_MODE_DISABLE, CACHE_MODE_NORMAL };

template <typename T>
class GlobalTensor {
public:
    void SetGlobalBuffer(T* data, uint64_t size)
    {
        if (reinterpret_cast<uintptr_t>(data) % sizeof(T) != 0) {
            shim::Fail("device memory that is not aligned to its elements");
        }
        data_ = data;
        size_ = size;
    }

    GlobalTensor operator[](uint64_t offset) const
    {
        if (offset > size_) {
            shim::Fail("an offset of %llu into %llu elements", static_cast<unsigned long long>(offset),
                static_cast<unsigned long long>(size_));
        }
        GlobalTensor rest;
        rest.data_ = data_ + offset;
        rest.size_ = size_ - offset;
        return rest;
    }

    // A scalar read, through a cache that does not see what other cores write.
    T GetValue(uint64_t index) const
    {
        CheckCount(index + 1);
        T value;
        shim::ReadDevice(&value, data_ + index, sizeof(T));
        return value;
    }

#ifndef SVD_310P
    void SetL2CacheHint(CacheMode) {}
#endif

    void CheckCount(uint64_t count) const
    {
        if (count > size_) {
            shim::Fail("%llu elements of a device tensor of %llu are accessed", static_cast<unsigned long long>(count),
                static_cast<unsigned long long>(size_));
        }
    }

    T* Data() const
    {
        return data_;
    }

private:
    T* data_ = nullptr;
    uint64_t size_ = 0;
};

template <typename T>
class LocalTensor {
public:
    LocalTensor() = default;
    LocalTensor(size_t buffer, size_t offset, size_t bytes)
        : buffer_(buffer), lives_(shim::core.buffers[buffer].lives), offset_(offset), bytes_(bytes)
    {}

    LocalTensor operator[](uint32_t index) const
    {
        if (index > GetSize()) {
            shim::Fail("an offset of %u into %u elements of UB", index, GetSize());
        }
        LocalTensor rest = *this;
        rest.offset_ += index * sizeof(T);
        rest.bytes_ -= index * sizeof(T);
        return rest;
    }

    template <typename U>
    LocalTensor<U> ReinterpretCast() const
    {
        LocalTensor<U> other;
        other.buffer_ = buffer_;
        other.lives_ = lives_;
        other.offset_ = offset_;
        other.bytes_ = bytes_;
        return other;
    }

    uint32_t GetSize() const
    {
        return static_cast<uint32_t>(bytes_ / sizeof(T));
    }

    T GetValue(uint32_t index) const
    {
        const T* data = Read(PIPE_S, shim::core.pipes.Start(PIPE_S), index, 1);
        return *data;
    }

    void SetValue(uint32_t index, T value) const
    {
        *Write(PIPE_S, shim::core.pipes.Start(PIPE_S), index, 1) = value;
    }

    // Address of `count` elements from `index`, read by instruction `number` of a pipe.
    const T* Read(int pipe, uint32_t number, uint64_t index, uint64_t count) const
    {
        Check(index, count);
        for (size_t word = Word(index, 0); count && word <= Word(index + count, 1); ++word) {
            shim::core.pipes.Read(pipe, number, shim::core.words[word]);
        }
        return Data(index);
    }

    T* Write(int pipe, uint32_t number, uint64_t index, uint64_t count) const
    {
        Check(index, count);
        for (size_t word = Word(index, 0); count && word <= Word(index + count, 1); ++word) {
            shim::core.pipes.Write(pipe, number, shim::core.words[word]);
        }
        return Data(index);
    }

    // Fails unless the tensor starts at a multiple of `bytes`.
    void CheckAligned(size_t bytes, const char* what) const
    {
        if (offset_ % bytes != 0) {
            shim::Fail("%s: UB address %zu is not a multiple of %zu bytes", what, offset_, bytes);
        }
    }

    size_t Buffer() const
    {
        return buffer_;
    }

    size_t Offset() const
    {
        return offset_;
    }

private:
    template <typename U>
    friend class LocalTensor;

    void Check(uint64_t index, uint64_t count) const
    {
        if (buffer_ >= shim::core.buffers.size()) {
            shim::Fail("a tensor of UB that was never allocated is used");
        }
        const auto& buffer = shim::core.buffers[buffer_];
        if (buffer.lives != lives_ || buffer.life == shim::Life::FREE) {
            shim::Fail("a tensor is used after it was freed");
        }
        if (buffer.life == shim::Life::QUEUED) {
            shim::Fail("a tensor is used while it is in its queue");
        }
        if ((index + count) * sizeof(T) > bytes_) {
            shim::Fail("elements %llu to %llu of %u in UB are accessed", static_cast<unsigned long long>(index),
                static_cast<unsigned long long>(index + count), GetSize());
        }
    }

    size_t Word(uint64_t index, size_t back) const
    {
        return (offset_ + index * sizeof(T) - back) / 4;
    }

    T* Data(uint64_t index) const
    {
        return reinterpret_cast<T*>(shim::core.ub + offset_) + index;
    }

    size_t buffer_ = SIZE_MAX;
    uint32_t lives_ = 0;
    size_t offset_ = 0, bytes_ = 0;  // in UB
};

}  // namespace AscendC

#endif
