// Gathered up rows, product, and gathered down rows: this block's share of the FFN's output.
//
//   h_i = g_i * (W_up[i] . x + b_i)     y = sum of h_i * W_down_T[i] over the block's part of the active neurons
//
// Every block writes a partial sum of its own. svd_sum adds them in a fixed order, so that results repeat to the bit.
#include "copies.h"
#include "kernel_operator.h"
#include "list_reader.h"
#include "listed_rows.h"
#include "sizes.h"
#include "soc.h"
#include "sync.h"

class UpDown {
public:
    __aicore__ inline UpDown(AscendC::TPipe* pipe, uint32_t neurons, uint32_t hidden)
        : pipe_(pipe), neurons_(neurons), hidden_(hidden), columns_(RoundUp(hidden, LANES))
    {}

    __aicore__ inline void Init(GM_ADDR up, GM_ADDR down, GM_ADDR x, GM_ADDR bias)
    {
        const uint64_t size = static_cast<uint64_t>(neurons_) * columns_;
        down_.SetGlobalBuffer(reinterpret_cast<__gm__ half*>(down), size);
        ReadOnce(down_);
        rows_.Init(pipe_, columns_);
        pipe_->InitBuffer(sum_buffer_, columns_ * sizeof(float));
        pipe_->InitBuffer(neurons_buffer_, CHUNK * sizeof(int32_t));
        pipe_->InitBuffer(hidden_buffer_, CHUNK * sizeof(float));
        AscendC::Duplicate(sum_buffer_.Get<float>(), 0.0f, columns_);
        VectorBarrier();
        gated_ = up != nullptr;
        if (!gated_) {
            return;
        }
        up_.SetGlobalBuffer(reinterpret_cast<__gm__ half*>(up), size);
        ReadOnce(up_);
        has_bias_ = bias != nullptr;
        if (has_bias_) {
            bias_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(bias), Reach<float>(neurons_));
        }
        pipe_->InitBuffer(x_buffer_, columns_ * sizeof(float));
        pipe_->InitBuffer(up_buffer_, CHUNK * sizeof(float));
        pipe_->InitBuffer(bias_buffer_, CHUNK * sizeof(float));
        pipe_->InitBuffer(window_buffer_, WINDOW * sizeof(float));
        AscendC::GlobalTensor<half> input;
        input.SetGlobalBuffer(reinterpret_cast<__gm__ half*>(x), Reach<half>(hidden_));
        auto staging = rows_.Work().ReinterpretCast<half>();
        LoadVector(*pipe_, x_buffer_.Get<float>(), input, staging, hidden_, columns_);
    }

    // relu: dReLU, whose second factor has a ReLU too.
    __aicore__ inline void Run(ListReader& active, const AscendC::GlobalTensor<int32_t>& segments,
        const AscendC::GlobalTensor<float>& values, bool relu)
    {
        auto neurons = neurons_buffer_.Get<int32_t>();
        auto hidden = hidden_buffer_.Get<float>();
        for (uint32_t first = active.First(); first < active.Last(); first += CHUNK) {
            const uint32_t count = Smaller(CHUNK, active.Last() - first);
            active.Read(neurons, segments, first, first + count);
            active.Read(hidden, values, first, first + count);
            if (gated_) {
                MultiplyUp(hidden, neurons, count, relu);
            }
            AddDown(hidden, neurons, count);
        }
    }

    // partials: (blocks, columns) float32.
    __aicore__ inline void Store(GM_ADDR partials)
    {
        AscendC::GlobalTensor<float> partial;
        const uint64_t block = AscendC::GetBlockIdx();
        partial.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(partials) + block * columns_, columns_);
        Sync<AscendC::HardEvent::V_MTE3>(*pipe_);
        AscendC::DataCopy(partial, sum_buffer_.Get<float>(), columns_);
    }

private:
    // hidden (count,) *= the listed rows of up times x. The scalar unit may read it afterwards.
    __aicore__ inline void MultiplyUp(const AscendC::LocalTensor<float>& hidden,
        const AscendC::LocalTensor<int32_t>& neurons, uint32_t count, bool relu)
    {
        auto up = up_buffer_.Get<float>();
        auto bias = bias_buffer_.Get<float>();
        if (has_bias_) {
            GatherListed(*pipe_, bias, bias_, neurons_, window_buffer_.Get<float>(), neurons, count);
        }
        Sync<AscendC::HardEvent::S_V>(*pipe_);
        rows_.Multiply(up, up_, neurons, count, x_buffer_.Get<float>());
        if (has_bias_) {
            AscendC::Add(up, up, bias, count);
            VectorBarrier();
        }
        if (relu) {
            AscendC::Relu(up, up, count);
            VectorBarrier();
        }
        AscendC::Mul(hidden, hidden, up, count);
        Sync<AscendC::HardEvent::V_S>(*pipe_);
    }

    // sum += hidden[k] times the k-th listed row of down. The factor stays float32: float16 has too small a range.
    __aicore__ inline void AddDown(const AscendC::LocalTensor<float>& hidden,
        const AscendC::LocalTensor<int32_t>& neurons, uint32_t count)
    {
        auto sum = sum_buffer_.Get<float>();
        auto work = rows_.Work();
        const uint32_t slot_rows = rows_.SlotRows();
        for (uint32_t first = 0; first < count; first += slot_rows) {
            const uint32_t size = Smaller(slot_rows, count - first);
            auto rows = rows_.Fetch(down_, neurons, first, size);
            AscendC::Cast(work, rows, AscendC::RoundMode::CAST_NONE, size * columns_);
            rows_.Free(rows);
            VectorBarrier();
            for (uint32_t r = 0; r < size; ++r) {
                AscendC::Axpy(sum, work[r * columns_], hidden.GetValue(first + r), columns_);
                VectorBarrier();
            }
        }
    }

    AscendC::TPipe* pipe_;
    uint32_t neurons_, hidden_, columns_;
    bool gated_ = true, has_bias_ = false;
    AscendC::GlobalTensor<half> up_, down_;  // (neurons, columns)
    AscendC::GlobalTensor<float> bias_;      // (neurons,)
    ListedRows rows_;
    AscendC::TBuf<AscendC::TPosition::VECCALC> x_buffer_, sum_buffer_, neurons_buffer_, hidden_buffer_, up_buffer_,
        bias_buffer_, window_buffer_;
};

// up, down: (neurons, hidden padded to 64) float16, the padding zero; up is null in a model without a gate;
// x: (hidden,) float16; bias: (neurons,) float32 of up, or null; counts, active, values: a list that `producers` blocks
// wrote, with segments of `capacity`; partials: (blocks, hidden padded) float32. relu: 1 for dReLU.
extern "C" __global__ __aicore__ void svd_up_down(GM_ADDR up, GM_ADDR down, GM_ADDR x, GM_ADDR bias, GM_ADDR counts,
    GM_ADDR active, GM_ADDR values, GM_ADDR partials, uint32_t neurons, uint32_t hidden, uint32_t producers,
    uint32_t capacity, uint32_t relu)
{
    KERNEL_TASK_TYPE_DEFAULT(SVD_KERNEL_TYPE);
    AscendC::TPipe pipe;
    ListReader reader;
    reader.Init(&pipe, counts, producers, capacity);
    UpDown layer(&pipe, neurons, hidden);
    layer.Init(up, down, x, bias);
    const uint64_t size = static_cast<uint64_t>(producers) * capacity;
    AscendC::GlobalTensor<int32_t> segments;
    segments.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(active), Reach<int32_t>(size));
    AscendC::GlobalTensor<float> segment_values;
    segment_values.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(values), Reach<float>(size));
    layer.Run(reader, segments, segment_values, relu != 0);
    layer.Store(partials);
}
