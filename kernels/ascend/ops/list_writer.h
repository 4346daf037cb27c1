// Compaction: a block's part of a list of neurons, and how many there are.
#ifndef SVDENGINE_ASCEND_LIST_WRITER_H
#define SVDENGINE_ASCEND_LIST_WRITER_H

#include "copies.h"
#include "kernel_operator.h"
#include "sizes.h"
#include "sync.h"

// Every block owns a segment of `capacity` entries and a count record, so that no block waits for another:
//   counts (blocks, COUNT_INTS) int32, indices (blocks, capacity) int32, values (blocks, capacity) float32
class ListWriter {
public:
    __aicore__ inline ListWriter() {}

    // values may be null: a list without them.
    __aicore__ inline void Init(
        AscendC::TPipe* pipe, GM_ADDR counts, GM_ADDR indices, GM_ADDR values, uint32_t capacity)
    {
        pipe_ = pipe;
        const uint64_t block = AscendC::GetBlockIdx();
        counts_.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(counts) + block * COUNT_INTS, COUNT_INTS);
        indices_.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(indices) + block * capacity, capacity);
        pipe->InitBuffer(mask_, CHUNK / 8);
        pipe->InitBuffer(packed_, CHUNK * sizeof(int32_t));
        pipe->InitBuffer(record_, COUNT_INTS * sizeof(int32_t));
        if (values != nullptr) {
            values_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(values) + block * capacity, capacity);
            pipe->InitBuffer(packed_values_, CHUNK * sizeof(float));
        }
    }

    // Choose the entries whose key is above the threshold. padded: a multiple of LANES, at most CHUNK.
    __aicore__ inline void Choose(const AscendC::LocalTensor<float>& keys, float threshold, uint32_t padded)
    {
        AscendC::CompareScalar(mask_.Get<uint8_t>(), keys, threshold, AscendC::CMPMODE::GT, padded);
        VectorBarrier();
    }

    // Append the chosen of `padded` neurons.
    __aicore__ inline void Append(const AscendC::LocalTensor<int32_t>& neurons, uint32_t padded)
    {
        const uint32_t kept = Pack(packed_.Get<int32_t>(), neurons, padded);
        Flush(indices_, packed_.Get<int32_t>(), kept);
        count_ += kept;
    }

    // Append the chosen of `padded` neurons and of their values.
    __aicore__ inline void Append(const AscendC::LocalTensor<int32_t>& neurons,
        const AscendC::LocalTensor<float>& values, uint32_t padded)
    {
        const uint32_t kept = Pack(packed_values_.Get<float>(), values, padded);
        Flush(values_, packed_values_.Get<float>(), kept);
        Append(neurons, padded);
    }

    // Write the count: once, after all else.
    __aicore__ inline void Finish()
    {
        auto record = record_.Get<int32_t>();
        record.SetValue(0, static_cast<int32_t>(count_));
        for (uint32_t i = 1; i < COUNT_INTS; ++i) {
            record.SetValue(i, 0);
        }
        Sync<AscendC::HardEvent::S_MTE3>(*pipe_);
        AscendC::DataCopy(counts_, record, COUNT_INTS);
    }

private:
    template <typename T>
    __aicore__ inline uint32_t Pack(
        const AscendC::LocalTensor<T>& to, const AscendC::LocalTensor<T>& from, uint32_t padded)
    {
        uint64_t kept = 0;
        auto mask = mask_.Get<uint8_t>().template ReinterpretCast<uint32_t>();
        AscendC::GatherMask(to, from, mask, true, padded, AscendC::GatherMaskParams{1, 1, 8, 0}, kept);
        VectorBarrier();
        return static_cast<uint32_t>(kept);
    }

    // UB addresses are multiples of 32 bytes and device addresses need not be: append there, not in UB.
    template <typename T>
    __aicore__ inline void Flush(
        const AscendC::GlobalTensor<T>& segment, const AscendC::LocalTensor<T>& packed, uint32_t kept)
    {
        if (kept == 0) {
            return;
        }
        Sync<AscendC::HardEvent::V_MTE3>(*pipe_);
        CopyOut(segment[count_], packed, kept);
        Sync<AscendC::HardEvent::MTE3_V>(*pipe_);
    }

    AscendC::TPipe* pipe_;
    AscendC::GlobalTensor<int32_t> counts_;   // (COUNT_INTS,) of this block
    AscendC::GlobalTensor<int32_t> indices_;  // (capacity,) of this block
    AscendC::GlobalTensor<float> values_;     // (capacity,) of this block
    AscendC::TBuf<AscendC::TPosition::VECCALC> mask_, packed_, packed_values_, record_;
    uint32_t count_ = 0;
};

#endif
