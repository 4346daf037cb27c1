// Gathered gate rows, activation and second compaction: of the predicted neurons, list those whose gate is active.
//
//   g_i = act(W_gate[i] . x + b_i)      kept where g_i > 0, with its value
//
// act: ReLU, FATReLU (x where x > threshold), ReLU squared; dReLU's gate is a ReLU. Blocks share the list by entries.
#include "copies.h"
#include "kernel_operator.h"
#include "list_reader.h"
#include "list_writer.h"
#include "listed_rows.h"
#include "sizes.h"
#include "soc.h"
#include "sync.h"

class Gate {
public:
    __aicore__ inline Gate(AscendC::TPipe* pipe, uint32_t neurons, uint32_t hidden)
        : pipe_(pipe), neurons_(neurons), hidden_(hidden), columns_(RoundUp(hidden, LANES))
    {}

    __aicore__ inline void Init(GM_ADDR gate, GM_ADDR x, GM_ADDR bias)
    {
        gate_.SetGlobalBuffer(reinterpret_cast<__gm__ half*>(gate), static_cast<uint64_t>(neurons_) * columns_);
        ReadOnce(gate_);
        has_bias_ = bias != nullptr;
        if (has_bias_) {
            bias_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(bias), Reach<float>(neurons_));
        }
        rows_.Init(pipe_, columns_);
        pipe_->InitBuffer(x_buffer_, columns_ * sizeof(float));
        pipe_->InitBuffer(neurons_buffer_, CHUNK * sizeof(int32_t));
        pipe_->InitBuffer(gates_buffer_, CHUNK * sizeof(float));
        pipe_->InitBuffer(bias_buffer_, CHUNK * sizeof(float));
        pipe_->InitBuffer(window_buffer_, WINDOW * sizeof(float));
        AscendC::GlobalTensor<half> input;
        input.SetGlobalBuffer(reinterpret_cast<__gm__ half*>(x), Reach<half>(hidden_));
        auto staging = rows_.Work().ReinterpretCast<half>();
        LoadVector(*pipe_, x_buffer_.Get<float>(), input, staging, hidden_, columns_);
    }

    // threshold: 0 but for FATReLU. square: ReLU squared.
    __aicore__ inline void Run(
        ListReader& predicted, const AscendC::GlobalTensor<int32_t>& segments, ListWriter& active, float threshold,
        bool square)
    {
        auto neurons = neurons_buffer_.Get<int32_t>();
        auto gates = gates_buffer_.Get<float>();
        for (uint32_t first = predicted.First(); first < predicted.Last(); first += CHUNK) {
            const uint32_t count = Smaller(CHUNK, predicted.Last() - first);
            const uint32_t padded = RoundUp(count, LANES);

            // The vector unit is done with the list of the chunk before.
            Sync<AscendC::HardEvent::V_S>(*pipe_);
            predicted.Read(neurons, segments, first, first + count);
            MultiplyChunk(gates, neurons, count, padded);

            active.Choose(gates, threshold > 0.0f ? threshold : 0.0f, padded);
            if (square) {
                AscendC::Mul(gates, gates, gates, padded);
                VectorBarrier();
            }
            active.Append(neurons, gates, padded);
        }
    }

private:
    // gates (padded,) = gates before activation of the listed neurons, then zeros, which are not active.
    __aicore__ inline void MultiplyChunk(const AscendC::LocalTensor<float>& gates,
        const AscendC::LocalTensor<int32_t>& neurons, uint32_t count, uint32_t padded)
    {
        auto bias = bias_buffer_.Get<float>();
        if (has_bias_) {
            GatherListed(*pipe_, bias, bias_, neurons_, window_buffer_.Get<float>(), neurons, count);
        }
        Sync<AscendC::HardEvent::S_V>(*pipe_);
        AscendC::Duplicate(gates, 0.0f, padded);
        VectorBarrier();
        rows_.Multiply(gates, gate_, neurons, count, x_buffer_.Get<float>());
        if (has_bias_) {
            AscendC::Add(gates, gates, bias, count);
            VectorBarrier();
        }
    }

    AscendC::TPipe* pipe_;
    uint32_t neurons_, hidden_, columns_;
    bool has_bias_ = false;
    AscendC::GlobalTensor<half> gate_;   // (neurons, columns)
    AscendC::GlobalTensor<float> bias_;  // (neurons,)
    ListedRows rows_;
    AscendC::TBuf<AscendC::TPosition::VECCALC> x_buffer_, neurons_buffer_, gates_buffer_, bias_buffer_,
        window_buffer_;
};

// gate: (neurons, hidden padded to 64) float16, the padding zero (of a model without a gate: up); x: (hidden,) float16;
// bias: (neurons,) float32 or null; predicted_counts, predicted: a list that `producers` blocks wrote, with segments of
// predicted_capacity; active_counts, active, active_values: the list to write, with segments of active_capacity.
extern "C" __global__ __aicore__ void svd_gate(GM_ADDR gate, GM_ADDR x, GM_ADDR bias, GM_ADDR predicted_counts,
    GM_ADDR predicted, GM_ADDR active_counts, GM_ADDR active, GM_ADDR active_values, uint32_t neurons, uint32_t hidden,
    uint32_t producers, uint32_t predicted_capacity, uint32_t active_capacity, float threshold, uint32_t square)
{
    KERNEL_TASK_TYPE_DEFAULT(SVD_KERNEL_TYPE);
    AscendC::TPipe pipe;
    ListReader reader;
    reader.Init(&pipe, predicted_counts, producers, predicted_capacity);
    ListWriter writer;
    writer.Init(&pipe, active_counts, active, active_values, active_capacity);
    Gate layer(&pipe, neurons, hidden);
    layer.Init(gate, x, bias);
    AscendC::GlobalTensor<int32_t> segments;
    segments.SetGlobalBuffer(
        reinterpret_cast<__gm__ int32_t*>(predicted), Reach<int32_t>(static_cast<uint64_t>(producers) * predicted_capacity));
    layer.Run(reader, segments, writer, threshold, square != 0);
    writer.Finish();
}
