// Predict and compact: score every neuron, and list those whose score is positive.
//
//   s = A z + rest + b - shift * unit        z = B x and rest = Q x were made by matrix products before
//
// Blocks share the neurons in units of 64, as compares need; a block reads its rows of A one after the other.
#include "copies.h"
#include "dots.h"
#include "kernel_operator.h"
#include "list_writer.h"
#include "sizes.h"
#include "soc.h"
#include "sync.h"

constexpr uint32_t SCORE_SLOT = 16384;  // float16 in a slot: copies of 32 KB
constexpr uint32_t SCORE_SLOTS = 2;

class Score {
public:
    __aicore__ inline Score(AscendC::TPipe* pipe, uint32_t neurons, uint32_t rank)
        : pipe_(pipe), neurons_(neurons), rank_(rank), columns_(RoundUp(rank, LANES))
    {}

    __aicore__ inline void Init(GM_ADDR a, GM_ADDR bias, GM_ADDR unit, GM_ADDR shift, GM_ADDR rest)
    {
        a_.SetGlobalBuffer(reinterpret_cast<__gm__ half*>(a), static_cast<uint64_t>(neurons_) * columns_);
        ReadOnce(a_);
        bias_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(bias), Reach<float>(neurons_));
        unit_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(unit), Reach<float>(neurons_));
        AscendC::GlobalTensor<float> shifts;
        shifts.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(shift), 1);
        shift_ = shifts.GetValue(0);
        pipe_->InitBuffer(rows_, SCORE_SLOTS, SCORE_SLOT * sizeof(half));
        pipe_->InitBuffer(work_buffer_, SCORE_SLOT * sizeof(float));
        pipe_->InitBuffer(z_buffer_, columns_ * sizeof(float));
        pipe_->InitBuffer(scores_buffer_, CHUNK * sizeof(float));
        pipe_->InitBuffer(bias_buffer_, CHUNK * sizeof(float));
        pipe_->InitBuffer(unit_buffer_, CHUNK * sizeof(float));
        pipe_->InitBuffer(index_buffer_, CHUNK * sizeof(int32_t));
        pipe_->InitBuffer(rest_buffer_, CHUNK * sizeof(half));
        pipe_->InitBuffer(wide_buffer_, CHUNK * sizeof(float));
        has_rest_ = rest != nullptr;
        if (has_rest_) {
            rest_.SetGlobalBuffer(reinterpret_cast<__gm__ half*>(rest), Reach<half>(neurons_));
        }
    }

    // z = act(B x), float16 in device memory. relu: the predictor has a hidden layer.
    __aicore__ inline void LoadHidden(GM_ADDR z, bool relu)
    {
        AscendC::GlobalTensor<half> source;
        source.SetGlobalBuffer(reinterpret_cast<__gm__ half*>(z), Reach<half>(rank_));
        auto hidden = z_buffer_.Get<float>();
        LoadVector(*pipe_, hidden, source, work_buffer_.Get<half>(), rank_, columns_);
        if (relu) {
            AscendC::Relu(hidden, hidden, columns_);
            VectorBarrier();
        }
    }

    __aicore__ inline void Run(ListWriter& list)
    {
        const uint32_t units = RoundUp(neurons_, LANES) / LANES;
        const uint32_t block = AscendC::GetBlockIdx();
        const uint32_t blocks = AscendC::GetBlockNum();
        const uint32_t last = Smaller(ShareStart(units, block + 1, blocks) * LANES, neurons_);
        for (uint32_t first = ShareStart(units, block, blocks) * LANES; first < last; first += CHUNK) {
            ScoreChunk(list, first, Smaller(CHUNK, last - first));
        }
    }

private:
    __aicore__ inline void ScoreChunk(ListWriter& list, uint32_t first, uint32_t count)
    {
        auto scores = scores_buffer_.Get<float>();
        auto bias = bias_buffer_.Get<float>();
        auto unit = unit_buffer_.Get<float>();
        auto index = index_buffer_.Get<int32_t>();
        const uint32_t padded = RoundUp(count, LANES);

        // The copies of the chunk before are read.
        Sync<AscendC::HardEvent::V_MTE2>(*pipe_);
        CopyIn(bias, bias_[first], count);
        CopyIn(unit, unit_[first], count);
        if (has_rest_) {
            CopyIn(rest_buffer_.Get<half>(), rest_[first], count);
        }

        // What pads the last unit is never listed.
        AscendC::Duplicate(scores, -1.0f, padded);
        FillIndex(*pipe_, index, first, padded);
        VectorBarrier();
        const uint32_t slot = RowsInSlot(SCORE_SLOT, columns_);
        for (uint32_t row = 0; row < count; row += slot) {
            MultiplyRows(scores[row], first + row, Smaller(slot, count - row));
        }
        Sync<AscendC::HardEvent::MTE2_V>(*pipe_);
        AscendC::Add(scores, scores, bias, count);
        VectorBarrier();
        AscendC::Axpy(scores, unit, -shift_, count);
        VectorBarrier();
        if (has_rest_) {
            auto wide = wide_buffer_.Get<float>();
            AscendC::Cast(wide, rest_buffer_.Get<half>(), AscendC::RoundMode::CAST_NONE, count);
            VectorBarrier();
            AscendC::Add(scores, scores, wide, count);
            VectorBarrier();
        }
        list.Choose(scores, 0.0f, padded);
        list.Append(index, padded);
    }

    // scores (count,) = rows of A from `first`, times z.
    __aicore__ inline void MultiplyRows(const AscendC::LocalTensor<float>& scores, uint32_t first, uint32_t count)
    {
        auto slot = rows_.AllocTensor<half>();
        AscendC::DataCopy(slot, a_[static_cast<uint64_t>(first) * columns_], count * columns_);
        rows_.EnQue(slot);
        auto rows = rows_.DeQue<half>();
        DotRows(scores, rows, z_buffer_.Get<float>(), work_buffer_.Get<float>(), count, columns_);
        rows_.FreeTensor(rows);
    }

    AscendC::TPipe* pipe_;
    uint32_t neurons_, rank_, columns_;
    float shift_ = 0.0f;
    bool has_rest_ = false;
    AscendC::GlobalTensor<half> a_;             // (neurons, columns)
    AscendC::GlobalTensor<half> rest_;          // (neurons,)
    AscendC::GlobalTensor<float> bias_, unit_;  // (neurons,)
    AscendC::TQue<AscendC::TPosition::VECIN, 1> rows_;
    AscendC::TBuf<AscendC::TPosition::VECCALC> work_buffer_, z_buffer_, scores_buffer_, bias_buffer_, unit_buffer_,
        index_buffer_, rest_buffer_, wide_buffer_;
};

// a: (neurons, rank padded to 64) float16, the padding zero; z: (rank,) float16; bias, unit: (neurons,) float32, of
// which bias is minus the thresholds; shift: (1,) float32, the sparsity bias; rest: (neurons,) float16, what a low-bit
// part adds to the scores, or null; counts, indices: the list (list_writer.h). relu: 1 where z's ReLU is wanted.
extern "C" __global__ __aicore__ void svd_score(GM_ADDR a, GM_ADDR z, GM_ADDR bias, GM_ADDR unit, GM_ADDR shift,
    GM_ADDR rest, GM_ADDR counts, GM_ADDR indices, uint32_t neurons, uint32_t rank, uint32_t capacity, uint32_t relu)
{
    KERNEL_TASK_TYPE_DEFAULT(SVD_KERNEL_TYPE);
    AscendC::TPipe pipe;
    ListWriter list;
    list.Init(&pipe, counts, indices, nullptr, capacity);
    Score score(&pipe, neurons, rank);
    score.Init(a, bias, unit, shift, rest);
    score.LoadHidden(z, relu != 0);
    score.Run(list);
    list.Finish();
}
