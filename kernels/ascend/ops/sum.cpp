// Adds the partial sums that the blocks of svd_up_down wrote, in the order of the blocks: y = b + sum of partials.
#include "copies.h"
#include "kernel_operator.h"
#include "sizes.h"
#include "soc.h"
#include "sync.h"

constexpr uint32_t SUM_COLUMNS = 256;  // columns of all partial sums that are in UB at once

class PartialSum {
public:
    __aicore__ inline PartialSum(AscendC::TPipe* pipe, uint32_t parts, uint32_t hidden)
        : pipe_(pipe), parts_(parts), hidden_(hidden), columns_(RoundUp(hidden, LANES))
    {}

    __aicore__ inline void Init(GM_ADDR partials, GM_ADDR bias, GM_ADDR y)
    {
        partials_.SetGlobalBuffer(
            reinterpret_cast<__gm__ float*>(partials), static_cast<uint64_t>(parts_) * columns_);
        y_.SetGlobalBuffer(reinterpret_cast<__gm__ half*>(y), Reach<half>(hidden_));
        has_bias_ = bias != nullptr;
        if (has_bias_) {
            bias_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(bias), Reach<float>(hidden_));
        }
        pipe_->InitBuffer(tiles_, 2, parts_ * SUM_COLUMNS * sizeof(float));
        pipe_->InitBuffer(bias_buffer_, SUM_COLUMNS * sizeof(float));
        pipe_->InitBuffer(sum_buffer_, SUM_COLUMNS * sizeof(float));
        pipe_->InitBuffer(out_buffer_, SUM_COLUMNS * sizeof(half));
    }

    // Blocks share the columns in units of 64.
    __aicore__ inline void Run()
    {
        const uint32_t units = columns_ / LANES;
        const uint32_t block = AscendC::GetBlockIdx();
        const uint32_t blocks = AscendC::GetBlockNum();
        const uint32_t last = ShareStart(units, block + 1, blocks) * LANES;
        for (uint32_t first = ShareStart(units, block, blocks) * LANES; first < last; first += SUM_COLUMNS) {
            AddTile(first, Smaller(SUM_COLUMNS, last - first));
        }
    }

private:
    __aicore__ inline void AddTile(uint32_t first, uint32_t width)
    {
        auto tile = tiles_.AllocTensor<float>();
        constexpr uint32_t BLOCK = BLOCK_BYTES / sizeof(float);
        AscendC::DataCopy(tile, partials_[first],
            AscendC::DataCopyParams{static_cast<uint16_t>(parts_), static_cast<uint16_t>(width / BLOCK),
                static_cast<uint16_t>((columns_ - width) / BLOCK), 0});
        tiles_.EnQue(tile);
        auto parts = tiles_.DeQue<float>();
        auto sum = sum_buffer_.Get<float>();
        auto out = out_buffer_.Get<half>();
        const uint32_t count = Smaller(width, hidden_ - first);

        AscendC::Duplicate(sum, 0.0f, width);
        VectorBarrier();
        for (uint32_t k = 0; k < parts_; ++k) {
            AscendC::Add(sum, sum, parts[k * width], width);
            VectorBarrier();
        }
        tiles_.FreeTensor(parts);
        if (has_bias_) {
            auto bias = bias_buffer_.Get<float>();
            Sync<AscendC::HardEvent::V_MTE2>(*pipe_);
            CopyIn(bias, bias_[first], count);
            Sync<AscendC::HardEvent::MTE2_V>(*pipe_);
            AscendC::Add(sum, sum, bias, count);
            VectorBarrier();
        }
        AscendC::Cast(out, sum, ROUND_TO_HALF, width);
        Sync<AscendC::HardEvent::V_MTE3>(*pipe_);
        CopyOut(y_[first], out, count);
        Sync<AscendC::HardEvent::MTE3_V>(*pipe_);
    }

    AscendC::TPipe* pipe_;
    uint32_t parts_, hidden_, columns_;
    bool has_bias_ = false;
    AscendC::GlobalTensor<float> partials_, bias_;  // (parts, columns), (hidden,)
    AscendC::GlobalTensor<half> y_;                 // (hidden,)
    AscendC::TQue<AscendC::TPosition::VECIN, 1> tiles_;
    AscendC::TBuf<AscendC::TPosition::VECCALC> bias_buffer_, sum_buffer_, out_buffer_;
};

// partials: (parts, hidden padded to 64) float32, parts at most MAX_PRODUCERS; bias: (hidden,) float32 of down, or
// null; y: (hidden,) float16.
extern "C" __global__ __aicore__ void svd_sum(
    GM_ADDR partials, GM_ADDR bias, GM_ADDR y, uint32_t parts, uint32_t hidden)
{
    KERNEL_TASK_TYPE_DEFAULT(SVD_KERNEL_TYPE);
    AscendC::TPipe pipe;
    PartialSum sum(&pipe, parts, hidden);
    sum.Init(partials, bias, y);
    sum.Run();
}
