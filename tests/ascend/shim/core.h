// One vector core: its UB with what happened to each word, its buffers, and the device memory that it may touch.
#ifndef SHIM_CORE_H
#define SHIM_CORE_H

#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "failure.h"
#include "pipes.h"

namespace shim {

constexpr size_t UB_BYTES = 188160;  // of the 192 KB, what a kernel may use on 910B
constexpr size_t MOST_BUFFERS = 64;
#ifdef SVD_310P
constexpr int MOST_BLOCKS = 8;
#else
constexpr int MOST_BLOCKS = 48;
#endif
constexpr size_t ALIGNMENT = 32;

enum class Life { FREE, ALLOCATED, QUEUED, IN_USE };

// A buffer of a queue, or a TBuf, which is always in use.
struct Buffer {
    size_t offset, bytes;
    Life life;
    uint32_t lives;      // tensors of an earlier life are stale
    const void* owner;   // its queue
    Clock mark;          // set by EnQue and FreeTensor, awaited by DeQue and AllocTensor
};

// Device memory that a launch was given.
struct Region {
    uint8_t* data;
    size_t bytes;
    std::vector<int16_t> writer;  // (bytes,) block that wrote it in this launch, -1: none
};

struct Core {
    int64_t block = 0, blocks = 1;
    uint8_t* ub = nullptr;
    size_t used = 0;
    std::vector<Buffer> buffers;
    std::vector<Word> words;
    Pipes pipes;

    // A fresh core: UB holds NaN in every float type.
    void Reset(int64_t index, int64_t count)
    {
        static std::unique_ptr<uint8_t[]> memory(new uint8_t[UB_BYTES + ALIGNMENT]);
        const uintptr_t address = reinterpret_cast<uintptr_t>(memory.get());
        ub = memory.get() + (ALIGNMENT - address % ALIGNMENT) % ALIGNMENT;
        std::memset(ub, 0xFF, UB_BYTES);
        block = index;
        blocks = count;
        used = 0;
        buffers.clear();
        words.assign(UB_BYTES / 4, Word{});
        pipes = Pipes();
    }

    size_t AddBuffer(size_t bytes, Life life, const void* owner)
    {
        if (bytes == 0) {
            Fail("a buffer of no bytes");
        }
        bytes = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
        if (buffers.size() == MOST_BUFFERS) {
            Fail("more than %zu buffers in a kernel", MOST_BUFFERS);
        }
        if (used + bytes > UB_BYTES) {
            Fail("%zu bytes of UB are asked for, there are %zu", used + bytes, UB_BYTES);
        }
        buffers.push_back(Buffer{used, bytes, life, 0, owner, Clock{}});
        used += bytes;
        return buffers.size() - 1;
    }

    void CheckIdle() const
    {
        pipes.CheckIdle();
        for (const Buffer& buffer : buffers) {
            if (buffer.owner != nullptr && buffer.life != Life::FREE) {
                Fail("a kernel ends with a buffer that was allocated and not freed");
            }
        }
    }
};

inline Core core;
inline std::vector<Region> regions;

// The region that holds `bytes` at `data`. Fails where they reach beyond it.
inline Region& FindRegion(const uint8_t* data, size_t bytes)
{
    for (Region& region : regions) {
        if (data >= region.data && data < region.data + region.bytes) {
            if (bytes > static_cast<size_t>(region.data + region.bytes - data)) {
                Fail("device memory is accessed %zu bytes beyond its end",
                    bytes - static_cast<size_t>(region.data + region.bytes - data));
            }
            return region;
        }
    }
    Fail("an address that is no device memory of this launch");
}

// Blocks run at once and in any order, so none may use what another writes.
inline void ReadDevice(void* to, const void* from, size_t bytes)
{
    const uint8_t* data = static_cast<const uint8_t*>(from);
    const Region& region = FindRegion(data, bytes);
    for (size_t i = 0; i < bytes; ++i) {
        const int16_t writer = region.writer[data - region.data + i];
        if (writer >= 0 && writer != core.block) {
            Fail("block %d reads device memory that block %d writes", static_cast<int>(core.block), writer);
        }
    }
    std::memcpy(to, from, bytes);
}

inline void WriteDevice(void* to, const void* from, size_t bytes)
{
    uint8_t* data = static_cast<uint8_t*>(to);
    Region& region = FindRegion(data, bytes);
    for (size_t i = 0; i < bytes; ++i) {
        int16_t& writer = region.writer[data - region.data + i];
        if (writer >= 0 && writer != core.block) {
            Fail("blocks %d and %d write the same device memory", writer, static_cast<int>(core.block));
        }
        writer = static_cast<int16_t>(core.block);
    }
    std::memcpy(to, from, bytes);
}

}  // namespace shim

#endif
