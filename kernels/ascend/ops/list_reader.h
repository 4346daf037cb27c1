// A list of neurons as its consumers see it: one list, whatever the blocks that wrote its segments.
#ifndef SVDENGINE_ASCEND_LIST_READER_H
#define SVDENGINE_ASCEND_LIST_READER_H

#include "copies.h"
#include "kernel_operator.h"
#include "sizes.h"
#include "sync.h"

// The layout is that of ListWriter. The list is cut by entries and not by segments: however skewed the segments are,
// consumers get equal parts.
class ListReader {
public:
    __aicore__ inline ListReader() {}

    // producers: blocks that wrote the list, at most MAX_PRODUCERS. Reads all counts.
    __aicore__ inline void Init(AscendC::TPipe* pipe, GM_ADDR counts, uint32_t producers, uint32_t capacity)
    {
        pipe_ = pipe;
        producers_ = producers;
        capacity_ = capacity;
        AscendC::GlobalTensor<int32_t> records;
        records.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(counts), producers * COUNT_INTS);
        pipe->InitBuffer(counts_, MAX_PRODUCERS * COUNT_INTS * sizeof(int32_t));
        pipe->InitBuffer(staging_, CHUNK * sizeof(int32_t));
        // By copy: a scalar read of device memory goes through a cache that other cores' writes do not reach.
        AscendC::DataCopy(counts_.Get<int32_t>(), records, producers * COUNT_INTS);
        Sync<AscendC::HardEvent::MTE2_S>(*pipe);
        uint32_t total = 0;
        for (uint32_t k = 0; k < producers; ++k) {
            total += Count(k);
        }
        const uint32_t block = AscendC::GetBlockIdx();
        const uint32_t blocks = AscendC::GetBlockNum();
        first_ = ShareStart(total, block, blocks);
        last_ = ShareStart(total, block + 1, blocks);
    }

    __aicore__ inline uint32_t First() const
    {
        return first_;
    }

    __aicore__ inline uint32_t Last() const
    {
        return last_;
    }

    // to = entries first..last of the list whose segments are given: at most CHUNK, by the scalar unit.
    template <typename T>
    __aicore__ inline void Read(const AscendC::LocalTensor<T>& to, const AscendC::GlobalTensor<T>& segments,
        uint32_t first, uint32_t last)
    {
        auto staging = staging_.Get<T>();
        uint32_t start = 0;  // of the segment in the list
        uint32_t filled = 0;
        for (uint32_t k = 0; k < producers_ && start < last; ++k) {
            const uint32_t end = start + Count(k);
            if (end > first && end > start) {
                const uint32_t from = first > start ? first - start : 0;
                const uint32_t size = Smaller(end, last) - start - from;
                Sync<AscendC::HardEvent::S_MTE2>(*pipe_);
                CopyIn(staging, segments[static_cast<uint64_t>(k) * capacity_ + from], size);
                Sync<AscendC::HardEvent::MTE2_S>(*pipe_);
                for (uint32_t i = 0; i < size; ++i) {
                    to.SetValue(filled + i, staging.GetValue(i));
                }
                filled += size;
            }
            start = end;
        }
    }

private:
    __aicore__ inline uint32_t Count(uint32_t producer)
    {
        return static_cast<uint32_t>(counts_.Get<int32_t>().GetValue(producer * COUNT_INTS));
    }

    AscendC::TPipe* pipe_;
    AscendC::TBuf<AscendC::TPosition::VECCALC> counts_, staging_;
    uint32_t producers_, capacity_, first_, last_;
};

#endif
