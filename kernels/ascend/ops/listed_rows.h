// Rows of a matrix that a list names, in UB a slot at a time: copies run ahead while earlier slots are computed on.
#ifndef SVDENGINE_ASCEND_LISTED_ROWS_H
#define SVDENGINE_ASCEND_LISTED_ROWS_H

#include "copies.h"
#include "dots.h"
#include "kernel_operator.h"
#include "sizes.h"
#include "sync.h"

class ListedRows {
public:
    __aicore__ inline ListedRows() {}

    // columns: of a row as stored, a multiple of LANES and at most MAX_COLUMNS.
    __aicore__ inline void Init(AscendC::TPipe* pipe, uint32_t columns)
    {
        columns_ = columns;
        pipe->InitBuffer(rows_, ROW_SLOTS, ROW_SLOT * sizeof(half));
        pipe->InitBuffer(work_buffer_, ROW_SLOT * sizeof(float));
    }

    // (ROW_SLOT,) float32 of scratch.
    __aicore__ inline AscendC::LocalTensor<float> Work()
    {
        return work_buffer_.Get<float>();
    }

    // Rows that a slot holds.
    __aicore__ inline uint32_t SlotRows() const
    {
        return RowsInSlot(ROW_SLOT, columns_);
    }

    // Rows first..first + count of those that are listed: (count, columns) float16. The scalar unit reads the list.
    __aicore__ inline AscendC::LocalTensor<half> Fetch(const AscendC::GlobalTensor<half>& matrix,
        const AscendC::LocalTensor<int32_t>& neurons, uint32_t first, uint32_t count)
    {
        auto slot = rows_.AllocTensor<half>();
        for (uint32_t r = 0; r < count; ++r) {
            const uint64_t neuron = static_cast<uint64_t>(neurons.GetValue(first + r));
            AscendC::DataCopy(slot[r * columns_], matrix[neuron * columns_], columns_);
        }
        rows_.EnQue(slot);
        return rows_.DeQue<half>();
    }

    __aicore__ inline void Free(AscendC::LocalTensor<half>& slot)
    {
        rows_.FreeTensor(slot);
    }

    // dst (count,) float32 = the listed rows times x (columns,) float32.
    __aicore__ inline void Multiply(const AscendC::LocalTensor<float>& dst, const AscendC::GlobalTensor<half>& matrix,
        const AscendC::LocalTensor<int32_t>& neurons, uint32_t count, const AscendC::LocalTensor<float>& x)
    {
        const uint32_t slot_rows = SlotRows();
        for (uint32_t first = 0; first < count; first += slot_rows) {
            const uint32_t size = Smaller(slot_rows, count - first);
            auto rows = Fetch(matrix, neurons, first, size);
            DotRows(dst[first], rows, x, Work(), size, columns_);
            Free(rows);
        }
    }

private:
    uint32_t columns_;
    AscendC::TQue<AscendC::TPosition::VECIN, 1> rows_;
    AscendC::TBuf<AscendC::TPosition::VECCALC> work_buffer_;
};

// to = the listed entries of a vector (size,) in device memory. Neighbours come in one copy: the list ascends, and a
// scalar read of device memory for each would take longer than the rows. window: (WINDOW,) in UB.
__aicore__ inline void GatherListed(AscendC::TPipe& pipe, const AscendC::LocalTensor<float>& to,
    const AscendC::GlobalTensor<float>& from, uint32_t size, const AscendC::LocalTensor<float>& window,
    const AscendC::LocalTensor<int32_t>& neurons, uint32_t count)
{
    uint32_t i = 0;
    while (i < count) {
        const uint32_t first = static_cast<uint32_t>(neurons.GetValue(i));
        const uint32_t last = static_cast<uint32_t>(neurons.GetValue(count - 1)) + 1;
        const uint32_t held = Smaller(WINDOW, Smaller(last > first ? last : first + 1, size) - first);
        Sync<AscendC::HardEvent::S_MTE2>(pipe);
        CopyIn(window, from[first], held);
        Sync<AscendC::HardEvent::MTE2_S>(pipe);
        for (; i < count; ++i) {
            // A list that does not ascend is read one by one, and rightly.
            const uint32_t at = static_cast<uint32_t>(neurons.GetValue(i)) - first;
            if (at >= held) {
                break;
            }
            to.SetValue(i, window.GetValue(at));
        }
    }
}

#endif
